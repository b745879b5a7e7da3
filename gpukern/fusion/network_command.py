"""``gpukern explain network``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console

from gpukern.conv import Direction
from gpukern.explain import formatting, network, network_show
from gpukern.explain.command import Arch, Directions, Dtype, Json, Layout, NoCompile, checked, layout_called
from gpukern.explain.network import Part, Setting
from gpukern.explain.query import KINDS
from gpukern.fusion.api import fuse
from gpukern.fusion.errors import FusionError
from gpukern.fusion.network import fused_parts
from gpukern.fusion.sources import load_model
from gpukern.runtime.precision import fp32_products


def explain_network(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="package.module:factory, torchvision:NAME, timm:NAME, a .pt2 file, or a checkpoint of models.train.",
            show_default=False,
        ),
    ],
    input: Annotated[str, typer.Option(metavar="NxCxHxW", help="The sizes of its input.")],
    batch: Annotated[str, typer.Option(help="Batch sizes in place of the given one, 1,32,128.")] = "",
    dtype: Dtype = "fp16",
    arch: Arch = None,
    direction: Directions = "forward",
    layout: Layout = "channels_last",
    fused: Annotated[bool, typer.Option("--fuse", help="As gpukern.fuse makes it for inference.")] = False,
    as_json: Json = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for documentation.")] = False,
    no_compile: NoCompile = False,
) -> None:
    """Convolutions, linear layers and pools of a network: plan, roofline and machine code, and their sum.

    With --fuse also what else runs in the fused network, such as its norms, by its bytes.

    For instance: gpukern explain network torchvision:resnet50 --input 32x3x224x224
    """
    shape = checked("--input", formatting.sizes_called, input.replace(",", "x"), 2, 4)
    batches = [checked("--batch", formatting.sizes_called, word, 1)[0] for word in filter(None, batch.split(","))]
    device, kind = checked("--arch", formatting.device_called, arch), checked("--dtype", formatting.kind_called, dtype)
    directions = checked("--direction", formatting.directions_called, direction)
    channels_last = checked("--layout", layout_called, layout)
    if fused and directions != [Direction.FORWARD]:
        raise typer.BadParameter("a fused network has a forward only", param_hint="--direction")
    setting = Setting(kind, channels_last, device, compiles=not no_compile)
    made = checked("MODEL", load_model, model)
    found: dict[int, list[Part]] = {}
    with _step() as step, fp32_products(KINDS[kind][1], KINDS[kind][1]):
        parts = _fused(made, shape, setting) if fused else partial(_layers, made.to("meta"), directions, setting)
        for size in dict.fromkeys(batches or shape[:1]):
            for part in parts((size, *shape[1:])):
                step(f"batch {size}: {part.layer}")
                found.setdefault(size, []).append(part)
    if not found:
        _tell("no layer is left")
        raise typer.Exit(1)
    words = "all directions" if len(directions) > 1 else directions[0].value
    how = f"{'fused' if fused else words}, {kind}, {'channels_last' if channels_last else 'NCHW'}"
    heading = f"{model} on {device.name}: {how}"
    if as_json:
        typer.echo(json.dumps(network_show.as_json(found), indent=1, ensure_ascii=False))
    elif as_markdown:
        typer.echo(network_show.markdown(found, heading), nl=False)
    else:
        network_show.print_network(found, heading)


def _layers(
    made: torch.nn.Module, directions: list[Direction], setting: Setting, shape: tuple[int, ...]
) -> Iterator[Part]:
    try:
        yield from network.parts(made, shape, directions, setting, lambda words: _tell(f"left out {words}"))
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as problem:  # whatever a forward raises
        raise typer.BadParameter(
            f"the model does not take {formatting.by(*shape)}: {problem}", param_hint="--input"
        ) from None


def _fused(
    made: torch.nn.Module, shape: tuple[int, ...], setting: Setting
) -> Callable[[tuple[int, ...]], Iterable[Part]]:
    """The parts of the fused network by the sizes of its input."""
    dtype = KINDS[setting.kind][0]
    try:
        example, last = torch.randn(2, *shape[1:]), setting.channels_last
        module = fuse(made, example, verify=False, dtype=dtype, channels_last=last).module.to("meta")
    except FusionError as problem:
        raise typer.BadParameter(str(problem), param_hint="MODEL") from None
    return lambda size: fused_parts(module, torch.empty(*size, dtype=dtype, device="meta"), setting)


@contextlib.contextmanager
def _step() -> Iterator[Callable[[str], None]]:
    """Show the current step on standard error if that is a terminal."""
    console = Console(stderr=True)
    with console.status("making the model ...") if console.is_terminal else contextlib.nullcontext() as status:
        yield status.update if status else lambda words: None


def _tell(words: str) -> None:
    typer.echo(f"gpukern explain: {words}", err=True)
