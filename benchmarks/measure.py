"""What the benchmarks share: tests that run before anything is timed, and what the machine gives while it is."""
from __future__ import annotations

import hashlib
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

NEAR = 0.85  # of the read bandwidth counts as reached


def green(*tests: str) -> bool:
    """Whether these files of tests/runtime pass; says so where they do not. What passed is not run again before something changed:
    the extension, a source file or a test."""
    from trimtab.runtime import native

    root, core = Path(__file__).resolve().parent.parent, native.core()
    of = hashlib.sha256()
    for path in sorted([*(root / "src").rglob("*.py"), *(root / "tests").rglob("*.py"), *([Path(core.__file__)] if core else [])]):
        of.update(path.read_bytes())
    for test in tests:
        file, passed = f"tests/runtime/test_{test}.py", root / "build" / "green" / f"{test}-{of.hexdigest()[:16]}"
        if passed.exists():
            continue
        if subprocess.run([sys.executable, "-m", "pytest", "-q", file], check=False, stdout=subprocess.DEVNULL, cwd=root).returncode:
            print(f"nothing is timed: {file} is red")
            return False
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.touch()
    return True


def look(threads: int) -> float:
    """Bytes read a second at this moment: some tens of milliseconds, at the best of several numbers of streams."""
    from trimtab.runtime import native

    core = native.core()
    assert core is not None, "the native kernels were not built"
    return core.read_bandwidth(96 << 20, threads, 1)


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
