"""``python -m bench.quantization``: fused networks in fp32, 16 and 8 bits side by side, without a GPU.

``bytes``: launches, bytes and the roofline of networks with random weights, every possible group in 8 bits.
``accuracy``: how often trained networks are right; what is not trained yet is trained first, minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

import gpukern
from bench.environment import environment
from bench.quantization.accuracy import Accuracy, measure
from bench.quantization.cases import CASES
from bench.quantization.count import Count, count
from bench.results import write_text
from gpukern import formatting, tables
from gpukern.formatting import percent, ratio, size
from gpukern.runtime.device import DeviceSpec, named_device
from gpukern.runtime.records import plain
from models.zoo import network

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_lite0", "unet")
FORMATS = ("int8", "fp8")

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)


@app.command("bytes")
def count_bytes(
    names: Annotated[list[str], typer.Option("--network", help="Of models/zoo.py; repeatable.")] = list(NETWORKS),  # noqa: B006
    batch: Annotated[int, typer.Option(min=1, help="Images of a forward pass.")] = 32,
    device: Annotated[str, typer.Option(help="Whose roofline.")] = "h200",
    dtype: Annotated[str, typer.Option(help="int8 or fp8.")] = "int8",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a table of Markdown.")] = False,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the numbers there.")] = None,
) -> None:
    """What a forward pass launches and moves, and the images a second that no implementation can beat."""
    try:
        spec = named_device(device)
    except ValueError as problem:
        raise typer.BadParameter(str(problem), param_hint="--device") from None
    found = {name: counted(name, batch, spec, _format(dtype)) for name in _shown(names)}
    rows = [_row(name, batch, counts) for name, counts in found.items()]
    _print(_COLUMNS, rows, f"{spec.name}, batch {batch}", markdown)
    counted_rows = [
        {"network": name, "batch": batch, **{kind: each._asdict() for kind, each in counts.items()}}
        for name, counts in found.items()
    ]
    _write(out, counted_rows)


_COLUMNS = ("network", "launches", "conversions", "fp32", "fp16", "8 bits", "8 : 16", "images/s fp16", "8 bits", "×")


def counted(name: str, batch: int, device: DeviceSpec, dtype: str) -> dict[str, Count]:
    """The counts in float32, float16 and ``dtype``, of random weights."""
    found = network(name)
    torch.manual_seed(0)
    model, image = found.make().eval(), torch.randn(1, *found.input_size)
    shape = batch, *found.input_size
    kinds = {"float32": torch.float32, "float16": torch.float16}
    fused = {kind: gpukern.fuse(model, image, dtype=each, verify=False) for kind, each in kinds.items()}
    fused[dtype] = gpukern.fuse(model, image, dtype=dtype, calibrate=[image], calibration="max", verify=False)
    return {kind: count(each.module, shape, device) for kind, each in fused.items()}


def _row(name: str, batch: int, counts: dict[str, Count]) -> list[str]:
    full, half, eight = counts.values()
    launches = "/".join(str(each.launches) for each in counts.values())
    speeds = [formatting.number(batch / each.seconds) for each in (half, eight)]
    return [
        network(name).title, launches, str(eight.conversions), *(size(each.bytes) for each in (full, half, eight)),
        f"{eight.bytes / half.bytes:.3f}", *speeds, ratio(half.seconds / eight.seconds),
    ]  # fmt: skip


@app.command()
def accuracy(
    names: Annotated[list[str], typer.Option("--network", help=f"{', '.join(CASES)}; repeatable.")] = list(CASES),  # noqa: B006
    dtypes: Annotated[list[str], typer.Option("--dtype", help="int8 or fp8; repeatable.")] = ["int8"],  # noqa: B006
    target: Annotated[float, typer.Option(min=0, max=1, help="Agreement on images kept aside.")] = 0.99,
    runs: Annotated[Path, typer.Option(help="Where trained networks are kept.")] = Path("runs/quantization"),
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a table of Markdown.")] = False,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the numbers there.")] = None,
) -> None:
    """How often trained networks are right on held-out images, and which groups were given back to 16 bits."""
    found: list[Accuracy] = []
    for name in _shown(names):
        if name not in CASES:
            raise typer.BadParameter(f"{name} is none of {', '.join(CASES)}", param_hint="--network")
        try:
            case = CASES[name](runs, Console(stderr=True))
        except (OSError, RuntimeError, ValueError) as problem:  # data or packages that are missing, by their names
            typer.echo(f"bench.quantization: {problem}", err=True)
            raise typer.Exit(1) from None
        found += [measure(case, _format(dtype), target) for dtype in dtypes]
    _print(_MEASURED, map(_measured, found), f"target {target:g}", markdown)
    for each in found:
        back = ", ".join(each.given_back) or "none"
        print(f"{each.title}, {each.dtype}: given back to 16 bits: {back}")
    _write(out, [dataclasses.asdict(each) for each in found])


_MEASURED = ("network", "dtype", "images", "of", "fp32", "fp16", "8 bits", "groups in 16 bits", "bytes 8 : 16")


def _measured(each: Accuracy) -> list[str]:
    shares = [percent(share, 2) for share in (each.full, each.half, each.eight)]
    of = "labels" if each.of_labels else "fp32's classes"
    in_sixteen = f"{each.sixteen} of {each.groups}"
    moved = f"{each.bytes / each.bytes_half:.3f}"
    return [each.title, each.dtype, formatting.tick(each.images), of, *shares, in_sixteen, moved]


def _format(name: str) -> str:
    if name not in FORMATS:
        raise typer.BadParameter(f"{name!r} is neither int8 nor fp8", param_hint="--dtype")
    return name


def _shown(names: list[str]) -> Iterator[str]:
    console = Console(stderr=True)
    columns = *Progress.get_default_columns(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield from bar.track(names, description="fusing")


def _print(columns: tuple[str, ...], rows: Iterable[list[str]], title: str, markdown: bool) -> None:
    if markdown:
        print(tables.markdown(columns, rows))
        return
    made = tables.table(columns[0], *tables.numbers(*columns[1:]), title=title)
    for row in rows:
        made.add_row(*row)
    tables.show(made)


def _write(path: Path | None, rows: list[dict]) -> None:
    if path is not None:
        found = {"environment": plain(environment(torch.device("cpu"))), "rows": rows}
        write_text(path, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(app())
