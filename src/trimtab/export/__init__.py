"""Checkpoints that other programs open."""
