"""Worked examples: one entry a method, small enough to check by hand, and the nearest neighbour it must differ from."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """`env`: the data the method names; `want`: its result (a Change's `w`), or {name: share} for a budget."""

    env: dict[str, Any]
    want: Any
    knobs: dict[str, Any] = field(default_factory=dict)
    differs: str | None = None  # key of the nearest other method: on the same data it must give something else
    tol: float = 1e-5
