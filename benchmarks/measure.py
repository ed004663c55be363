"""What the benchmarks share: tests that run before anything is timed, and what the machine gives while it is."""
from __future__ import annotations

import statistics
import subprocess
import sys
from dataclasses import dataclass, field

NEAR = 0.85  # of the read bandwidth counts as reached


def green(*tests: str) -> bool:
    """Whether these files of tests/runtime pass; says so where they do not."""
    files = [f"tests/runtime/test_{t}.py" for t in tests]
    if subprocess.run([sys.executable, "-m", "pytest", "-q", *files], check=False, stdout=subprocess.DEVNULL).returncode:
        print(f"nothing is timed: {' or '.join(files)} is red")
        return False
    return True


@dataclass
class Roof:
    """What the machine gave in this run: bytes read a second, and operations a second by what x is multiplied as."""

    found: dict[str, list[float]] = field(default_factory=lambda: {"bandwidth": [], "f32": [], "bf16": [], "i8": []})

    def look(self, threads: int) -> None:
        from trimtab.runtime import native

        core = native.core()
        assert core is not None, "the native kernels were not built"
        for what, found in self.found.items():
            found.append(core.read_bandwidth(400 << 20, threads, 2) if what == "bandwidth" else core.peak_flops(what, threads, 10))

    def gives(self, what: str) -> float:
        """The median of the looks; each took the best of several numbers of streams, with small and with huge pages."""
        return statistics.median(self.found[what])

    def __str__(self) -> str:
        peaks = ", ".join(f"{self.gives(x) / 1e9:.0f} ({x})" for x in ("f32", "bf16", "i8"))
        low, middle, high = (f(self.found["bandwidth"]) / 1e9 for f in (min, statistics.median, max))
        return f"reads {low:.1f} to {high:.1f} GB/s, {middle:.1f} in the middle; peak GFLOP/s by x: {peaks}"
