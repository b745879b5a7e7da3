"""``python -m bench.bundle_plans bench/results/DEVICE/COMMIT/plans.json``: measured plans that come with gpukern.

Of each row the fastest plan that the kernels offer goes into ``gpukern/plans/DEVICE.json``, in place of what was there
for the same problem; the planner's own choice, unless another is faster by more than the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bench.command import fail
from bench.measured_plans import Measured, read
from bench.results import ResultsError
from gpukern.conv import candidates, database, heuristic_plan
from gpukern.tune.measurement import GAIN


def entry(row: Measured) -> database.Entry:
    """Return the plan database's entry for ``row``; ValueError if no measured plan is still offered."""
    offered = set(candidates(row.problem, row.direction, row.operands, row.device))
    seconds = {choice: taken for choice, taken in row.seconds.items() if choice in offered}
    if not seconds:
        raise ValueError(f"none of the plans that were measured is offered: {row.row.case.problem}")
    heuristic = heuristic_plan(row.problem, row.direction, row.operands, row.device)
    planned = seconds.get(heuristic)
    best = min(seconds, key=seconds.__getitem__)
    if planned is not None and planned <= GAIN * seconds[best]:
        best = heuristic
    made = row.environment
    versions = {"gpukern": made.gpukern, "torch": made.torch, "triton": made.triton, "driver": made.driver}
    return database.Entry(
        plan=best,
        microseconds=_microseconds(seconds[best]),
        heuristic=heuristic,
        heuristic_microseconds=None if planned is None else _microseconds(planned),
        batch=row.problem.N,
        rejected=(),
        versions=versions,
        date=made.date[:10],
    )


def bundle(rows: Sequence[Measured], folder: Path = database.BUNDLED) -> Path:
    """Write ``rows`` of one device; the file's path."""
    device = rows[0].environment.device
    path = folder / database.file_name(device)
    for row in rows:
        database.store(path, device, database.key(row.problem, row.direction, row.operands), entry(row))
    path.with_name(f".{path.name}.lock").unlink(missing_ok=True)  # a checkout has no other writer
    return path


def _microseconds(seconds: float) -> float:
    return round(1e6 * seconds, 3)


def main(files: Annotated[list[Path], typer.Argument(metavar="plans.json")]) -> None:
    """Put the fastest plans of results files among those that come with gpukern."""
    try:
        for file in files:
            rows = read(file)
            path = bundle(rows)
            faster = sum(entry(row).plan != entry(row).heuristic for row in rows)
            print(f"{len(rows)} plans into {path.name}, {faster} of them not the planner's choice")
    except (ResultsError, ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    typer.run(main)
