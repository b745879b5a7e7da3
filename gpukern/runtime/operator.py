"""One differentiable computation, called the cheap way in eager code and the traceable way under a tracer.

Crossing PyTorch's operator boundary costs tens of microseconds in Python, so eager calls use a
``torch.autograd.Function`` or, when nothing requires a gradient, go straight to the computation. ``torch.compile``,
``torch.export``, ``make_fx`` and every other tracer see the registered ``torch.library`` operator ``gpukern::<name>``.
Both ways share the same forward, ``save`` and ``backward`` functions. Support for ``torch.func`` and forward-mode
differentiation is in :mod:`gpukern.runtime.transforms`.

An operator's computation gets tensors whose memory holds their values. Autocast was applied before, in ``functional``,
and :class:`gpukern.runtime.mode.Implementations` computes without it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, overload

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._python_dispatch import TorchDispatchMode

from gpukern.runtime.mode import Mode, mode_of
from gpukern.runtime.transforms import Batch, register_transforms, tuples

# Looked up once: each dot costs every call as much as one of these tests.
_is_tracing = torch._C._is_tracing
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active
_PLAIN_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
#: How many of the active dispatch modes only count what runs: :func:`counted_by`.
_counters = 0


#: All operators, by their overloads: see :mod:`gpukern.ops._operators`.
OPERATORS: dict[torch._ops.OpOverload, Operator] = {}


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
        gradients of gradients work. Without one, asking for a gradient is an error.
    jvp:
        ``jvp(operator, arguments, tangents, output)`` returns the tangent of each output, None for what has none, from
        those of the tensor arguments, of which some are None.
    batch:
        which arguments carry the batch; without it ``vmap`` calls the operator for one after the other.
    plain:
        the same computation in plain torch operations, which then takes the place of ``save``, ``backward`` and
        ``jvp`` under ``torch.func`` and in forward mode.
    decomposition:
        the same in overloads of ``torch.ops.aten``, of operands in one dtype, for exporters and graph rewrites: it is
        also called with proxies. For what a model's forward calls.
    flops:
        ``flops(of_conv, *arguments, out_shape)`` as :mod:`torch.utils.flop_counter` counts, with shapes for tensors;
        ``of_conv`` is its formula for convolutions. For what multiplies.
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
        jvp: Callable[..., Any] | None = None,
        batch: Batch | None = None,
        plain: Callable[..., Any] | None = None,
        decomposition: Callable[..., Any] | None = None,
        flops: Callable[..., int] | None = None,
    ) -> None:
        # Typed for those who call it, of operators that have one.
        self.decomposition: Callable[..., Any] | Any = decomposition
        self.flops = flops
        self._forward = forward
        definition = torch.library.custom_op(
            f"gpukern::{name}",
            lambda *arguments: forward(*tuples(arguments)),
            mutates_args=(),
            schema=schema,
        )
        definition.register_fake(fake)
        if save is not None and backward is not None:
            definition.register_autograd(backward, setup_context=_setup_context(save))
        self.overload = getattr(torch.ops.gpukern, name).default
        OPERATORS[self.overload] = self
        self._tensors = sum(
            str(argument.type) in ("Tensor", "Optional[Tensor]") for argument in self.overload._schema.arguments
        )
        if save is None or backward is None:
            save, backward = _save_nothing, _refuse(name)
        register_transforms(self, name, definition, self._tensors, save, backward, jvp, batch, plain)
        self._apply = _autograd_function(name, self._tensors, forward, save, backward)

    def __call__(self, *arguments: Any) -> Any:
        tensors = arguments[: self._tensors]
        if _is_watched(tensors):
            return self.overload(*arguments)
        differentiable = lazy = False
        # One loop and the cheapest test first: these are a tenth of a small layer's time on the host.
        try:
            for tensor in tensors:
                if tensor is not None:
                    if type(tensor) not in _PLAIN_TENSORS:
                        return self.overload(*arguments)
                    if tensor.requires_grad:
                        differentiable = True
                    if tensor.is_neg() or (not tensor.data_ptr() and tensor._is_zerotensor()):
                        lazy = True
        except RuntimeError:  # there is no memory to point to
            lazy = True
        if lazy:
            return self._resolve(tensors, arguments)
        if differentiable and torch.is_grad_enabled():
            return self._apply(*tensors, arguments[self._tensors :])
        return self._forward(*arguments)

    def _resolve(self, tensors: tuple[torch.Tensor | None, ...], arguments: tuple) -> Any:
        """The call with :func:`resolved` tensors; the dispatcher's error if there is one that nothing resolves."""
        given = tuple(map(resolved, tensors))
        if all(each is tensor for each, tensor in zip(given, tensors, strict=True)):
            return self.overload(*arguments)
        return self(*given, *arguments[self._tensors :])


