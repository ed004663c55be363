"""grid: which values may a weight take?"""
