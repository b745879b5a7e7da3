"""``python -m bench.training_step --device h200 --network resnet50``."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from bench.environment import environment
from bench.results import write_text
from bench.training_step.paths import Steps, count, why_not_compiled
from bench.training_step.table import kernels, table
from gpukern import tables
from gpukern.runtime.accesses import KernelError
from gpukern.runtime.device import named_device
from gpukern.runtime.records import plain
from models.zoo import network

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "convnext_tiny", "unet")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

NOTE = """\
PyTorch: its operators by their formula, inputs read once and outputs written once, a lower bound of its launches.
convert: gpukern.convert(model). compile: torch.compile(model, backend="gpukern").\
"""


def main(
    device: Annotated[str, typer.Option(help="Its plans: h200, a100, ...")] = "h200",
    names: Annotated[list[str], typer.Option("--network", help="Of models/zoo.py; repeatable.")] = list(NETWORKS),  # noqa: B006
    batch: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 32,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")] = "float16",
    by_kernel: Annotated[bool, typer.Option("--kernels", help="Also kernel by kernel.")] = False,
    recompute: Annotated[
        bool | None,
        typer.Option("--recompute/--no-recompute", help="compile with options={'recompute': ...}.", show_default=False),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the counts too.")] = None,
) -> None:
    """Count launches and bytes of a training step, without a GPU."""
    try:
        spec, networks = named_device(device), [network(name) for name in names]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}")
    found: dict[str, Steps] = {}
    console = Console(stderr=True)
    for each in networks:
        shape = (batch, *each.input_size)
        try:
            with console.status(f"counting {each.title}") if console.is_terminal else nullcontext():
                found[each.name] = count(
                    each.make(), shape, DTYPES[dtype], spec, None if recompute is None else {"recompute": recompute}
                )
        except KernelError as error:
            sys.exit(f"{each.title}: {error}")
        title = f"{each.title}, {'×'.join(map(str, shape))}, {dtype}, plans of {spec.name}"
        tables.show(table(title, found[each.name]), width=100)
        if by_kernel:
            tables.show(kernels(found[each.name]), width=120)
    missing = why_not_compiled()
    print(f"{NOTE}\nNot available: {missing}." if missing else NOTE)
    if json_path is not None:
        asked = {"device": spec.name, "batch": batch, "dtype": dtype}
        kept = plain({"environment": environment(torch.device("cpu")), **asked, "networks": found})
        write_text(json_path, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
