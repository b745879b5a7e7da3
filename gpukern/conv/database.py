"""The plan database: plans measured to be the fastest, which override the planner's. Imports neither torch nor Triton.

One JSON file per device, written by ``gpukern tune``, in three folders; the first that has the problem wins:
``$GPUKERN_PLANS``, the user's cache (``~/.cache/gpukern/plans``), and the plans shipped with gpukern. An empty
``GPUKERN_PLANS`` switches the database off.

A file is read once. A broken file never fails the caller: one that cannot be parsed is skipped with a warning, a plan
that the kernels of this version do not offer is skipped silently.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpukern.conv.plan import ConvPlan, Direction, Operands
from gpukern.conv.planner import candidates
from gpukern.conv.problem import ConvProblem
from gpukern.runtime.cache import cache_folder
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.files import write_text
from gpukern.runtime.records import build, plain

#: Version of the file format. Files of other versions are left alone.
SCHEMA = 1

BUNDLED = Path(__file__).resolve().parents[1] / "plans"


@dataclass(frozen=True)
class Entry:
    """The measurements of one problem, in µs. ``plan`` is None while no candidate was found to be right.

    ``heuristic`` is the planner's choice, ``rejected`` are pairs of a plan and the reason why it was not timed.
    """

    plan: ConvPlan | None
    microseconds: float | None
    heuristic: ConvPlan
    heuristic_microseconds: float | None
    batch: int
    rejected: tuple[tuple[ConvPlan, str], ...]
    versions: Mapping[str, str | None]
    date: str


# ---- looking up ----------------------------------------------------------------------------------------------------


def lookup(problem: ConvProblem, direction: Direction, operands: Operands, device: DeviceSpec) -> ConvPlan | None:
    """Return the plan measured for ``problem`` at any batch size in its bucket; None if there is none that fits."""
    if not problem.N:
        return None
    for folder in folders():
        stored = _read_once(folder / file_name(device.name)).get(key(problem, direction, operands))
        plan = _plan_of(stored["plan"]) if isinstance(stored, dict) and "plan" in stored else None
        if plan and (offered := _offered(plan, problem, direction, operands, device)):
            return offered
    return None


def clear() -> None:
    """Drop the files' cached contents: the next look-up reads them again."""
    _read_once.cache_clear()


def key(problem: ConvProblem, direction: Direction, operands: Operands) -> str:
    """Everything a plan depends on besides the device, with the batch size replaced by its bucket."""
    p, o = problem, operands
    geometry = (
        f"stride {_by(p.stride)} padding {','.join(map(str, p.padding))} dilation {_by(p.dilation)} groups {p.groups}"
    )
    sizes = f"{_by((bucket(p.N), p.C, p.H, p.W))} {_by((p.K, p.R, p.S))}"
    geometry += " max pool 2x2" * p.pool
    layouts = f"{o.first.value} * {o.second.value} -> {o.output.value}"
    return f"{direction.value}: {sizes} {geometry}; {o.types} {o.precision}; {layouts}"


def bucket(batch: int) -> int:
    """Return the power of two nearest to ``batch`` in ratio: 22 goes to 16, 23 to 32."""
    below = 1 << (batch.bit_length() - 1)
    # √2 is irrational: no batch lies in the middle.
    return below if batch * batch < 2 * below * below else 2 * below


def _offered(
    plan: ConvPlan, problem: ConvProblem, direction: Direction, operands: Operands, device: DeviceSpec
) -> ConvPlan | None:
    """Return ``plan`` as the kernels offer it for this very problem, so that no file can launch an unsupported plan.

    The split counts and boxes that are candidates depend on the batch size: within a bucket the nearest ones replace
    those that were measured.
    """
    offered = candidates(problem, direction, operands, device)
    alike = [each for each in offered if replace(each, splits=plan.splits, box=plan.box) == plan]
    return min(alike, key=lambda each: _distance(each, plan), default=None)


def _distance(plan: ConvPlan, other: ConvPlan) -> tuple[bool, float, bool]:
    same_pixels = (plan.box or ())[1:] == (other.box or ())[1:]
    return not same_pixels, abs(math.log2(plan.splits / other.splits)), plan.box != other.box


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


# ---- files ---------------------------------------------------------------------------------------------------------