def needs_operator(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether a tracer, a dispatch mode, a function transform, forward-mode differentiation or a tensor subclass must
    see the registered operator.

    RuntimeError where TorchScript traces: it would record the sizes and the mode of one call for all.
    """
    if _is_watched(tensors):
        return True
    for tensor in tensors:  # noqa: SIM110 - any() and its generator take twice as long
        if tensor is not None and type(tensor) not in _PLAIN_TENSORS:
            return True
    return False


@contextlib.contextmanager
def counted_by(mode: TorchDispatchMode) -> Iterator[None]:
    """Activate ``mode``, which sees torch's own operators in calls that stay as eager as without it.

    Under other dispatch modes each call goes to its registered operator, which copies more.
    """
    global _counters
    with mode:
        _counters += 1
        try:
            yield
        finally:
            _counters -= 1


def _is_watched(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """:func:`needs_operator` but for the tensors' own types."""
    if is_compiling():
        return True
    if _is_tracing():
        _check_torchscript(tensors)
    return _dispatch_modes() > _counters or _transforms_active() or forward_ad._current_level >= 0


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_lazy(tensor: torch.Tensor) -> bool:
    """Whether the memory of a real ``tensor`` holds other values than the tensor: negated ones, or none for zeros."""
    return tensor.is_neg() or tensor._is_zerotensor()


@overload
def resolved(tensor: torch.Tensor) -> torch.Tensor: ...
@overload
def resolved(tensor: torch.Tensor | None) -> torch.Tensor | None: ...
def resolved(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """``tensor`` with its values in memory, differentiably. Registered operators have PyTorch's dispatcher for this.

    It also takes off a wrapper of ``torch.func`` that outlived its transform.
    """
    if tensor is None:
        return None
    tensor = torch._C._functorch.unwrap_if_dead(tensor)
    if not is_lazy(tensor):
        return tensor
    return tensor.resolve_neg() if tensor.is_neg() else tensor.clone()


def backward_of(plain: Callable[..., Any], differentiable: int) -> Callable[..., tuple]:
    """The backward of an operator that is also there in ``plain`` torch, by whose graph it goes.

    ``save`` left the operator's tensors on ``ctx``, and all other arguments as ``ctx.state``. Only the first so many
    arguments are ``differentiable``.
    """

    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
        with torch.enable_grad():
            # Aliases of the saved tensors: gradients by them alone, and through them any higher order.
            tensors: list[Any] = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
            outputs = plain(*tensors, *ctx.state)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        needed = [i for i in range(differentiable) if ctx.needs_input_grad[i]]
        pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
        found: list[torch.Tensor | None] = [None] * (len(tensors) + len(ctx.state))
        if pairs:
            results = torch.autograd.grad(
                [y for y, _ in pairs],
                [tensors[i] for i in needed],
                [g for _, g in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
            for i, result in zip(needed, results, strict=True):
                found[i] = result
        return tuple(found)

    return backward


def _setup_context(save: Callable[..., None]) -> Callable[..., None]:
    return lambda ctx, inputs, output: save(ctx, tuples(inputs), output)


def _save_nothing(ctx: Any, arguments: tuple, output: Any) -> None:
    outputs = output if isinstance(output, tuple) else (output,)
    ctx.mark_non_differentiable(*(each for each in outputs if not each.is_floating_point()))


def _refuse(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        raise RuntimeError(f"gpukern::{name} has no derivative: gpukern offers no derivative of this order")

    return backward


def _check_torchscript(tensors: tuple[Any, ...]) -> None:
    exporter = sys.modules.get("torch.onnx._internal.torchscript_exporter._globals")
    if exporter is None or not exporter.GLOBALS.in_onnx_export:
        raise RuntimeError(
            "gpukern's operators are not traced by torch.jit.trace: use torch.export.export or torch.compile"
        )
    # The reference is made of torch's operators, which torch.onnx.export(dynamo=False) supports.
    if mode_of(tensors[0]) is not Mode.REFERENCE:
        raise RuntimeError("gpukern's kernels are not traced by torch.onnx.export(dynamo=False): use dynamo=True")


def _autograd_function(
    name: str, tensors: int, forward: Callable, save: Callable, backward: Callable
) -> Callable[..., Any]:
    """The eager form: takes the tensors and one tuple of all other arguments, because every argument costs time.

    Without ``torch.autograd.Function.apply`` in Python around it, which takes a microsecond to look for transforms and
    for tensors that outlived theirs: the caller has excluded both.
    """

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

    methods = {"forward": staticmethod(run), "backward": staticmethod(run_backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)
    return super(torch.autograd.Function, function).apply
