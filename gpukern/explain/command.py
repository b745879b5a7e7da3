"""``gpukern explain``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from typer.core import TyperGroup

from gpukern.conv import Direction
from gpukern.explain import formatting, query, show
from gpukern.explain.machine_code import CannotCompile, Compiled, compiled
from gpukern.explain.query import Question
from gpukern.explain.ranking import Answer, answer
from gpukern.runtime.device import DEVICES, DeviceSpec

T = TypeVar("T")


class _Questions(TyperGroup):
    """A command group in which an argument that is a file, not a command, is a saved model."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and (args[0].endswith(".pt2") or Path(args[0]).is_file()):
            args = ["model", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_Questions, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})

Dtype = Annotated[
    str,
    typer.Option(metavar="KIND", help="fp16, bf16, tf32 (fp32 as TF32 may multiply it), fp32; of inference int8, fp8."),
]
Arch = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help=f"{', '.join(DEVICES)}, or {', '.join(formatting.ARCHITECTURES)}. "
        "Default: the GPU that is here, else h100.",
    ),
]
Directions = Annotated[
    str, typer.Option("--direction", metavar="DIRECTION", help="forward, input-grad, weight-grad or all.")
]
Layout = Annotated[str, typer.Option("--layout", metavar="LAYOUT", help="channels_last or NCHW.")]
_Epilogue = Annotated[
    str,
    typer.Option(
        metavar="PARTS",
        help="In the same kernel: bias,residual,relu, or another activation.",
    ),
]
_Top = Annotated[int, typer.Option(metavar="N", min=1, help="Plans to list.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
NoCompile = Annotated[bool, typer.Option("--no-compile", help="Predict only, look at no machine code.")]


@app.callback()
def _main() -> None:
    """Why a layer gets the kernel that it gets: plan, alternatives, roofline, machine code. Needs no GPU.

    The report of a model that gpukern fuse saved: gpukern explain r50.pt2
    """


@app.command()
def conv(
    image: Annotated[str, typer.Argument(metavar="NxCxHxW", help="The input.", show_default=False)],
    filter: Annotated[str, typer.Argument(metavar="KxRxS", help="The filters, or KxC/groupsxRxS.", show_default=False)],
    stride: Annotated[str, typer.Option(help="One number, or rows x columns.")] = "1",
    padding: Annotated[str, typer.Option(help="One number, rows x columns, same or valid.")] = "0",
    dilation: Annotated[str, typer.Option(help="One number, or rows x columns.")] = "1",
    groups: Annotated[int, typer.Option(min=1)] = 1,
    dtype: Dtype = "fp16",
    arch: Arch = None,
    direction: Directions = "forward",
    layout: Layout = "channels_last",
    epilogue: _Epilogue = "",
    top: _Top = 6,
    as_json: Json = False,
    no_compile: NoCompile = False,
) -> None:
    """A convolution, for instance: gpukern explain conv 32x64x56x56 64x3x3 --padding 1"""
    checked("NxCxHxW", formatting.sizes_called, image, 4)
    checked("KxRxS", formatting.sizes_called, filter, 3, 4)
    for name, given in (("--stride", stride), ("--dilation", dilation)):
        checked(name, formatting.pair_called, given)
    checked("--padding", formatting.padding_called, padding)
    problem = checked(None, formatting.problem_called, image, filter, stride, padding, dilation, groups)
    device, kind, directions, bias, after = _common(arch, dtype, direction, epilogue)
    channels_last = checked("--layout", layout_called, layout)
    asked = [query.convolution(problem, each, kind, channels_last, device, bias, after) for each in directions]
    _explain(asked, top, as_json, no_compile)


@app.command()
def linear(
    matrix: Annotated[str, typer.Argument(metavar="MxC", help="The input: rows x features.", show_default=False)],
    outputs: Annotated[int, typer.Argument(metavar="K", min=1, help="Features of the output.", show_default=False)],
    dtype: Dtype = "fp16",
    arch: Arch = None,
    direction: Directions = "forward",
    epilogue: _Epilogue = "",
    top: _Top = 6,
    as_json: Json = False,
    no_compile: NoCompile = False,
) -> None:
    """A fully-connected layer, for instance: gpukern explain linear 128x4096 1000"""
    rows, inputs = checked("MxC", formatting.sizes_called, matrix, 2)
    device, kind, directions, bias, after = _common(arch, dtype, direction, epilogue)
    if after.residual:
        raise typer.BadParameter("a fully-connected layer adds no residual", param_hint="--epilogue")
    asked = [query.linear(rows, inputs, outputs, e, kind, device, bias, after.activation) for e in directions]
    _explain(asked, top, as_json, no_compile)


# ---- what was typed ------------------------------------------------------------------------------------------------


def _common(
    arch: str | None, dtype: str, direction: str, epilogue: str
) -> tuple[DeviceSpec, str, list[Direction], bool, query.Epilogue]:
    device = checked("--arch", formatting.device_called, arch)
    kind = checked("--dtype", formatting.layer_kind_called, dtype)
    directions = checked("--direction", formatting.directions_called, direction)
    if kind in query.QUANTIZED_KINDS and directions != [Direction.FORWARD]:
        raise typer.BadParameter("8 bits are for inference: there is a forward only", param_hint="--direction")
    bias, after = checked("--epilogue", formatting.epilogue_called, epilogue)
    if (bias or after != query.Epilogue()) and Direction.FORWARD not in directions:
        raise typer.BadParameter("only a forward has an epilogue", param_hint="--epilogue")
    return device, kind, directions, bias, after


def checked(name: str | None, read: Callable[..., T], *given: Any) -> T:
    """Return the result of ``read``; its errors are reported as a wrong use of the parameter ``name``."""
    try:
        return read(*given)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=name) from None


def layout_called(name: str) -> bool:
    """Whether it is channels_last."""
    layouts = {"channels_last": True, "channels-last": True, "nhwc": True, "nchw": False}
    if name.lower() not in layouts:
        raise ValueError(f"no layout is called {name!r}; known are channels_last, NCHW")
    return layouts[name.lower()]


# ---- what is printed -----------------------------------------------------------------------------------------------


def _explain(asked: list[Question], top: int, wants_json: bool, no_compile: bool) -> None:
    try:
        found = [answer(each) for each in asked]
    except RuntimeError as error:  # more pixels than kernels can number, a dtype that the device does not multiply
        raise typer.BadParameter(str(error)) from None
    coded = [(each, _code(each, no_compile)) for each in found]
    if wants_json:
        typer.echo(json.dumps([show.as_json(*pair) for pair in coded], indent=2))
        return
    for number, (each, code) in enumerate(coded):
        if number:
            typer.echo()
        show.print_answer(each, code, top)


def _code(found: Answer, no_compile: bool) -> list[Compiled] | str:
    if no_compile:
        return "not compiled: --no-compile"
    waiting = Console(stderr=True)
    try:
        if not waiting.is_terminal:
            return compiled(found.question, found.chosen.plan)
        with waiting.status(f"compiling for {found.question.device.name} ..."):
            return compiled(found.question, found.chosen.plan)
    except CannotCompile as reason:
        return f"not compiled: {reason}"
