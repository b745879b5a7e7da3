"""One differentiable computation, called the cheap way in eager code and the traceable way under a tracer.

Crossing PyTorch's operator boundary costs tens of microseconds in Python, so eager calls use a
``torch.autograd.Function`` or, when nothing requires a gradient, go straight to the computation. ``torch.compile``,
``torch.export``, ``make_fx`` and every other tracer see the registered ``torch.library`` operator ``gpukern::<name>``.
Both ways share the same forward, ``save`` and ``backward`` functions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from gpukern.runtime.mode import Mode, mode_of

_PLAIN_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


class Operator:
    """A computation registered as ``gpukern::<name>``.

    Parameters
    ----------
    name, schema:
        as for :func:`torch.library.custom_op`; tensor arguments come first in the schema.
    forward:
        computes on real tensors; never sees a tracer's.
    fake:
        the same signature; returns empty tensors of the right shape, dtype and strides.
    save:
        ``save(ctx, arguments, output)`` stores on ``ctx`` what ``backward`` needs.
    backward:
        ``backward(ctx, *grads)`` returns one gradient or None per argument. It calls Operators itself, so that
        gradients of gradients work.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        save: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
    ) -> None:
        self._forward = forward
        definition = torch.library.custom_op(
            f"gpukern::{name}",
            lambda *arguments: forward(*_tuples(arguments)),
            mutates_args=(),
            schema=schema,
        )
        definition.register_fake(fake)
        if backward is not None:
            definition.register_autograd(
                backward, setup_context=lambda ctx, inputs, output: save(ctx, _tuples(inputs), output)
            )
        self.overload = getattr(torch.ops.gpukern, name).default
        self._tensors = sum(
            str(argument.type) in ("Tensor", "Optional[Tensor]") for argument in self.overload._schema.arguments
        )
        self._apply = None
        if backward is not None:
            self._apply = _autograd_function(name, self._tensors, forward, save, backward).apply

    def __call__(self, *arguments: Any) -> Any:
        tensors = arguments[: self._tensors]
        if needs_operator(tensors):
            return self.overload(*arguments)
        if self._apply is not None and torch.is_grad_enabled():
            for tensor in tensors:
                if tensor is not None and tensor.requires_grad:
                    return self._apply(*tensors, arguments[self._tensors :])
        return self._forward(*arguments)


def needs_operator(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether a tracer, a dispatch mode, a function transform or a tensor subclass must see the registered operator.

    RuntimeError where TorchScript traces: it would record the sizes and the mode of one call for all.
    """
    if torch.compiler.is_compiling():
        return True
    if torch._C._is_tracing():
        _check_torchscript(tensors)
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active():
        return True
    for tensor in tensors:  # noqa: SIM110 - any() and its generator take twice as long
        if type(tensor) not in _PLAIN_TENSORS:
            return True
    return False


def _check_torchscript(tensors: tuple[torch.Tensor | None, ...]) -> None:
    exporter = sys.modules.get("torch.onnx._internal.torchscript_exporter._globals")
    if exporter is None or not exporter.GLOBALS.in_onnx_export:
        raise RuntimeError(
            "gpukern's operators are not traced by torch.jit.trace: use torch.export.export or torch.compile"
        )
    # The reference is made of torch's operators, which torch.onnx.export(dynamo=False) knows.
    if mode_of(tensors[0]) is not Mode.REFERENCE:
        raise RuntimeError("gpukern's kernels are not traced by torch.onnx.export(dynamo=False): use dynamo=True")


def _tuples(arguments: tuple) -> tuple:
    """``arguments`` with tuples for lists: the operator boundary makes lists of them, which no cache takes as keys."""
    return tuple(tuple(argument) if isinstance(argument, list) else argument for argument in arguments)


def _autograd_function(
    name: str, tensors: int, forward: Callable, save: Callable, backward: Callable
) -> type[torch.autograd.Function]:
    """The eager form: takes the tensors and one tuple of all other arguments, because every argument costs time."""

    # forward(ctx, ...) in one piece: a separate setup_context costs another 8 microseconds a call.
    def run(ctx: Any, *packed: Any) -> Any:
        arguments = packed[:-1] + packed[-1]
        output = forward(*arguments)
        save(ctx, arguments, output)
        return output

    def run_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
        by_argument = backward(ctx, *grads)
        by_tensor = by_argument[:tensors] if isinstance(by_argument, tuple) else (by_argument,)
        return *by_tensor, None

    return type(
        name, (torch.autograd.Function,), {"forward": staticmethod(run), "backward": staticmethod(run_backward)}
    )
