"""A training step under ``torch.compile(backend="gpukern")`` beside the same step of torch in float64."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tests.numerics import FP32_EPS

#: The longest sums of products, and of values of a channel, of the models in this folder.
TERMS, PIXELS = 8 * 9, 4 * 9 * 8

Results = dict[str, torch.Tensor]


def bound(dtype: torch.dtype, layers: int) -> float:
    """The relative error, in the Frobenius norm, of what comes out of ``layers`` layers, or of their gradients.

    A layer has a sum of products and one over pixels in each direction, both random walks as in
    :mod:`tests.numerics`, and four roundings: of z, y and their gradients. A rounding errs by eps / √12 as a standard
    deviation; six of them, as there. Twice that: in its backward a norm takes two means away, and what is left is
    smaller than what erred.
    """
    sums = 2 * 6 * FP32_EPS * (math.sqrt(TERMS) + math.sqrt(PIXELS))
    return 2 * (layers * sums + 6 / math.sqrt(12) * torch.finfo(dtype).eps * math.sqrt(4 * layers))


def depth(model: nn.Module) -> int:
    """The number of convolutions, linear layers and norms of a model, those without parameters too."""
    leaves = nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase
    return sum(isinstance(module, leaves) for module in model.modules())


def trained(make: Callable[[], nn.Module]) -> nn.Module:
    """A model whose norms do something."""
    model = make()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 1.5)
    return model


def pair(make: Callable[[], nn.Module], where: torch.device, **options: Any) -> tuple[nn.Module, nn.Module, Any]:
    """A model, torch's copy of it in float64 on the CPU, and the model compiled with ``options`` of torch.compile."""
    torch._dynamo.reset()
    model = trained(make)
    exact = copy.deepcopy(model).double()
    model.to(where)
    return model, exact, torch.compile(model, backend="gpukern", **options)


def tensors(results: Any) -> list[torch.Tensor]:
    return [results] if isinstance(results, torch.Tensor) else list(results)


def loss(results: Any) -> torch.Tensor:
    """A number that depends on every element, differently, and on no sum that a norm keeps."""
    return sum((each.square() * each.sigmoid()).sum() for each in tensors(results))  # type: ignore[return-value]


def losses(call: Any, exact: nn.Module, *inputs: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each input the loss of a compiled model, and the exact one."""
    for x in inputs:
        yield loss(call(x)), loss(exact(x.detach().cpu().double()))


def state(model: nn.Module) -> Results:
    """Gradients and buffers, by name."""
    found = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | dict(model.named_buffers())


def assert_follows(actual: Results, exact: Results, eps: float) -> None:
    """Every tensor of ``actual`` lies within ``eps`` of the exact one, relatively, in the Frobenius norm."""
    assert actual.keys() == exact.keys()
    for name, tensor in actual.items():
        reference = exact[name].detach().double()
        error = float((tensor.detach().cpu().double() - reference).norm())
        assert error <= eps * float(reference.norm()), (
            f"{name}: relative error {error / float(reference.norm()):.3g} of {eps:.3g}"
        )


def assert_step_follows(
    call: Any, model: nn.Module, exact: nn.Module, x: torch.Tensor, eps: float, *, needs_x: bool = True
) -> list[torch.Tensor]:
    """One step: results, all gradients and the buffers. Gradients are of random numbers, and forgotten afterwards."""
    x = x.detach().requires_grad_(needs_x)
    leaf = x.detach().cpu().double().requires_grad_(needs_x)
    results, expected = tensors(call(x)), tensors(exact(leaf))
    assert_follows(named("result", results), named("result", expected), eps)
    for output, wanted in zip(results, expected, strict=True):
        assert output.requires_grad == wanted.requires_grad
        assert output.dtype is x.dtype
    pairs = [(a, b) for a, b in zip(results, expected, strict=True) if a.requires_grad]
    grads = [torch.randn_like(output) for output, _ in pairs]
    if pairs:
        torch.autograd.backward([a for a, _ in pairs], grads)
        torch.autograd.backward([b for _, b in pairs], [grad.cpu().double() for grad in grads])
    found, wanted = state(model), state(exact)
    if needs_x and x.grad is not None:
        found["gradient of x"], wanted["gradient of x"] = x.grad, leaf.grad
    assert_follows(found, wanted, eps)
    for parameter in (*model.parameters(), *exact.parameters()):
        parameter.grad = None
    return results


def named(name: str, found: list[torch.Tensor]) -> Results:
    return {f"{name} {i}": each for i, each in enumerate(found)}


@contextlib.contextmanager
def calls_of(function: str, monkeypatch: Any, module: Any) -> Iterator[list[tuple]]:
    """The calls of ``module.function`` inside the block, by their arguments."""
    calls: list[tuple] = []
    original = getattr(module, function)

    def watched(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, watched)
        yield calls
