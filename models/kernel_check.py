"""The trained network once more on gpukern's own kernels, against the mathematics in float64.

``GPUKERN_EMULATE=1 python -m models.kernel_check CHECKPOINT`` runs the kernels on a CPU, in Triton's interpreter; the
variable must be set before gpukern is imported, hence a process of its own. On a GPU :func:`check` needs no such care.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import typer

from gpukern import summary
from gpukern.runtime.mode import Mode, force_mode, mode_of
from gpukern.runtime.precision import fp32_products
from gpukern.runtime.records import plain
from models import checkpoint, data
from models.data import Samples
from models.lenet import LeNet5
from models.trained import network


@dataclass(frozen=True)
class Comparison:
    """``error`` is the relative Frobenius norm ‖kernels − reference‖ / ‖reference‖."""

    tensor: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # False for NaN


def check(model: LeNet5, samples: Samples) -> list[Comparison]:
    """Logits and the gradients of one training step on ``samples``, where ``model`` is, beside their bounds.

    RuntimeError if the kernels would not run there.
    """
    if mode_of(samples.images) is Mode.REFERENCE:
        raise RuntimeError("the kernels run on a GPU or under GPUKERN_EMULATE=1, but this is reference mode")
    with force_mode(Mode.REFERENCE):
        logits_bound, gradient_bound = _bounds(len(samples), hasattr(model, "bn1"))
    choices: dict[str, torch.Tensor] = {}
    with fp32_products("ieee"):  # the bounds are those of fp32 products
        logits = _forward(model, samples.images, partial(_record_choice, choices))
        loss_gradient = _loss_gradient(logits, samples.labels)
        kernels = _gradients(model, logits, loss_gradient.to(logits.dtype))
    exact = copy.deepcopy(model).double().cpu()
    with force_mode(Mode.REFERENCE):
        exact_logits = _forward(exact, samples.images.double().cpu(), partial(_follow_choice, choices, logits_bound))
        reference = _gradients(exact, exact_logits, loss_gradient.cpu())
    return [Comparison("logits", _relative_error(logits, exact_logits), logits_bound)] + [
        Comparison(f"∂L/∂{name}", _relative_error(kernels[name], reference[name]), gradient_bound) for name in reference
    ]


def _forward(model: LeNet5, images: torch.Tensor, hook: Callable) -> torch.Tensor:
    """The logits; calls ``hook(name, layer, inputs, output)`` after every ReLU and every pooling layer."""
    handles = [
        layer.register_forward_hook(partial(hook, name))
        for name, layer in model.named_children()
        if isinstance(layer, (torch.nn.ReLU, torch.nn.MaxPool2d))
    ]
    try:
        return model(images)
    finally:
        for handle in handles:
            handle.remove()


def _loss_gradient(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """∂L/∂logits of the cross-entropy in float64, for both backward passes: the loss is no kernel of ours.

    It is softmax − 1 at the label, tiny once a network is sure; a rounding error of a logit matters there more than
    in all layers together, and would hide theirs.
    """
    logits = logits.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), logits)
    return gradient


def _gradients(model: LeNet5, logits: torch.Tensor, loss_gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(logits, parameters, loss_gradient), strict=True))


# ReLU and max pooling choose, and the derivative jumps with the choice: where two values differ by less than a
# rounding error, fp32 and fp64 may rightly choose differently, and the gradients then differ by far more than rounding.
# There, and only there, the reference makes the choice that is right for the values the kernels were given.

_Chooses = torch.nn.ReLU | torch.nn.MaxPool2d


def _record_choice(choices: dict, name: str, layer: _Chooses, inputs: tuple, output: torch.Tensor) -> None:
    x = inputs[0].detach().cpu()
    choices[name] = x > 0 if isinstance(layer, torch.nn.ReLU) else _largest(x, layer)[1]


def _follow_choice(
    choices: dict, rounding: float, name: str, layer: _Chooses, inputs: tuple, output: torch.Tensor
) -> torch.Tensor:
    (x,), choice = inputs, choices[name]
    undecided = rounding * x.detach().abs().max()
    if isinstance(layer, torch.nn.ReLU):
        return x * torch.where(x.abs() <= undecided, choice, x > 0)
    largest, _ = _largest(x, layer)
    chosen = x.flatten(2).gather(2, choice.flatten(2)).view_as(choice)
    return torch.where(largest - chosen <= undecided, chosen, largest)


def _largest(x: torch.Tensor, layer: torch.nn.MaxPool2d) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest values of the windows, and where they are."""
    return torch.nn.functional.max_pool2d(x, layer.kernel_size, layer.stride, return_indices=True)


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(actual.double().cpu() - expected) / torch.linalg.vector_norm(expected)).item()


def _bounds(batch: int, batch_norm: bool) -> tuple[float, float]:
    """Of the logits and of every gradient, as relative Frobenius norms.

    A sum of K products rounds to within ε·√K·(|x| ∗ |w|), as errors of both signs add up, and the relative errors of
    layers that follow one another add up: the logits are within c·ε·Σ√K of the reference. A gradient has gone through
    all these sums, through those of the input gradients, and through one of a weight gradient, which runs over the
    batch and the image. A batch norm sums over these too, forward and backward. The constant c = 2 covers the
    cancellation ‖|x| ∗ |w|‖/‖x ∗ w‖ in the sums.
    """
    eps, c = torch.finfo(torch.float32).eps, 2
    forward = backward = weight_gradient = 0.0
    rows = summary(LeNet5(batch_norm=batch_norm), LeNet5.INPUT_SIZE).rows
    for before, row in itertools.pairwise(rows):
        if row.layer.startswith("BatchNorm"):
            terms = batch * math.prod(row.output_size[1:])
            forward, backward = forward + math.sqrt(terms), backward + math.sqrt(terms)
            continue
        # Each output takes part in K products, so there are K times as many; likewise for inputs and weights.
        products = row.multiply_adds
        forward += math.sqrt(products / math.prod(row.output_size))
        backward += math.sqrt(products / math.prod(before.output_size))
        weight_gradient = max(weight_gradient, math.sqrt(batch * products / math.prod(row.weight_size)))
    return c * eps * forward, c * eps * (forward + backward + weight_gradient)


def check_checkpoint(path: Path, images: int, device: torch.device) -> list[Comparison]:
    """:func:`check` of a checkpoint of ``models.train`` on the first ``images`` held-out images of its data."""
    state = checkpoint.load(path)
    model = network(state).to(device)
    if not isinstance(model, LeNet5):
        raise ValueError(f"{path}: the bounds are those of LeNet-5, and this is {state['config']['network']}")
    held_out = data.load(state["directory"]).held_out
    return check(model, Samples(held_out.images[:images], held_out.labels[:images]).to(device))


def main(path: Path, images: int = 4) -> None:
    """Print the comparisons as JSON."""
    comparisons = check_checkpoint(path, images, torch.device("cpu"))
    print(json.dumps(plain(comparisons, name_nonfinite=True)))


if __name__ == "__main__":
    typer.run(main)
