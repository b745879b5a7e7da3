"""One call of a layer, and its results: outputs, every gradient, and the buffers that it changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gpukern.checking.models import floating, map_floating

OUTPUT, INPUT_GRAD = "output", "input gradient"


@dataclass
class Call:
    """``args`` and ``kwargs`` of a call, rounded to the dtype; its floating-point ``outputs``, and their ``grads``.

    ``needs``: for each floating-point tensor among the arguments, whether a gradient flowed into it.
    """

    args: tuple
    kwargs: dict[str, Any]
    outputs: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor | None] = field(default_factory=list)
    needs: list[bool] = field(default_factory=list)

    def to(self, dtype: torch.dtype) -> Call:
        """The call with arguments and gradients in ``dtype``, and no outputs."""
        args, kwargs = map_floating(lambda tensor: tensor.detach().to(dtype), (self.args, self.kwargs))
        grads = [None if grad is None else grad.to(dtype) for grad in self.grads]
        return Call(args, kwargs, [], grads, self.needs)

    def map(self, arguments: Any, grads: Any) -> Call:
        """The call with functions of its arguments, and of its gradients, in their place."""
        args, kwargs = map_floating(arguments, (self.args, self.kwargs))
        return Call(args, kwargs, [], [None if grad is None else grads(grad) for grad in self.grads], self.needs)


@dataclass
class Results:
    """``tensors`` by their names; ``sources``, the leaves that they were computed from."""

    tensors: dict[str, torch.Tensor]
    sources: list[torch.Tensor]


def compute(module: torch.nn.Module, call: Call, *, create_graph: bool = False) -> Results:
    """Call ``module``, and differentiate. Its buffers change."""
    sources: list[torch.Tensor] = []
    needs = iter([*call.needs, *[False] * len(floating((call.args, call.kwargs)))])

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        source = tensor.detach().requires_grad_(next(needs))
        sources.append(source)
        return source.clone()  # layers may work in place

    before = {name: buffer.clone() for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    args, kwargs = map_floating(leaf, (call.args, call.kwargs))
    outputs = floating(module(*args, **kwargs))
    tensors = {_numbered(OUTPUT, number): output for number, output in enumerate(outputs)}
    tensors |= {
        name: buffer.clone()
        for name, buffer in module.named_buffers()
        if name in before and not torch.equal(buffer, before[name])
    }
    names = [_numbered(INPUT_GRAD, number) for number in range(len(sources))]
    named = [(name, source) for name, source in zip(names, sources, strict=True) if source.requires_grad]
    named += [(f"{name} gradient", each) for name, each in module.named_parameters() if each.requires_grad]
    given = [
        (output, grad.to(output.dtype).detach().requires_grad_(create_graph))
        for output, grad in zip(outputs, call.grads, strict=False)
        if grad is not None and output.requires_grad
    ]
    wanted = [leaf for _, leaf in named]
    if given and wanted:
        heads, grads = zip(*given, strict=True)
        found = torch.autograd.grad(heads, wanted, grads, allow_unused=True, create_graph=create_graph)
        tensors |= {name: grad for (name, _), grad in zip(named, found, strict=True) if grad is not None}
        wanted = [*wanted, *grads]
    if not create_graph:
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    return Results(tensors, wanted)


def _numbered(name: str, number: int) -> str:
    return name if number == 0 else f"{name} {number + 1}"


def restore(module: torch.nn.Module, buffers: Sequence[torch.Tensor]) -> None:
    """Give ``module`` the values of ``buffers``, which it had before a call changed them."""
    with torch.no_grad():
        for buffer, value in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(value)
