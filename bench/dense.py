"""``python -m bench.dense``: a classifier of patches run patch by patch, and made dense, in one run on a CPU.

Ciresan's network N4 says of every pixel of an image whether it is a membrane, from the 95 × 95 pixels around it.
Patches in batches of several sizes take turns with what ``gpukern.dense`` makes of the network, and with the same
network written out on torch's layers. Results are compared at random pixels, in float32 and in float64.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress

import gpukern
from bench import stats
from bench.environment import environment
from bench.results import write_text
from gpukern import tables
from gpukern.formatting import count, number, ratio
from gpukern.runtime.records import plain
from models.ciresan import CiresanN4, DenseCiresanN4

#: Pixels at which results are compared.
COMPARED = 200


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of classifying pixels. ``seconds``: of each round, for ``pixels``."""

    name: str
    pixels: int
    seconds: list[float]
    #: Multiply-adds of one pixel.
    work: float

    @property
    def of_a_pixel(self) -> list[float]:
        return [seconds / self.pixels for seconds in self.seconds]


def patches(padded: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[n, 1, 95, 95]: around pixels of an image that was padded by a patch's margin."""
    windows = padded.unfold(2, CiresanN4.PATCH, 1).unfold(3, CiresanN4.PATCH, 1)
    return windows[0, 0, rows, columns].unsqueeze(1)


def candidates(image: torch.Tensor, batches: list[int], batches_a_round: int) -> tuple[list[Row], list[Callable]]:
    """Rows without times, and what to time for each: patches in batches, dense, written out on torch's layers."""
    torch.manual_seed(0)
    network = CiresanN4().eval()
    dense, written = gpukern.dense(network, CiresanN4.PATCH), DenseCiresanN4().eval()
    written.load_state_dict(
        {name: w.reshape(written.state_dict()[name].shape) for name, w in network.state_dict().items()}
    )
    padded = torch.nn.functional.pad(image, (CiresanN4.MARGIN,) * 4, mode="reflect")
    size = tuple(image.shape[2:])
    work = dense.report.multiply_adds(tuple(padded.shape[2:]))
    pixels, rows, calls = size[0] * size[1], [], []
    for batch in batches:
        number_of = batch * batches_a_round
        places = [torch.randint(side, (number_of,)) for side in size]
        chosen = patches(padded, *places).split(batch)
        rows.append(Row(f"patches, {batch} at once", number_of, [], work.patchwise / pixels))
        calls.append(lambda chosen=chosen: [network(each) for each in chosen])
    for name, made in (("gpukern.dense", dense), ("the same on torch's layers", written)):
        rows.append(Row(name, pixels, [], work.dense / pixels))
        calls.append(lambda made=made: made(padded))
    return rows, calls


def differences(image: torch.Tensor) -> dict[str, float]:
    """The largest difference of probabilities at random pixels, dense to patchwise, by dtype."""
    torch.manual_seed(0)
    network = CiresanN4().eval()
    padded = torch.nn.functional.pad(image, (CiresanN4.MARGIN,) * 4, mode="reflect")
    places = [torch.randint(side, (COMPARED,)) for side in image.shape[2:]]
    found = {}
    for dtype in (torch.float32, torch.float64):
        classifier = copy.deepcopy(network).to(dtype)
        whole = gpukern.dense(classifier, CiresanN4.PATCH)(padded.to(dtype)).softmax(1)
        alone = classifier(patches(padded.to(dtype), *places)).softmax(1)
        found[str(dtype).removeprefix("torch.")] = (whole[0, :, places[0], places[1]].T - alone).abs().max().item()
    return found


def measure(rows: list[Row], calls: list[Callable], rounds: int) -> None:
    """Time every call once a round, in another order each time, after one that is not timed."""
    shuffle = np.random.default_rng(0)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("measuring", total=(rounds + 1) * len(calls))
        for turn in range(rounds + 1):
            for place in shuffle.permutation(len(calls)):
                begin = time.perf_counter()
                calls[place]()
                if turn:
                    rows[place].seconds.append(time.perf_counter() - begin)
                progress.advance(bar)


def show(rows: list[Row], size: int, found: dict[str, float]) -> None:
    """The table, and what dense is beside the fastest of the patches."""
    best = min(
        (row for row in rows if row.name.startswith("patches")), key=lambda row: stats.spread(row.of_a_pixel).median
    )
    dense = next(row for row in rows if row.name == "gpukern.dense")
    threads = count(torch.get_num_threads(), "thread")
    columns = tables.numbers("µs a pixel", "pixels/s", "multiply-adds a pixel", "times faster")
    table = tables.table("Ciresan's N4", *columns, title=f"{size} × {size} pixels, {threads}")
    for row in rows:
        median = stats.spread(row.of_a_pixel).median
        gain = stats.ratio(row.of_a_pixel, best.of_a_pixel).median
        table.add_row(row.name, number(median * 1e6), number(1 / median), f"{row.work:,.0f}", ratio(gain))
    tables.show(table)
    faster = stats.ratio(dense.of_a_pixel, best.of_a_pixel)
    print(f"dense: {number(best.work / dense.work)} × fewer multiply-adds, {number(faster.median)} × faster "
          f"({number(faster.low)} to {number(faster.high)}) than the fastest batches of patches")  # fmt: skip
    apart = ", ".join(f"{difference:.1e} in {dtype}" for dtype, difference in found.items())
    print(f"largest difference of the probabilities at {COMPARED} random pixels: {apart}")


def main(
    size: Annotated[int, typer.Option(min=48, help="Side of the image.")] = 512,
    batches: Annotated[list[int], typer.Option("--batch", min=1, help="Patches at once; repeatable.")] = [1, 16, 128],  # noqa: B006
    batches_a_round: Annotated[int, typer.Option(min=1, help="Batches that are timed together.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each is measured.")] = 7,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the numbers there.")] = None,
) -> None:
    """Measure Ciresan's N4 patch by patch and as a dense network, on this machine's CPU, and compare the results."""
    torch.manual_seed(1)
    image = torch.randn(1, 1, size, size)
    with torch.inference_mode():
        rows, calls = candidates(image, batches, batches_a_round)
        found = differences(image)
        measure(rows, calls, rounds)
    show(rows, size, found)
    if out is not None:
        written = {
            "environment": plain(environment(torch.device("cpu"))),
            "size": size,
            "threads": torch.get_num_threads(),
            "differences": found,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        write_text(out, json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
