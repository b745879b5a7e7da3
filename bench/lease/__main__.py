"""``make lease``: everything that two calls on a rented GPU need, compiled and tried here without one.

1. The GPU machine's software in a venv (``requirements.txt``; ``LEASE_PYTHON`` names a Python that has it already).
2. Both calls run on the stub driver (:mod:`bench.lease.pretend`), in a copy of the tracked files: what they launch is
   compiled, kernels by Triton and launchers by the C compiler, and packed as ``.cache/lease/kernels.tar.xz``.
3. Both calls once more, in another copy, with that archive: nothing may be compiled, nothing refused, no step fail.

``python -m bench.lease first`` does it for one call alone. Kernels of an earlier time are kept, as after an edit most
are the same.
"""

from __future__ import annotations

import collections
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench import results
from bench.environment import ROOT, revision, source_hash
from bench.lease import calls, carried

VENV = ROOT / ".cache" / "lease" / "venv"
STUB = ROOT / ".cache" / "lease" / "stub"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
LARGEST = 20e6
#: Results of the device that :mod:`bench.lease.pretend` pretends.
_RESULTS = Path("bench") / "results" / "nvidia-h200"
#: Compiling takes longer than the calls may; so does everything on fewer cores.
_MINUTES_TO_COMPILE = "60"


def python() -> str:
    """One with the GPU machine's software."""
    if given := os.environ.get("LEASE_PYTHON"):
        return given
    made = VENV / "bin" / "python"
    installed = VENV / "installed.txt"
    if not installed.exists() or installed.read_text() != REQUIREMENTS.read_text():
        print("installing the GPU machine's software; PyTorch is large, this takes minutes ...", flush=True)
        base = os.environ.get("LEASE_BASE_PYTHON", "python3.12")
        _succeed(
            [base, "-m", "venv", "--clear", str(VENV)],
            f"{base} makes no venv; the GPU machine's Python, for which launchers are compiled, is 3.12: "
            "LEASE_BASE_PYTHON=/path/to/python3.12 make lease",
        )
        _succeed(
            [str(made), "-m", "pip", "install", "--quiet", "-r", str(REQUIREMENTS)],
            f"pip cannot install {REQUIREMENTS.relative_to(ROOT)}; with a Python that has what is in it: "
            "LEASE_PYTHON=/path/to/python make lease",
        )
        installed.write_text(REQUIREMENTS.read_text())
    return str(made)


def _succeed(command: list[str], otherwise: str) -> None:
    """Run ``command``; if it fails, end with what to do about it, below what it said itself."""
    try:
        failed = subprocess.run(command, check=False).returncode
    except OSError as error:
        print(error, file=sys.stderr)
        failed = 1
    if failed:
        sys.exit(f"bench.lease: {otherwise}")


class Trial:
    """Both calls in a copy of the tracked files, on the stub driver."""

    def __init__(self, python: str, scratch: Path, archive: Path | None) -> None:
        self.tree, self.out, self._log = scratch / "tree", scratch / "out", scratch / "log"
        self._stub_log = scratch / "stub.log"
        self._python = python
        _copy(self.tree)
        # Rows that were measured on the device would be taken for this trial's.
        shutil.rmtree(self.tree / _RESULTS, ignore_errors=True)
        if archive is not None:
            place = self.tree / carried.ARCHIVE.relative_to(ROOT)
            place.parent.mkdir(parents=True)
            shutil.copy(archive, place)
        for path in (self._log, self._stub_log):
            path.touch()
        self.first_result: float | None = None

    def call(self, stage: str, minutes: str = "") -> int:
        """``bash bench/gpu.sh STAGE``; its exit status."""
        begin, over = time.monotonic(), threading.Event()
        watch = threading.Thread(target=self._watch, args=(begin, over))
        watch.start()
        try:
            command = ["bash", "bench/gpu.sh", stage]
            return subprocess.run(command, cwd=self.tree, env=self._environment(minutes), check=False).returncode
        finally:
            over.set()
            watch.join()

    def _watch(self, begin: float, over: threading.Event) -> None:
        while self.first_result is None and not over.wait(0.25):
            if any(each.samples for row in self.rows() for each in row.candidates):
                self.first_result = time.monotonic() - begin

    def rows(self) -> Iterator[results.Row]:
        for _, read in results.read_all([self.tree / _RESULTS]):
            yield from read.rows

    def counts(self) -> collections.Counter:
        """Count the kernels that were found and compiled, and the C files that were compiled."""
        return collections.Counter(line.partition(" ")[0] for line in self._log.read_text().splitlines())

    def compiled(self) -> list[str]:
        return [line for line in self._log.read_text().splitlines() if not line.startswith("hit ")]

    def refusals(self) -> list[str]:
        return [line for line in self._stub_log.read_text().splitlines() if line.startswith("refused")]

    def _environment(self, minutes: str) -> dict[str, str]:
        # Compiled against the headers of that Triton.
        stub = _printed(self._python, f"from bench.lease import stub; print(stub.build(stub.Path({str(STUB)!r})))")
        dropped = ("GPUKERN_EMULATE", "TRITON_INTERPRET", "TRITON_CACHE_DIR", "VIRTUAL_ENV", "GPUKERN_COMMIT")
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        return kept | {
            "PYTHON": self._python,
            "PYTHONPATH": str(self.tree / "bench" / "lease" / "dry"),
            "LEASE_DRY": "1",
            "LEASE_LOG": str(self._log),
            "STUB_LOG": str(self._stub_log),
            "LD_LIBRARY_PATH": stub,
            "TRITON_LIBCUDA_PATH": stub,
            "GPUKERN_COMMIT": revision()[0] or "",
            # Those that come with gpukern, and not those measured on this machine.
            "GPUKERN_PLANS": str(self.tree / "gpukern" / "plans"),
            "OUT": str(self.out),
            "CI": "1",
            **({"MINUTES": minutes} if minutes else {}),
        }


