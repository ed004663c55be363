"""Checkpoints that others open."""
from trimtab.face import make_callable

make_callable(__name__)
