"""Operators under ``torch.func``'s transforms and in forward-mode differentiation.

PyTorch's own registration of operators supports neither: forward mode silently drops the tangents. Here each
operator gets a ``torch.autograd.Function`` with a rule for every transform, and the dispatcher calls it wherever a
transform is active or an argument carries a tangent. Its forward is the operator again, one level further down.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._functorch.pyfunctorch import TransformType, retrieve_current_functorch_interpreter
from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI
from torch.autograd import forward_ad


class Batch(NamedTuple):
    """The rule by which ``vmap`` merges many calls into one: more images in a batch.

    ``images``: the places of the arguments, and ``sizes`` that of a shape, whose first dimension is the batch's, as is
    that of every output. A call where another tensor is mapped over is not merged.
    """

    images: tuple[int, ...]
    sizes: int | None = None


def register_transforms(
    operator: Any,
    name: str,
    definition: Any,
    tensors: int,
    save: Callable[..., None],
    backward: Callable[..., Any],
    jvp: Callable[..., Any] | None,
    batch: Batch | None,
    plain: Callable[..., Any] | None,
) -> None:
    """Register ``operator``'s transform rules with the dispatcher; see :class:`gpukern.runtime.operator.Operator`."""
    transformed = plain or _function(operator, name, tensors, save, backward, jvp, batch).apply
    without_tangents = torch._library.autograd.make_autograd_impl(operator.overload, definition)

    def differentiated(keyset: Any, *arguments: Any) -> Any:
        if any(_tangent(argument) is not None for argument in arguments[:tensors]):
            return transformed(*tuples(arguments))
        return without_tangents(keyset, *arguments)

    def in_front(*arguments: Any) -> Any:
        interpreter = retrieve_current_functorch_interpreter()
        if interpreter.key() == TransformType.Functionalize:
            return _functionalized(operator.overload, interpreter, arguments)
        return transformed(*tuples(arguments))

    library = definition._lib
    library.impl(name, in_front, "FuncTorchDynamicLayerFrontMode")
    with warnings.catch_warnings():
        # Replacing the kernel that torch.library registered is intended.
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        library.impl(name, differentiated, "Autograd", with_keyset=True, allow_override=True)


def _functionalized(overload: Any, interpreter: Any, arguments: tuple) -> Any:
    """Call the operator on the unwrapped tensors: it changes none of its arguments."""
    functional = FunctorchFunctionalizeAPI(interpreter)
    with functional.redispatch_to_next():
        return functional.wrap_tensors(overload(*functional.unwrap_tensors(arguments)))


def overwrite(target: torch.Tensor, value: torch.Tensor) -> None:
    """Do ``target.copy_(value)``, also where a differentiating transform was not given ``target``: it refuses that for
    ``copy_``, but not for torch's batch norm, whose running statistics have no derivatives."""
    functorch = torch._C._functorch
    if torch._C._are_functorch_transforms_active() and not functorch.is_functorch_wrapped_tensor(target):
        while functorch.is_gradtrackingtensor(value):
            value = functorch.get_unwrapped(value)
        if not functorch.is_functorch_wrapped_tensor(value):
            with torch._C._DisableFuncTorch():
                target.copy_(value)
            return
    target.copy_(value)


def tuples(arguments: tuple) -> tuple:
    """Return ``arguments`` with tuples for lists: the operator boundary makes lists, which cannot be cache keys."""
    return tuple(tuple(argument) if isinstance(argument, list) else argument for argument in arguments)


def _tangent(argument: torch.Tensor | None) -> torch.Tensor | None:
    if argument is None or forward_ad._current_level < 0:
        return None
    return forward_ad.unpack_dual(argument).tangent


