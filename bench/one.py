"""Runs gpukern on one row of a results file, a few times, for a profiler: ``python -m bench.one FILE KEY``."""

from __future__ import annotations

from pathlib import Path

import torch
import typer

from bench import command, results
from bench.peers import torch_at_its_best
from bench.results import Case, ResultsError
from bench.suite import Selection, Suite, Task, suites, tasks


def find(path: Path, key: str) -> tuple[Suite, Task]:
    """The suite and task of the row; ValueError if there is none."""
    case = next((row.case for row in results.read(path).rows if row.case.key == key), None)
    if case is None:
        raise ValueError(f"{path} has no row {key}")
    suite = suites().get(case.suite)
    task = None if suite is None else _task(suite, case)
    if suite is None or task is None:
        raise ValueError(f"{path}: this version of the benchmark has no row {key}")
    return suite, task


def _task(suite: Suite, case: Case) -> Task | None:
    if not case.uses:
        return None
    selection = Selection(
        networks=(case.uses[0].network,),
        batches=(case.batch,),
        dtypes=(case.dtype,),
        layouts=(case.layout,),
        computations=(case.computation,),
    )
    return next((task for task in tasks(suite, selection) if task.case.key == case.key), None)


def main(path: Path, key: str, calls: int = 3, cpu: bool = False) -> None:
    try:
        suite, task = find(path, key)
    except (ValueError, ResultsError, OSError) as error:
        command.fail(error)
    if not (cpu or torch.cuda.is_available()):
        command.fail("no CUDA device here; --cpu runs the row on the CPU")
    device = torch.device("cpu" if cpu else "cuda")
    with torch_at_its_best(task.case.dtype):
        tensors = suite.tensors(task, device)
        ours = suite.implementations(task, (), device)[0]
        prepared = ours.prepare(tensors)
        for _ in range(calls):
            output = ours.function(*prepared)
    norm = torch.linalg.vector_norm(suite.result(output).float()).item()
    typer.echo(f"{key}: {calls} calls, norm of the result {norm:.6g}")


if __name__ == "__main__":
    typer.run(main)
