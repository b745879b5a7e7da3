"""``python -m bench.calibrate bench/results/DEVICE/COMMIT/plans.json``: fits the expectations to measured plans.

Prints how wrong gpukern's cost model is about each measured plan, and what its choices cost against the
fastest plan of each row, before and after its constants were fitted; and the fitted constants, to be put there.

The fit is of the logarithm of the seconds, by least squares that an outlier does not bend (soft L1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from bench.command import fail
from bench.measured_plans import Measured, read
from bench.results import ResultsError
from gpukern import tables
from gpukern.conv import MEASURED, Constants, ConvPlan, Variant, expected, family_of, only_measured, ranked
from gpukern.formatting import number

#: Beyond these factors of today's value a constant is no longer what its name says.
_LEAST, _MOST = 0.2, 4.0
#: The kernel whose share stays as it is: tiles have shares too, and times determine only the product.
_REFERENCE = Variant.GEMM
#: Where the residuals of the logarithms turn from squares to lengths.
_OUTLIER = 0.15


@dataclass(frozen=True)
class Sample:
    """One measured plan, and what it is expected to take under given constants."""

    plan: ConvPlan
    seconds: float
    expect: Callable[[Constants], float]


@dataclass(frozen=True)
class Quality:
    """``error``: the root mean square of log(expected / measured); ``regret``: of each row's choice, its time by the
    best's, the mean over rows and the worst."""

    error: float
    regret: float
    worst: float


def samples_of(row: Measured) -> list[Sample]:
    return [Sample(plan, seconds, _expectation(row, plan)) for plan, seconds in row.seconds.items()]


def _expectation(row: Measured, plan: ConvPlan) -> Callable[[Constants], float]:
    tiles = family_of(plan).tiles(row.problem, row.direction, plan)
    bound = ranked(row.problem, row.direction, plan, row.operands, row.device).cost
    return lambda constants: expected(
        row.problem, row.direction, plan, tiles, row.operands, row.device, bound, constants
    )


def quality(rows: Sequence[Sequence[Sample]], constants: Constants) -> Quality:
    """Return the quality of ``constants``; plans that are chosen only after a measurement are left out."""
    errors, regrets = [], []
    for row in rows:
        guesses = {sample.plan: sample.expect(constants) for sample in row}
        errors += [math.log(guesses[sample.plan] / sample.seconds) for sample in row]
        free = [sample for sample in row if not only_measured(sample.plan)]
        if free:
            chosen = min(free, key=lambda sample: guesses[sample.plan])
            regrets.append(chosen.seconds / min(sample.seconds for sample in free))
    return Quality(math.sqrt(np.mean(np.square(errors))), float(np.mean(regrets)), max(regrets))


def fit(rows: Sequence[Sequence[Sample]], start: Constants) -> Constants:
    """Return the constants that bring the expectations closest to ``rows``; those that no row determines stay."""
    from scipy.optimize import least_squares

    samples = [sample for row in rows for sample in row]

    def residuals(factors: Sequence[float], names: Sequence[Name]) -> np.ndarray:
        constants = _scaled(start, names, factors)
        return np.array([math.log(sample.expect(constants) / sample.seconds) for sample in samples])

    before = residuals((), ())
    names = [name for name in _names(start) if np.any(residuals((1.1,), (name,)) != before)]
    # A share of what there is stays below 1.
    shares = {name: max(1.0 / getattr(start, name), 1.0 + 1e-9) for name in ("memory", "overlap", "halved")}
    bounds = _LEAST, [shares.get(field, _MOST) for field, _ in names]
    start_at = np.ones(len(names))
    found = least_squares(residuals, start_at, args=(names,), bounds=bounds, loss="soft_l1", f_scale=_OUTLIER)
    return _scaled(start, names, found.x)


#: A field of :class:`Constants`, with a key where it holds a mapping.
Name = tuple[str, object]


def _names(constants: Constants) -> list[Name]:
    """Names of all constants but one of two of which only the product is determined: see :data:`_REFERENCE`."""
    values = {field.name: getattr(constants, field.name) for field in fields(constants)}
    names = [(name, key) for name, value in values.items() for key in (value if isinstance(value, dict) else [None])]
    return [name for name in names if name != ("kernels", _REFERENCE)]


def _scaled(start: Constants, names: Sequence[Name], factors: Iterable[float]) -> Constants:
    changed: dict[str, Any] = {}
    for (field, key), factor in zip(names, factors, strict=True):
        if key is None:
            changed[field] = getattr(start, field) * float(factor)
        else:
            mapping = changed.setdefault(field, dict(getattr(start, field)))
            mapping[key] *= float(factor)
    return replace(start, **changed)


def main(files: Annotated[list[Path], typer.Argument(metavar="plans.json")]) -> None:
    """Fit the expectations to measured plans, and say how good they are before and after."""
    try:
        rows = [samples_of(row) for path in files for row in read(path)]
    except (ResultsError, OSError) as error:
        fail(error)
    console = Console()
    with Console(stderr=True).status("fitting"):
        fitted = fit(rows, MEASURED)
    table = tables.table("constants", *tables.numbers("error of log(seconds)", "chosen / fastest, mean", "worst"))
    for name, constants in (("today's", MEASURED), ("fitted", fitted)):
        found = quality(rows, constants)
        table.add_row(name, number(found.error), number(found.regret), number(found.worst))
    console.print(f"{sum(map(len, rows)):,} plans of {len(rows)} rows")
    console.print(table)
    for field in fields(fitted):
        value = getattr(fitted, field.name)
        shown = {key: round(share, 3) for key, share in value.items()} if isinstance(value, dict) else f"{value:.3g}"
        console.print(f"{field.name} = {shown}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
