"""What is checked: a model with a batch, a loss and perhaps an optimizer; computations on copies of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gpukern.diagnose.calling import (
    call,
    copied,
    copied_optimizer,
    device_of,
    floating,
    map_tensors,
    moved,
    random_state_kept,
    tensors,
)
from gpukern.diagnose.errors import DiagnoseError
from gpukern.fusion.errors import first_line

Step = Callable[[torch.nn.Module, torch.optim.Optimizer, Any], Any]


@dataclass(frozen=True)
class Subject:
    """See :func:`gpukern.diagnose.sanity_check`. Nothing computes with ``model`` itself."""

    model: torch.nn.Module
    inputs: Any
    targets: Any
    loss: Callable[[Any, Any], torch.Tensor]
    optimizer: torch.optim.Optimizer | None = None
    step: Step | None = None
    chance: float | None = None
    regularization: float | Callable[[torch.nn.Module], torch.Tensor] | None = None
    examples: int = 20
    steps: int = 200
    entries: int = 24
    seed: int = 0

    @property
    def samples(self) -> int:
        """The size of the batch."""
        return next((len(each) for each in tensors(self.inputs) if each.dim()), 0)

    @property
    def labels(self) -> torch.Tensor | None:
        """The targets if they are classes: whole numbers in one tensor."""
        found = tensors(self.targets)
        if len(found) == 1 and not found[0].is_floating_point() and found[0].dtype is not torch.bool and found[0].dim():
            return found[0]
        return None

    def fresh(self) -> torch.nn.Module:
        """A copy of the model in training mode, without gradients."""
        return copied(self.model, "sanity_check").train()

    def fresh_optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer | None:
        """A copy of the optimizer, if there is one, for a copy of the model."""
        return None if self.optimizer is None else copied_optimizer(self.optimizer, self.model, model)

    def batch(self) -> tuple[Any, Any]:
        """Inputs and targets, copied: for functions that may work in place."""
        return map_tensors(torch.clone, self.inputs), map_tensors(torch.clone, self.targets)

    def some(self, places: torch.Tensor) -> tuple[Any, Any]:
        """Inputs and targets of the samples at ``places``."""
        of = self.samples

        def chosen(leaf: torch.Tensor) -> torch.Tensor:
            return leaf[places.to(leaf.device)] if leaf.dim() and len(leaf) == of else leaf

        return map_tensors(chosen, self.inputs), map_tensors(chosen, self.targets)

    def random_places(self, number: int) -> torch.Tensor:
        """``number`` samples at random, or all."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(self.samples, generator=generator)[:number]


def read_batch(model: torch.nn.Module, batch: Any) -> tuple[Any, Any]:
    """Inputs and targets, on the model's device. TypeError for what is no pair, ValueError for an empty one."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        got = f"{len(batch)} values" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise TypeError(
            f"a batch is a pair (inputs, targets), got {got}; inputs of several tensors go into a tuple or dict"
        )
    inputs, targets = (moved(each, device_of(model)) for each in batch)
    found = [each for each in tensors(inputs) if each.dim()]
    if not found:
        raise TypeError("the inputs of the batch hold no tensor with a batch dimension")
    if not len(found[0]):
        raise ValueError("the batch is empty")
    return inputs, targets


@dataclass(frozen=True)
class Probe:
    """One forward in training mode: the output, the loss or why there is none, and warnings of the loss."""

    output: Any
    value: float | None
    failed: str = ""
    warned: str = ""

    @property
    def logits(self) -> torch.Tensor | None:
        """The output if it is one floating-point tensor of samples."""
        if isinstance(self.output, torch.Tensor) and self.output.is_floating_point() and self.output.dim():
            return self.output
        return None


def probe(subject: Subject) -> Probe:
    """Run the model once. DiagnoseError if its forward fails."""
    model = subject.fresh()
    with random_state_kept(subject.seed), torch.no_grad():
        try:
            output = call(model, subject.inputs)
        except Exception as problem:  # whatever a forward raises
            raise DiagnoseError(f"the model fails for the inputs of the batch: {first_line(problem)}") from problem
        if not floating(output):
            raise DiagnoseError("the model returns no floating-point tensor")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                value = subject.loss(output, subject.targets)
            except Exception as problem:  # whatever a loss raises
                return Probe(output, None, first_line(problem))
        warned = next((first_line(w.message) for w in caught if "broadcast" in str(w.message)), "")  # type: ignore[arg-type]
    if not isinstance(value, torch.Tensor):
        return Probe(output, None, f"it returns a {type(value).__name__}, expected a tensor to differentiate")
    if value.numel() != 1:
        return Probe(output, None, f"it returns {list(value.shape)} values, expected one: reduce it to their mean")
    return Probe(output, float(value), warned=warned)


def loss_of(subject: Subject, model: torch.nn.Module, batch: tuple[Any, Any]) -> torch.Tensor:
    """The loss of ``model`` for a batch, with a graph."""
    return subject.loss(call(model, batch[0]), batch[1])
