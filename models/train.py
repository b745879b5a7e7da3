"""``python -m models.train``: any network of :mod:`models.registry` on any data of :mod:`models.data`.

By mini-batch gradient descent, stopped and resumed at will. Samples are shuffled anew every epoch. Kernels run on a
GPU, the plain-torch reference on a CPU. ``torchrun --nproc-per-node 2 -m models.train`` trains in several processes.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from models import checkpoint, distributed
from models import data as datasets
from models.config import OPTIMIZERS, PRECISIONS, Config
from models.distributed import Group
from models.registry import CLASSIFIERS, architecture
from models.running import BEST, CHECKPOINT, Interrupted, choose_device, describe_mode, make_console, run, save_plots
from models.schedules import SCHEDULES
from models.trainer import Trainer

OptimizerName = Enum("OptimizerName", {name: name for name in OPTIMIZERS}, type=str)  # type: ignore[misc]
ScheduleName = Enum("ScheduleName", {name: name for name in SCHEDULES}, type=str)  # type: ignore[misc]
PrecisionName = Enum("PrecisionName", {name: name for name in PRECISIONS}, type=str)  # type: ignore[misc]
DeviceName = Enum("DeviceName", {"auto": "auto", "cpu": "cpu", "cuda": "cuda"}, type=str)

#: What suits a data set better than the defaults, unless an option says otherwise.
SUITED: dict[str, dict[str, Any]] = {"mnist5k": {"optimizer": "adam", "schedule": "cosine", "crop": 2}}
#: Shown even where they are the defaults.
_MAIN = ("epochs", "batch_size", "optimizer", "lr", "momentum", "seed")


def _merged(options: dict[str, Any], stored: dict[str, Any]) -> Config:
    """The options given, completed by those of the training to resume (none: an empty dictionary)."""
    given = {name: value for name, value in options.items() if value is not None}
    config = {**stored, **given}
    if stored and config["optimizer"] != stored["optimizer"]:  # whose settings mean nothing to the other one
        config |= {name: given.get(name) for name in ("lr", "momentum")}
    return Config(**config)


def keep_previous(path: Path, console: Console) -> None:
    """A new training must not cost an old one."""
    if path.exists():
        kept = path.with_suffix(".previous.pt")
        path.replace(kept)
        console.print(f"kept the checkpoint of an earlier training as {kept} (--resume goes on with it instead)")


def _describe(config: Config) -> str:
    """The settings that somebody may want to know: the main ones, and whatever is not as usual."""
    usual = {field.name: field.default for field in fields(Config)}
    chosen = {name: value for name, value in asdict(config).items() if name in _MAIN or value != usual[name]}
    return ", ".join(f"{name} {value}" for name, value in chosen.items() if value is not None)


def train(
    options: dict[str, Any],
    source: str | None,
    out: Path,
    device: str,
    resume: bool,
    checkpoint_every: int,
    console: Console,
    compiled: bool = False,
    tensorboard: bool = False,
    group: Group | None = None,
) -> None:
    """The whole command. CheckpointError, FileNotFoundError, ValueError and Interrupted say what went wrong."""
    group = group or Group()
    path = out / CHECKPOINT
    state = checkpoint.load(path) if resume else None
    if state is None:
        options = SUITED.get(source or "", {}) | {name: value for name, value in options.items() if value is not None}
    config = _merged(options, state["config"] if state else {})
    if source is None and state:
        source = state["directory"]
    place = choose_device(device)
    samples = datasets.load(source, config.fraction, config.held_out_fraction, config.as_bytes, config.image_size)
    trainer = Trainer(config, samples, place, compiled, group, fresh=state is None)
    if state:
        trainer.load_state_dict(state)
    elif group.first:
        keep_previous(path, console)
    title = config.architecture.title
    together = f" in {group.size} processes" if group.size > 1 else ""
    console.print(f"{title}, {describe_mode(place)}{together}; {len(trainer.train):,} training and "
                  f"{len(trainer.held_out):,} held-out images from {samples.name}", highlight=False)  # fmt: skip
    console.print(_describe(config), highlight=False)
    if trainer.loaded:
        console.print(str(trainer.loaded), highlight=False)
    if trainer.frozen:
        console.print(f"{len(trainer.frozen)} parameters are frozen", highlight=False)
    run(trainer, path, console, checkpoint_every, tensorboard)
    if group.first:
        loss, filters, curves = save_plots(trainer, out, f"{title} on {samples.name}")
        best = out / BEST
        made = f"best weights {best}, " if best.exists() else ""  # none where no epoch was trained
        console.print(f"checkpoint {path}, {made}loss {loss}, filters {filters}, curves {curves}", highlight=False)


def main(
    network: Annotated[str | None, typer.Option(help="Its name, of those that --list shows. (default lenet)")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="digits, mnist5k, cifar10, or a path: IDX files, CIFAR-10's batches, a folder or .zip with a "
                     "folder of pictures for each class. (default digits, scikit-learn's)", metavar="NAME|PATH"),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=0, help="Passes over the training set. (default 10)")] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(help="1: stochastic; 'all' or 0: batch gradient descent. (default 32)", metavar="INTEGER|all"),
    ] = None,
    optimizer: Annotated[OptimizerName | None, typer.Option(help="From gpukern.optim. (default momentum)")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Learning rate. (default depends on the optimizer)")] = None,
    momentum: Annotated[
        float | None, typer.Option(min=0, help="For momentum, nesterov, lars. (default 0.9)")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0, help="(default: the optimizer's)")] = None,
    schedule: Annotated[ScheduleName | None, typer.Option(help="Of learning rates. (default constant)")] = None,
    warmup: Annotated[float | None, typer.Option(min=0, help="Epochs of a linear rise before it. (default 0)")] = None,
    step_epochs: Annotated[int | None, typer.Option(min=1, help="For --schedule step. (default 10)")] = None,
    gamma: Annotated[float | None, typer.Option(min=0, help="For --schedule step. (default 0.1)")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, shuffling and augmentation. (default 0)")] = None,
    batch_norm: Annotated[
        bool | None, typer.Option("--batch-norm/--no-batch-norm", help="In LeNet-5 and VGG. (default no)")
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Channels of the first stage. (default: published)")] = None,
    dropout: Annotated[float | None, typer.Option(min=0, help="Probability. (default the network's)")] = None,
    label_smoothing: Annotated[float | None, typer.Option(min=0, help="(default 0)")] = None,
    mixup: Annotated[float | None, typer.Option(min=0, help="α of the Beta distribution. (default 0: none)")] = None,
    ema: Annotated[float | None, typer.Option(min=0, help="Decay of averaged weights. (default 0: none)")] = None,
    crop: Annotated[int | None, typer.Option(min=0, help="Random crops of images padded by so many pixels.")] = None,
    flip: Annotated[bool | None, typer.Option("--flip/--no-flip", help="Mirror images at random.")] = None,
    cutout: Annotated[int | None, typer.Option(min=0, help="Side of a random square without content.")] = None,
    precision: Annotated[PrecisionName | None, typer.Option(help="bf16, fp16: mixed precision. (default fp32)")] = None,
    patience: Annotated[
        int | None, typer.Option(min=0, help="Stop after so many epochs without a better one. (default 0: never)")
    ] = None,
    fraction: Annotated[float | None, typer.Option(help="Share of the training images. (default 1)")] = None,
    held_out_fraction: Annotated[float | None, typer.Option(help="Share of held-out images. (default 1)")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Resize images to squares.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="To start from: a file, torchvision:NAME or timm:NAME.", metavar="FILE|NAME")
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(help="Parameters not to train: layer1, or '!fc' for all but those of fc.", metavar="PATTERN"),
    ] = None,
    thaw: Annotated[int | None, typer.Option(min=0, help="Epochs after which what is frozen is trained too.")] = None,
    lr_scale: Annotated[
        list[str] | None,
        typer.Option(help="fc=10: ten times the learning rate for parameters of fc.", metavar="PATTERN=FACTOR"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where checkpoint, metrics and pictures go. (default runs/NETWORK)")
    ] = None,
    device: Annotated[DeviceName, typer.Option(help="auto: a GPU if there is one.")] = DeviceName.auto,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    checkpoint_every: Annotated[int, typer.Option(min=0, help="Also save every so many steps; 0: never.")] = 0,
    compiled: Annotated[bool, typer.Option("--compile", help='By torch.compile(model, backend="gpukern").')] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard's files.")] = False,
    list_networks: Annotated[bool, typer.Option("--list", help="Show the networks, and end.")] = False,
) -> None:  # fmt: skip
    """Train a network. Ctrl-C saves a checkpoint; --resume goes on from it, on a CPU to the very same weights."""
    given = {key: _plain(value) for key, value in locals().items() if key in Config.__dataclass_fields__}
    if list_networks:
        print("\n".join(CLASSIFIERS))
        return
    group, console = Group(), make_console()
    folder = out or Path("runs") / "lenet"
    try:
        group, where = distributed.join(device.value)
        console = make_console(group)
        given["network"] = architecture(network).name if network else None
        given["batch_size"] = _parse_batch_size(batch_size)
        given["freeze"] = tuple(freeze) if freeze else None
        given["lr_scale"] = tuple(map(_parse_scale, lr_scale)) if lr_scale else None
        folder = out or Path("runs") / (given["network"] or "lenet")
        train(given, data and str(data), folder, where, resume, checkpoint_every, console, compiled, tensorboard, group)
    except Interrupted as interruption:
        console.print(f"{interruption}: saved {folder / CHECKPOINT}; go on with --resume", highlight=False)
        raise typer.Exit(interruption.exit_code) from None
    except (checkpoint.CheckpointError, OSError, ValueError, RuntimeError) as error:
        make_console().print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    finally:
        if group.size > 1:
            distributed.leave()


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _parse_batch_size(text: str | None) -> int | None:
    if text is None or text == "all":
        return None if text is None else 0
    if not text.isdecimal():
        raise typer.BadParameter(f"expected a number of samples or 'all', got {text!r}", param_hint="--batch-size")
    return int(text)


def _parse_scale(text: str) -> tuple[str, float]:
    pattern, _, factor = text.rpartition("=")
    try:
        return pattern or _wrong(text), float(factor)
    except ValueError:
        raise typer.BadParameter(f"expected PATTERN=FACTOR, got {text!r}", param_hint="--lr-scale") from None


def _wrong(text: str) -> str:
    raise ValueError(text)


if __name__ == "__main__":
    typer.run(main)
