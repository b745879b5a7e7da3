"""The command line ``gpukern``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from gpukern.checking.command import check
from gpukern.diagnose.command import diagnose
from gpukern.explain.command import app as explain
from gpukern.formatting import memory
from gpukern.fusion.command import explain_model, fuse
from gpukern.fusion.network_command import explain_network
from gpukern.info import Component, Info, gather
from gpukern.runtime.records import plain
from gpukern.tables import pairs
from gpukern.tune.command import tune
from gpukern.version import __version__

app = typer.Typer(
    help="GPU kernels for convolutional networks.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
explain.command("model")(explain_model)
explain.command("network")(explain_network)
app.add_typer(explain, name="explain")
app.command()(fuse)
app.command()(tune)
app.command()(check)
app.command()(diagnose)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False) -> None:
    """What is installed here, which mode serves CPU and CUDA tensors, and what is missing."""
    gathered = gather()
    console = Console()
    if as_json:
        typer.echo(json.dumps(plain(gathered), indent=2))
    elif console.is_terminal:
        rows = ((name, Text(value, style="" if good else "yellow")) for name, value, good in _rows(gathered))
        console.print(pairs(rows))
    else:
        for name, value, _ in _rows(gathered):
            typer.echo(f"{name}: {value}")


def _rows(info: Info) -> list[tuple[str, str, bool]]:
    """(name, value, whether all is well) of each line."""
    rows = [(component.name, _describe(component), component.usable) for component in info.components]
    for device in info.devices:
        value = (
            f"{device.name}, compute capability {device.compute_capability}, {device.sm_count} SMs, "
            f"{memory(device.memory)}, {memory(device.shared_memory)} shared memory per block"
        )
        rows.append((f"device cuda:{device.index}", value, True))
    if not info.devices:
        rows.append(("devices", info.device_problem or "no CUDA device", info.device_problem is None))
    allowed = {True: "allowed", False: "off"}
    tf32 = f"{allowed[info.tf32_convolution]} in convolutions, {allowed[info.tf32_matmul]} in matrix products"
    rows.append(("TF32", tf32, True))
    for served in info.modes:
        mode = served.mode or "nothing runs"
        rows.append((f"{served.tensors} tensors", f"{mode} ({served.reason})", served.mode is not None))
    for missing in info.missing:
        rows.append((f"missing {missing.name}", f"for {missing.purpose}: {missing.install}", False))
    return rows


def _describe(component: Component) -> str:
    if component.version is None:
        return "not installed"
    detail = f" ({component.detail})" if component.detail else ""
    problem = f": {component.problem}" if component.problem else ""
    return f"{component.version}{detail}{problem}"