class _Alive:
    """A context whose saved tensors kernels can read: the function that ``torch.func.vjp`` returns is called when the
    transform is over, and the tensors saved meanwhile are still wrapped for it. The dispatcher unwraps such tensors."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    @property
    def saved_tensors(self) -> tuple[torch.Tensor | None, ...]:
        unwrap = torch._C._functorch.unwrap_if_dead
        return tuple(None if tensor is None else unwrap(tensor) for tensor in self._ctx.saved_tensors)


def _function(
    operator: Callable[..., Any],
    name: str,
    tensors: int,
    save: Callable[..., None],
    backward: Callable[..., Any],
    jvp: Callable[..., Any] | None,
    batch: Batch | None,
) -> type[torch.autograd.Function]:
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        save(ctx, inputs, output)
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.save_for_forward(*inputs[:tensors], *outputs)
        ctx.others = inputs[tensors:]
        # Most tangents are zero: do not materialize them.
        ctx.set_materialize_grads(False)

    def run_backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        return backward(_Alive(ctx), *grads)

    def run_jvp(ctx: Any, *tangents: torch.Tensor | None) -> Any:
        if jvp is None:
            raise NotImplementedError(f"gpukern::{name} has no forward-mode derivative")
        saved = ctx.saved_tensors
        outputs = saved[tensors:]
        output = outputs if len(outputs) > 1 else outputs[0]
        return jvp(operator, (*saved[:tensors], *ctx.others), tangents[:tensors], output)

    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple[Any, Any]:
        mapped = [i for i in range(tensors) if in_dims[i] is not None]
        if batch is not None and set(mapped) <= set(batch.images):
            return _as_one_batch(operator, info.batch_size, in_dims, arguments, batch)
        if info.batch_size == 0:
            raise RuntimeError(f"gpukern::{name}: vmap over a dimension of size 0 is not supported here")
        return _one_by_one(operator, info.batch_size, mapped, in_dims, arguments)

    functions = {
        "forward": operator.__call__,  # type: ignore[operator]
        "setup_context": setup_context,
        "backward": run_backward,
        "jvp": run_jvp,
        "vmap": vmap,
    }
    return type(name, (torch.autograd.Function,), {key: staticmethod(value) for key, value in functions.items()})


def _as_one_batch(
    operator: Callable[..., Any], count: int, in_dims: tuple, arguments: tuple, batch: Batch
) -> tuple[Any, Any]:
    given = list(arguments)
    for i in batch.images:
        if given[i] is not None:
            each = given[i].expand(count, *given[i].shape) if in_dims[i] is None else given[i].movedim(in_dims[i], 0)
            images = each.shape[1]
            given[i] = each.flatten(0, 1)
    if batch.sizes is not None:
        given[batch.sizes] = (count * images, *given[batch.sizes][1:])
    output = operator(*given)
    if isinstance(output, tuple):
        return tuple(each.unflatten(0, (count, images)) for each in output), (0,) * len(output)
    return output.unflatten(0, (count, images)), 0


def _one_by_one(
    operator: Callable[..., Any], count: int, mapped: list[int], in_dims: tuple, arguments: tuple
) -> tuple[Any, Any]:
    outputs = []
    for place in range(count):
        given = list(arguments)
        for i in mapped:
            given[i] = given[i].select(in_dims[i], place)
        outputs.append(operator(*given))
    if isinstance(outputs[0], tuple):
        return tuple(torch.stack(each) for each in zip(*outputs, strict=True)), (0,) * len(outputs[0])
    return torch.stack(outputs), 0


# ---- tangents of operators that are linear in their operands -------------------------------------------------------


def total(*parts: torch.Tensor | None) -> torch.Tensor | None:
    """Return the sum of the terms that are not None; None if all are."""
    given = [part for part in parts if part is not None]
    return sum(given[1:], given[0]) if given else None


def linear_jvp(operator: Callable[..., Any], arguments: tuple, tangents: tuple, output: Any) -> torch.Tensor | None:
    """The tangent of an operator that is linear in its first argument and has no derivative by any other."""
    return None if tangents[0] is None else operator(tangents[0], *arguments[1:])


def bilinear_jvp(operator: Callable[..., Any], arguments: tuple, tangents: tuple, output: Any) -> torch.Tensor | None:
    """The product rule for an operator that is linear in each of its first two arguments."""
    (a, b, *others), (da, db) = arguments, tangents
    return total(
        None if da is None else operator(da, b, *others),
        None if db is None else operator(a, db, *others),
    )


def sum_jvp(operator: Callable[..., Any], arguments: tuple, tangents: tuple, output: Any) -> torch.Tensor | None:
    """The tangent of ``operator(x, w, bias[, residual], …)``: a product of x and w, and what is added to it."""
    nothing = (None,) * (len(tangents) - 2)
    (x, w), others = arguments[:2], arguments[len(tangents) :]
    dx, dw, dbias, *dresidual = tangents
    if dbias is not None:
        # The bias is [K] beside [M, K] in linear layers, and beside [N, K, P, Q] in convolutions.
        dbias = dbias.view(-1, *(1,) * (output.dim() - 2)).to(output.dtype).expand(output.shape)
    return total(
        None if dx is None else operator(dx, w, *nothing, *others),
        None if dw is None else operator(x, dw, *nothing, *others),
        dbias,
        *dresidual,
    )