def folders() -> tuple[Path, ...]:
    """Folders searched for plans, in order of precedence."""
    chosen = os.environ.get("GPUKERN_PLANS")
    if chosen == "":
        return ()
    return (*((Path(chosen),) if chosen else ()), user_folder(), BUNDLED)


def user_folder() -> Path:
    """Folder to which ``gpukern tune`` writes its plans."""
    return cache_folder() / "plans"


def file_name(device: str) -> str:
    """File name of a device's plans: "NVIDIA H100 80GB HBM3" has nvidia-h100-80gb-hbm3.json."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


@functools.cache
def _read_once(path: Path) -> Mapping[str, Any]:
    try:
        return _plans_in(path)
    except (OSError, ValueError) as problem:
        warnings.warn(f"gpukern leaves out measured plans: {problem}", stacklevel=2)
        return {}


def _plans_in(path: Path) -> dict[str, Any]:
    """Key → entry, as stored in the file; empty if there is no file. OSError or ValueError if it is not ours."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{path} is not JSON: {problem}") from None
    if not isinstance(content, dict) or not isinstance(content.get("plans"), dict):
        raise ValueError(f"{path} is no file of measured plans")
    if content.get("schema") != SCHEMA:
        schema = content.get("schema")
        raise ValueError(f"{path} has the schema {schema!r}, this version of gpukern knows {SCHEMA}")
    return content["plans"]


def read(path: Path) -> dict[str, Entry]:
    """Return a file's current entries that this version supports. OSError or ValueError as :func:`store`."""
    entries = ((name, _entry_of(stored)) for name, stored in _plans_in(path).items())
    return {name: entry for name, entry in entries if entry}


def store(path: Path, device: str, name: str, entry: Entry) -> None:
    """Store ``entry`` in the file under the key ``name``, keeping what other processes stored there meanwhile.

    A reader sees the file before or the file after. OSError or ValueError, with the file left as it was, if it cannot
    be written or is not ours to add to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        plans = {**_plans_in(path), name: _json_of(entry)}
        # A line for each problem, in order, so that two versions of a file can be compared.
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(plans[name])}" for name in sorted(plans))
        device = json.dumps(device)
        write_text(path, f'{{\n "schema": {SCHEMA},\n "device": {device},\n "plans": {{\n{lines}\n }}\n}}\n')
    clear()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Admit one process at a time. Never delete the lock file: another process may be waiting on it."""
    import fcntl  # not on Windows, where plans are read all the same

    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ---- JSON ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Timed:
    plan: ConvPlan
    microseconds: float | None


@dataclass(frozen=True)
class _Rejected:
    plan: ConvPlan
    reason: str


@dataclass(frozen=True)
class _Stored:
    """An :class:`Entry` as it is stored in files."""

    plan: ConvPlan | None
    microseconds: float | None
    heuristic: _Timed
    batch: int
    rejected: tuple[_Rejected, ...]
    versions: Mapping[str, str | None]
    date: str


def _json_of(entry: Entry) -> dict[str, Any]:
    heuristic = _Timed(entry.heuristic, entry.heuristic_microseconds)
    rejected = tuple(_Rejected(plan, reason) for plan, reason in entry.rejected)
    return plain(_Stored(entry.plan, entry.microseconds, heuristic, entry.batch, rejected, entry.versions, entry.date))


def _entry_of(stored: Any) -> Entry | None:
    """Decode an entry; None if this version does not support it. Of unsupported plans, only the planner's is needed."""
    try:
        plan = stored["plan"] if _plan_of(stored["plan"]) else None
        rejected = [each for each in stored["rejected"] if _plan_of(each["plan"])]
        s = build(_Stored, {**stored, "plan": plan, "rejected": rejected}, "the entry", ignore_unknown=True)
    except (KeyError, TypeError, ValueError):
        return None
    pairs = tuple((each.plan, each.reason) for each in s.rejected)
    return Entry(s.plan, s.microseconds, s.heuristic.plan, s.heuristic.microseconds, s.batch, pairs, s.versions, s.date)


def _plan_of(stored: Any) -> ConvPlan | None:
    """Decode a plan; None if this version does not support it."""
    try:
        plan = build(ConvPlan, stored, "the plan")
    except ValueError:
        return None
    # Other values need no check: a plan is used only if a kernel offers one like it.
    return plan if plan.splits > 0 else None
