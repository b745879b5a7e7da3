"""Results of a run: a JSON file of measured rows.

``schema.json`` beside this file describes it for other programs. Every figure that this project publishes is computed
from such files.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gpukern.runtime import files
from gpukern.runtime.records import RecordError, build, plain

#: Raised by one whenever a reader of the old form would misread the new one.
SCHEMA = 1

Status = Literal["ok", "wrong", "failed", "missing"]


class ResultsError(Exception):
    """A file is not a results file, or not of a form that this version reads."""


@dataclass(frozen=True)
class Environment:
    """Machine and software of a run. ``source`` is a hash of gpukern's code: equal means the same kernels."""

    device: str
    device_type: Literal["cuda", "cpu"]
    python: str
    torch: str
    triton: str | None
    gpukern: str
    source: str
    commit: str | None
    #: Whether files differed from the commit.
    modified: bool
    #: UTC, ISO 8601.
    date: str
    platform: str
    compute_capability: str | None = None
    sm_count: int | None = None
    #: Bytes.
    l2_cache: int | None = None
    memory: int | None = None
    driver: str | None = None
    cuda: str | None = None
    cudnn: str | None = None
    #: torch's settings during the run: "cudnn.benchmark", ...
    flags: dict[str, Any] = field(default_factory=dict)

    def same_setup(self, other: Environment) -> list[str]:
        """The names of what differs, but for the date, where the rows of both could not stand in one table."""
        free = {"date", "commit", "modified"}
        return [
            f.name
            for f in dataclasses.fields(self)
            if f.name not in free and getattr(self, f.name) != getattr(other, f.name)
        ]


@dataclass(frozen=True)
class Ceilings:
    """Peak rates of the device, measured in the same run: a large copy and large matrix products."""

    #: Bytes read plus bytes written, per second.
    bandwidth: float
    #: FLOP/s by kind: "float16", "bfloat16", "tf32", "float32".
    matrix_rates: dict[str, float]


@dataclass(frozen=True)
class Use:
    """Use of this problem in a network: ``count`` layers, the first of which is ``layer``."""

    network: str
    layer: str
    count: int


@dataclass(frozen=True)
class Case:
    """A computation and its tensors. It contains everything that determines the time."""

    suite: str
    #: "forward", "input gradient", "weight gradient", "training step", "inference", ...
    computation: str
    #: The sizes in words, such as "32×64×56×56, 64×3×3, padding 1".
    problem: str
    #: The same sizes by name.
    sizes: dict[str, Any]
    batch: int
    #: "float16", "bfloat16", "tf32" (float32 tensors, TF32 allowed) or "float32" (TF32 off).
    dtype: str
    #: "channels_last", "NCHW", or "" where it means nothing.
    layout: str
    uses: tuple[Use, ...]

    @property
    def key(self) -> str:
        """Equal for the same computation, in whichever run and network."""
        return "/".join((self.suite, self.computation, self.dtype, self.layout, self.problem))


@dataclass(frozen=True)
class Candidate:
    """One implementation on one row. The first candidate of a row is gpukern."""

    name: str
    #: What exactly ran: "channels_last, cudnn.benchmark=True", ...
    setting: str
    status: Status
    #: Why it is not ok.
    message: str = ""
    #: Relative Frobenius norm of the difference from the reference; None if it did not get so far.
    error: float | None = None
    #: Microseconds a call, by way of timing: "graph" (CUDA graph, the device's time), "eager" (CUDA events around
    #: calls from Python, launch gaps included) or "wall" (CPU). One sample a round; rounds are interleaved, so that the
    #: same index of two candidates was measured side by side.
    samples: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A case and how each candidate did. ``flops`` and ``bytes`` are what any implementation must do and move."""

    case: Case
    flops: float
    bytes: float
    #: Key of :attr:`Ceilings.matrix_rates`: the rate that bounds it.
    kind: str
    #: A result is right up to this error.
    bound: float
    #: How many sets of tensors the calls rotated through, and the bytes of all: far more than the L2 cache is cold.
    sets: int
    footprint: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Results:
    environment: Environment
    ceilings: Ceilings
    #: How it was measured, for the reader.
    method: dict[str, Any]
    rows: tuple[Row, ...]

    #: What the file says that it holds: predictions, which other versions wrote, may never join measured rows.
    file_kind: typing.ClassVar[str] = "measured"


# ---- files ---------------------------------------------------------------------------------------------------------


def write(path: Path, results: Results) -> None:
    """Replace ``path`` as :func:`write_text` does."""
    header = {"schema": SCHEMA, "kind": results.file_kind}
    header |= {f.name: plain(getattr(results, f.name)) for f in dataclasses.fields(results) if f.name != "rows"}
    # A row a line: short files, and a diff that shows which rows changed.
    rows = ",\n".join(json.dumps(plain(row), ensure_ascii=False, allow_nan=False) for row in results.rows)
    text = (
        json.dumps(header, indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
        + f',\n "rows": [\n{rows}\n ]\n}}\n'
    )
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` in one step, making its folder: whatever happens, the old or the new file is there, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text)


def read(path: Path) -> Results:
    """The file's contents, checked. :class:`ResultsError` names what is wrong with it; OSError as usual."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path}: not JSON ({error})") from None
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if not isinstance(schema, int):
        raise ResultsError(f"{path}: no results file of this benchmark (it has no schema number)")
    if schema != SCHEMA:
        age = "an older" if schema < SCHEMA else "a newer"
        raise ResultsError(f"{path}: schema {schema}, from {age} version of the benchmark; this one reads {SCHEMA}")
    if raw.get("kind") != Results.file_kind:
        raise ResultsError(f"{path}: kind {raw.get('kind')!r}: nothing was measured (gpukern explain network predicts)")
    try:
        return build(Results, {name: value for name, value in raw.items() if name not in ("schema", "kind")}, str(path))
    except RecordError as error:
        raise ResultsError(str(error)) from None


def read_all(
    paths: Iterable[Path], on_skipped: Callable[[str], None] = lambda message: None
) -> Iterator[tuple[Path, Results]]:
    """Every results file among ``paths`` and below them; ``on_skipped`` gets a message for each other file."""
    for path in paths:
        for candidate in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            try:
                yield candidate, read(candidate)
            except (ResultsError, OSError) as error:
                on_skipped(str(error))
