"""One differentiable computation, called the cheap way in eager code and the traceable way under a tracer.

Crossing PyTorch's operator boundary costs tens of microseconds in Python, so eager calls use a
``torch.autograd.Function`` or, when nothing requires a gradient, go straight to the computation. ``torch.compile``,
``torch.export``, ``make_fx`` and every other tracer see the registered ``torch.library`` operator ``gpukern::<name>``.
Both ways share the same forward, ``save`` and ``backward`` functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter, type(None))


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
        self.name = name
        self._forward = forward
        definition = torch.library.custom_op(f"gpukern::{name}", forward, mutates_args=(), schema=schema)
        definition.register_fake(fake)
        if backward is not None:
            definition.register_autograd(backward, setup_context=lambda ctx, inputs, output: save(ctx, inputs, output))
        self.overload = getattr(torch.ops.gpukern, name).default
        self._tensors = sum(
            str(argument.type) in ("Tensor", "Optional[Tensor]") for argument in self.overload._schema.arguments
        )
        self._function = None if backward is None else _autograd_function(name, forward, save, backward)

    def __call__(self, *arguments: Any) -> Any:
        tensors = arguments[: self._tensors]
        if is_traced(tensors):
            return self.overload(*arguments)
        if self._function is not None and torch.is_grad_enabled():
            for tensor in tensors:
                if tensor is not None and tensor.requires_grad:
                    return self._function.apply(*arguments)
        return self._forward(*arguments)


def is_traced(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether a tracer, a dispatch mode or a tensor subclass is at work, so that the registered operator must be called."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        return True
    return any(type(tensor) not in _PLAIN_TENSORS for tensor in tensors)


def _autograd_function(
    name: str, forward: Callable, save: Callable, backward: Callable
) -> type[torch.autograd.Function]:
    # forward(ctx, ...) in one piece: a separate setup_context costs another 8 microseconds a call.
    def run(ctx: Any, *arguments: Any) -> Any:
        output = forward(*arguments)
        save(ctx, arguments, output)
        return output

    return type(name, (torch.autograd.Function,), {"forward": staticmethod(run), "backward": staticmethod(backward)})
