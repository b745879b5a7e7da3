"""``python -m models.segment train|predict|evaluate``: neuronal membranes in electron microscopy.

A network learns from sections and their labels which pixels lie inside cells; it tells the probability of that for all
pixels of other sections; these are scored as in the ISBI 2012 challenge. Kernels run on a GPU, plain torch on a CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from models.checkpoint import CheckpointError
from models.membranes import program
from models.membranes.config import DEFAULT_NETWORK, Config
from models.membranes.prediction import Options
from models.running import CHECKPOINT, Interrupted, make_console
from models.train import DeviceName, PrecisionName

NetworkName = Enum("NetworkName", {"unet": "unet", "unet_valid": "unet-valid", "ciresan": "ciresan"}, type=str)
PresetName = Enum("PresetName", {"cpu": "cpu", "gpu": "gpu"}, type=str)
SamplingName = Enum("SamplingName", {"crops": "crops", "patches": "patches"}, type=str)
DtypeName = Enum("DtypeName", {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}, type=str)
PartName = Enum("PartName", {"all": "all", "train": "train", "held_out": "held-out"}, type=str)

app = typer.Typer(
    help="Neuronal membranes in electron microscopy: train a network, predict, evaluate as the ISBI 2012 challenge.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_DATA = (
    "A folder of images and one of labels, or with the challenge's train-volume.tif and train-labels.tif. (default the "
    "ISBI 2012 data where GPUKERN_ISBI2012 says, or data/isbi2012)"
)
_PART = "Those that a training of four fifths learns from, or the others."


@contextlib.contextmanager
def _told(console: Console) -> Iterator[None]:
    """Errors that a user can do something about as one line, with exit status 1."""
    try:
        yield
    except (CheckpointError, OSError, ValueError, TypeError, RuntimeError) as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


@app.command()
def train(
    network: Annotated[
        NetworkName | None, typer.Option(help="Padded or valid U-Net, or Ciresan's N4. (default unet)")
    ] = None,
    preset: Annotated[
        PresetName | None, typer.Option(help="Settings for two cores or for a GPU. (default cpu)")
    ] = None,
    data: Annotated[str | None, typer.Option(help=_DATA, metavar="PATH")] = None,
    train_sections: Annotated[
        int | None, typer.Option(min=1, help="How many, the first ones; the others are held out. (default 4/5)")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where all goes. (default runs/segment-NETWORK)")] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Updates of the weights. (default: the preset's)")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="How many crops a step sees.")] = None,
    crop: Annotated[int | None, typer.Option(min=1, help="Side of a crop, in pixels that are learned.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Channels at full size; maps of the N4.")] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="How often a U-Net halves its image.")] = None,
    dropout: Annotated[float | None, typer.Option(min=0, help="At a U-Net's bottom, or before the N4's end.")] = None,
    sampling: Annotated[
        SamplingName | None,
        typer.Option(help="Of the N4: pixels of crops by the dense network, or patches: the same gradient."),
    ] = None,
    pixels: Annotated[int | None, typer.Option(min=2, help="Of the N4: so many a step, half membrane.")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Highest learning rate of the one-cycle schedule.")] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0)] = None,
    ema: Annotated[float | None, typer.Option(min=0, help="Decay of averaged weights; 0: none.")] = None,
    w0: Annotated[float | None, typer.Option(min=0, help="Weight of narrow borders between cells.")] = None,
    sigma: Annotated[float | None, typer.Option(help="Their width, in pixels.")] = None,
    elastic: Annotated[float | None, typer.Option(min=0, help="Deformation, in pixels.")] = None,
    precision: Annotated[PrecisionName | None, typer.Option(help="bf16, fp16: mixed precision.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, crops and augmentation.")] = None,
    evaluate_every: Annotated[int | None, typer.Option(min=1, help="Steps between scores of the held-out.")] = None,
    average: Annotated[int, typer.Option(help="Views to average over in the end: 8 or 1.")] = 8,
    device: Annotated[DeviceName, typer.Option(help="auto: a GPU if there is one.")] = DeviceName.auto,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    checkpoint_every: Annotated[int, typer.Option(min=0, help="Also save every so many steps; 0: never.")] = 0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard's files.")] = False,
) -> None:  # fmt: skip
    """Train on the first sections, score the others. Ctrl-C saves a checkpoint; --resume goes on from it."""
    given = {name: _plain(value) for name, value in locals().items() if name in Config.__dataclass_fields__}
    folder = out or Path("runs") / f"segment-{given['network'] or DEFAULT_NETWORK}"
    console = make_console()
    try:
        with _told(console):
            program.train(given, _plain(preset), data, train_sections, folder, device.value, resume, console,
                          checkpoint_every, average, tensorboard)  # fmt: skip
    except Interrupted as interruption:
        console.print(f"{interruption}: saved {folder / CHECKPOINT}; go on with --resume", highlight=False)
        raise typer.Exit(interruption.exit_code) from None


@app.command()
def predict(
    checkpoint: Annotated[Path, typer.Argument(help="Of a training: runs/segment-unet/checkpoint.pt.")],
    images: Annotated[Path, typer.Argument(help="A TIFF of any number of sections, a picture, or a folder of them.")],
    out: Annotated[Path, typer.Option(help="TIFF of probabilities of the inside of a cell, float32.")],
    labels: Annotated[Path | None, typer.Option(help="TIFF of cells, numbered, by a watershed.")] = None,
    sections: Annotated[PartName, typer.Option(help=_PART)] = PartName.all,
    tile: Annotated[
        int | None,
        typer.Option(min=1, help="Side of a tile: smaller ones take less memory and more time. (default 512 or less)"),
    ] = None,
    average: Annotated[int, typer.Option(help="Views to average over, mirrored and turned: 8 or 1.")] = 1,
    fuse: Annotated[bool, typer.Option("--fuse", help="Fold and fuse the layers first (gpukern.fuse).")] = False,
    dtype: Annotated[DtypeName, typer.Option(help="What is multiplied.")] = DtypeName.fp32,
    device: Annotated[DeviceName, typer.Option(help="auto: a GPU if there is one.")] = DeviceName.auto,
) -> None:
    """Write the probability of every pixel to lie inside a cell, as a TIFF that Fiji opens."""
    console = make_console()
    try:
        with _told(console):
            options = Options(tile, average, fuse, dtype.value)
            program.predict(checkpoint, images, out, labels, sections.value, device.value, options, console)
    except KeyboardInterrupt:
        console.print("interrupted: nothing was written", highlight=False)
        raise typer.Exit(130) from None


@app.command()
def evaluate(
    probabilities: Annotated[Path, typer.Argument(help="A TIFF that predict wrote.")],
    data: Annotated[str | None, typer.Option(help=_DATA, metavar="PATH")] = None,
    labels: Annotated[Path | None, typer.Option(help="In place of --data: a file of labels.")] = None,
    images: Annotated[Path | None, typer.Option(help="With --labels: the sections, to be drawn too.")] = None,
    sections: Annotated[PartName, typer.Option(help=_PART)] = PartName.all,
    out: Annotated[Path, typer.Option(help="Where scores and pictures go.")] = Path("runs/segment-evaluation"),
) -> None:
    """Score probabilities as the ISBI 2012 challenge does, and draw the errors."""
    console = make_console()
    with _told(console):
        if data and labels:
            raise ValueError("--data and --labels are two truths: give one")
        if images and not labels:
            raise ValueError("--images goes with --labels: --data has its own")
        program.evaluate(probabilities, data, labels, images, sections.value, out, console)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


if __name__ == "__main__":
    app()
