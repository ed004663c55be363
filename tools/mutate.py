"""Plant bugs, one at a time, and see whether the tests notice.

    python tools/mutate.py [--only SUBSTRING] [--jobs N]

Every bug goes into a copy of the repository in a temporary directory; the working tree is not touched. A bug in a
method file is hunted by the laws, worked examples and slow oracles of the methods in that file, any other bug by the
tests it names. Exit 0: all killed. 1: some survived. 2: a text to replace is not there (exactly once), or the tests
are red before any bug.
"""
from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("src", "tests", "tools", "pyproject.toml")  # what the tests need of the repository
TIMEOUT = 600  # seconds; a bug that makes the tests hang is noticed, too
METHOD_TESTS = ("tests/test_laws.py", "tests/test_cases.py", "tests/slow")


@dataclass(frozen=True)
class Bug:
    """Replace `old` by `new` in `file` (under src/trimtab). `tests`: pytest arguments, for files that hold no method."""

    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return f"src/trimtab/{self.file}"

    def arguments(self, source: str) -> list[str]:
        if self.tests:
            return list(self.tests)
        axis = self.file.split("/")[1]
        names = [n.rstrip("_") for n in re.findall(rf'@method\("{axis}".*?\ndef (\w+)\(', source, re.S)]
        return [*METHOD_TESTS, "-k", " or ".join(f"{axis}/{n} or test_{n}" for n in names)]


BUGS: list[Bug] = []


def copied(where: Path) -> Path:
    """The repository in `where`: code copied, everything large linked."""

    def copy(src: str, dst: str) -> None:
        if src.endswith((".py", ".toml")):
            shutil.copyfile(src, dst)
        else:
            os.symlink(src, dst)

    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, where / part, copy_function=copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            copy(str(ROOT / part), str(where / part))
    return where


def run(where: Path, arguments: list[str]) -> tuple[int, str]:
    """pytest's exit code (1 for a timeout) and the first failure."""
    env = {**os.environ, "PYTHONPATH": f"{where / 'src'}{os.pathsep}{where}", "PYTHONDONTWRITEBYTECODE": "1",
           "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *arguments]
    try:
        done = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return 1, "the tests hang"
    first = re.search(r"^(?:FAILED|ERROR) (?:\S*::)?(.*?)(?: - .*)?$", done.stdout, re.M)
    return done.returncode, first[1] if first else done.stdout.strip()[-300:] + done.stderr.strip()[-300:]


def baseline(bugs: list[Bug]) -> str:
    """Why the hunt would prove nothing; empty if all is well."""
    for b in bugs:
        found = (ROOT / b.path).read_text(encoding="utf-8").count(b.old)
        if found != 1:
            return f"{b.path}: {b.old!r} is there {found} times, not once ({b.why})"
    with tempfile.TemporaryDirectory(prefix="mutate-") as tmp:
        where = copied(Path(tmp))
        script = "import trimtab; print(trimtab.__file__)"
        env = {**os.environ, "PYTHONPATH": str(where / "src")}
        at = subprocess.run([sys.executable, "-c", script], cwd=where, env=env, capture_output=True, text=True, check=True)
        if not Path(at.stdout.strip()).is_relative_to(where):
            return f"the tests would import {at.stdout.strip()}, not the copy"
        wanted = {tuple(b.arguments((ROOT / b.path).read_text(encoding="utf-8"))) for b in bugs}
        for arguments in sorted(wanted):
            code, first = run(where, list(arguments))
            if code:
                return f"pytest {' '.join(arguments)} is red before any bug: {first}"
    return ""


def hunt(bug: Bug) -> tuple[Bug, int, str, float]:
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="mutate-") as tmp:
        where = copied(Path(tmp))
        source = (where / bug.path).read_text(encoding="utf-8")
        (where / bug.path).write_text(source.replace(bug.old, bug.new, 1), encoding="utf-8")
        code, first = run(where, bug.arguments(source))
    return bug, code, first, time.time() - began


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--only", default="", help="bugs whose file or reason contains this")
    ask.add_argument("--jobs", type=int, default=1)
    args = ask.parse_args()
    bugs = [b for b in BUGS if args.only in b.file or args.only in b.why]
    if not bugs:
        print(f"no bug matches {args.only!r}")
        return 2
    if why := baseline(bugs):
        print(why)
        return 2
    alive = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for bug, code, first, seconds in pool.map(hunt, bugs):
            if code not in (0, 1, 2):  # 2: the tests could not even be collected, 3 and up: pytest itself
                print(f"pytest gave {code} for {bug.why}: {first}")
                return 2
            alive += code == 0
            print(f"{'SURVIVED' if code == 0 else 'killed  '} {seconds:5.1f} s  {bug.file}: {bug.why}"
                  f"{'' if code == 0 else f'  [{first}]'}", flush=True)
    print(f"{len(bugs) - alive} of {len(bugs)} killed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