def _printed(python: str, code: str) -> str:
    """Return the last word that ``code`` prints in ``python``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return ran.stdout.split()[-1]


def _copy(tree: Path) -> None:
    """The files that git tracks, and those that it would; as a machine gets them that has no git."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)


def _manifest(python: str, rows: list[str]) -> carried.Carried:
    key = _printed(python, "from bench.lease.carried import triton_key; print(triton_key())")
    kernels = len(list(carried.FOLDER.rglob("*.cubin")))
    return carried.Carried(source_hash(), key, "9.0", kernels, sorted(rows))


def faults(trial: Trial, statuses: dict[str, int], size: int) -> list[str]:
    """Return the faults that must be fixed before a GPU is rented."""
    found = [f"{stage} ended with exit status {status}" for stage, status in statuses.items() if status]
    found += [f"compiled in the second run: {line}" for line in trial.compiled()[:20]]
    found += trial.refusals()[:20]
    # What failed before gpukern came to its end was not compiled either.
    ours = ((row.case.key, row.candidates[0]) for row in trial.rows())
    found += [f"{key}: gpukern {candidate.message}" for key, candidate in ours if candidate.status != "ok"]
    if not trial.counts()["hit"]:
        found.append("no kernel was launched")
    if size > LARGEST:
        old = f"; rm -r {carried.FOLDER} forgets kernels of earlier times"
        found.append(f"the archive has {size / 1e6:.1f} MB, {LARGEST / 1e6:.0f} are allowed{old}")
    if trial.first_result is None or trial.first_result > 60:
        found.append(f"the first measurement was saved after {trial.first_result} s, not within 60")
    return found


def main(given: list[str]) -> int:
    if unknown := set(given) - set(calls.MINUTES):
        print(f"bench.lease: {', '.join(sorted(unknown))}: expected {' or '.join(calls.MINUTES)}", file=sys.stderr)
        return 2
    stages, chosen = given or list(calls.MINUTES), python()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpukern-lease-") as scratch:
        carried.forget(carried.FOLDER)
        first = Trial(chosen, Path(scratch) / "compile", None)
        for stage in stages:
            first.call(stage, _MINUTES_TO_COMPILE)
        rows = [row.case.key for row in first.rows()]
        size = carried.pack(carried.FOLDER, _manifest(chosen, rows), carried.ARCHIVE)
        print(f"\n{len(rows)} rows compiled, {size / 1e6:.1f} MB, {time.monotonic() - begin:.0f} s\n", flush=True)

        shutil.rmtree(carried.FOLDER)
        second = Trial(chosen, Path(scratch) / "try", carried.ARCHIVE)
        statuses = {stage: second.call(stage) for stage in stages}
        found = faults(second, statuses, size)
        counts = second.counts()
    saved, took = second.first_result or float("nan"), time.monotonic() - begin
    print(
        f"\ndry run: {counts['hit']} kernels found, {counts['miss']} compiled, {counts['compiler']} C files compiled;"
    )
    print(f"the first measurement was saved after {saved:.0f} s; {took:.0f} s in all")
    print("\n".join(found) or f"ready: carry {carried.ARCHIVE.relative_to(ROOT)} along (bench/LEASE.md)")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
