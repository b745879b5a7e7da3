"""Whether every kernel is right on this GPU, before anything is timed: ``python -m bench.smoke KIND --out FILE``.

A line of JSON a case, on disk as soon as it is known. A case that hangs or breaks the device ends the process, with
exit status 75; the next run leaves it out, says so, and goes on behind it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.accuracy import relative_error
from bench.attempt import UNFINISHED, Attempt, Attempts
from bench.smoke_cases import KINDS, Case
from gpukern.tune.measurement import is_lost

_PATIENCE = 60.0


def run(cases: Iterable[Case], device: torch.device, path: Path, until: float = float("inf")) -> tuple[int, list[dict]]:
    """Try ``cases`` that ``path`` has not yet; the exit status and all lines of the file."""
    attempts = Attempts(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    with path.open("a") as file, attempts.going_on():

        def keep(line: dict) -> None:
            lines.append(line)
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            if not line["ok"]:
                print(f"{line['case']}: {line['message'] or line['errors']}", flush=True)

        if hung := attempts.left():
            keep({"case": hung.name, "ok": False, "errors": [], "message": "it hung, or ended the process"})
        known = {line["case"] for line in lines}
        for case in cases:
            if case.name in known:
                continue
            known.add(case.name)
            if time.monotonic() >= until:
                return UNFINISHED, lines
            attempts.begin(Attempt(path.stem, case.name, ""), _PATIENCE)
            keep(_tried(case, device))
            if is_lost(device):
                print("the device was lost; a new process can go on", flush=True)
                return UNFINISHED, lines
    return (0 if all(line["ok"] for line in lines) else 1), lines


def _tried(case: Case, device: torch.device) -> dict[str, Any]:
    begin, errors, message, ok = time.monotonic(), [], "", True
    try:
        for each in case.run(device):
            error = relative_error(each.actual, each.expected)
            ok = ok and error <= each.bound
            errors.append(error if error < float("inf") else None)  # JSON has no infinity
    except Exception as problem:
        ok, message = False, f"{type(problem).__name__}: {str(problem).strip()[:400]}"
    seconds = round(time.monotonic() - begin, 3)
    return {"case": case.name, "ok": ok, "errors": errors, "message": message, "seconds": seconds}


def main(
    kind: Annotated[str, typer.Argument(help=", ".join(KINDS))],
    out: Annotated[Path, typer.Option(help="A line of JSON a case; what it has is not tried again.")],
    minutes: Annotated[float, typer.Option(help=f"Stop after them, with exit status {UNFINISHED}.")] = float("inf"),
    first: Annotated[int, typer.Option(help="Only so many.")] = 10**9,
) -> None:
    """Try every case of one kind."""
    if kind not in KINDS:
        raise typer.BadParameter(f"{kind}: expected one of {', '.join(KINDS)}")
    if not torch.cuda.is_available():
        typer.echo("bench.smoke: no CUDA device here", err=True)
        raise typer.Exit(1)
    device = torch.device("cuda")
    chosen = list(KINDS[kind](device))[:first]
    status, lines = run(chosen, device, out, time.monotonic() + 60 * minutes)
    bad = sum(not line["ok"] for line in lines)
    typer.echo(f"{kind}: {len(lines)} of {len(chosen)} tried, {bad} bad")
    raise typer.Exit(status)


if __name__ == "__main__":
    typer.run(main)
