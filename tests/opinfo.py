"""PyTorch's own samples of its operators and modules (OpInfo, ModuleInfo), against float64.

Every sample runs three times: PyTorch's operator in float64, which is the truth; the same in the dtype, for the shapes,
dtypes and strides of the results; and ours. An element is right when

    |y − ref| ≤ 2 · eps · |ref| + 16 · spread + smallest

with ``spread`` the most that float64 changes anywhere in that result when each input is perturbed by one rounding to
its dtype, in three draws: a stable algorithm's errors are those of its inputs and stay within a few of these. Where a
result cancels whatever its inputs are (a norm's gradient of two values), PyTorch's own error in the dtype counts as
spread too, up to 64 roundings of the largest value at hand. That holds for any operator and finds what is wrong, not
what is a rounding too much; for the latter each operator has tests of its own, with bounds of :mod:`tests.numerics`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map

from tests.device import DEVICE

Call = Callable[..., Any]


@cache
def _databases() -> tuple[dict[tuple[str, str], Any], dict[str, Any]]:
    # PyTorch's test utilities would freeze the flags of torch.backends for the process that imports them.
    with patch.object(torch.backends, "disable_global_flags", lambda: None), patch.dict(os.environ):
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import module_db
    return {(op.name, op.variant_test_name): op for op in op_db}, {info.module_cls.__name__: info for info in module_db}


def check_samples(
    name: str,
    ours: Call,
    dtype: torch.dtype = torch.float32,
    *,
    variant: str = "",
    theirs: Call | None = None,
    gradients: bool = True,
    only: Callable[[Any], bool] = lambda sample: True,
    at_most: int = 60,
    device: torch.device = DEVICE,
) -> None:
    """Compare ``ours(input, *args, **kwargs)`` on the samples of the operator ``name``, with all gradients.

    ``only(sample)`` picks samples: say in the test why the others are none of ours. Of more than ``at_most`` (pools
    have thousands) every n-th is taken.
    """
    op = _databases()[0][name, variant]
    theirs = theirs or op.op
    found = [s for s in op.sample_inputs(device, dtype, requires_grad=gradients) if only(s)]
    assert found, f"no sample of {name}"
    for sample in found[:: math.ceil(len(found) / at_most)]:
        arguments = ((sample.input, *sample.args), sample.kwargs)
        _compare(f"{name}{_shown(arguments)}", theirs, ours, arguments, dtype)


def check_errors(
    name: str,
    ours: Call,
    *,
    variant: str = "",
    only: Callable[[Any], bool] = lambda error: True,
    device: torch.device = DEVICE,
) -> None:
    """Ours refuses every error sample of the operator ``name`` with PyTorch's type of error, in words of its own."""
    op = _databases()[0][name, variant]
    found = [e for e in op.error_inputs(device) if only(e)]
    assert found, f"no error input of {name}"
    for error in found:
        sample = error.sample_input
        arguments = ((sample.input, *sample.args), sample.kwargs)
        with pytest.raises(error.error_type):
            ours(*arguments[0], **arguments[1])
            pytest.fail(f"accepted {_shown(arguments)}")


def check_module(
    ours: type[torch.nn.Module],
    dtype: torch.dtype = torch.float32,
    *,
    name: str | None = None,
    training: bool = True,
    only: Callable[[Any], bool] = lambda sample: True,
    device: torch.device = DEVICE,
) -> None:
    """Compare the module ``ours`` with ``torch.nn``'s of the same name on every sample of it, with all gradients.

    Constructors get the same arguments; the state is copied, so that both start alike, and must be alike afterwards.
    """
    info = _databases()[1][name or ours.__name__]
    samples = info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=training)
    found = [s for s in samples if only(s)]
    assert found, f"no sample of {info.module_cls.__name__}"
    for sample in found:
        _compare_modules(info.module_cls, ours, sample, dtype, training, device)


def check_module_errors(
    ours: type[torch.nn.Module],
    *,
    name: str | None = None,
    only: Callable[[Any], bool] = lambda error: True,
    device: torch.device = DEVICE,
) -> None:
    """``ours`` refuses every error sample of ``torch.nn``'s module of the same name as that does."""
    from torch.testing._internal.common_modules import ModuleErrorEnum

    info = _databases()[1][name or ours.__name__]
    errors = info.module_error_inputs_func(info, device=device, dtype=torch.float32, requires_grad=False, training=True)
    found = [e for e in errors if only(e)]
    assert found, f"no error input of {info.module_cls.__name__}"
    for error in found:
        construction, forward = error.module_error_input.constructor_input, error.module_error_input.forward_input
        with pytest.raises(error.error_type):
            module = ours(*construction.args, **construction.kwargs)
            if error.error_on == ModuleErrorEnum.FORWARD_ERROR:
                module.to(device)(*forward.args, **forward.kwargs)


def _compare(name: str, theirs: Call, ours: Call, arguments: Any, dtype: torch.dtype) -> None:
    seed = int(torch.randint(2**31, ()))
    truth, _ = _results(theirs, _in_float64(arguments), seed, dtype)
    spread = [torch.zeros((), dtype=torch.float64) for _ in truth]
    for _ in range(3):
        moved, _ = _results(theirs, _in_float64(arguments, perturbed=True), seed, dtype, perturbed=True)
        for i, (a, b) in enumerate(zip(truth, moved, strict=True)):
            if a is not None and a.numel() and a.is_floating_point():
                spread[i] = torch.maximum(spread[i], (a - b).abs().nan_to_num(0.0, 0.0, 0.0).max().cpu())
    expected, count = _results(theirs, _alike(arguments), seed, dtype)
    limit = 64 * torch.finfo(dtype).eps * max(map(_largest, [*tree_flatten(arguments)[0], *truth]))
    for i, (a, b) in enumerate(zip(truth, expected, strict=True)):
        if a is not None and b is not None:
            spread[i] = torch.clamp(spread[i], min=min(_largest(a - b), limit / 16))
    actual, _ = _results(ours, _alike(arguments), seed, dtype)
    assert len(actual) == len(truth), f"{name}: {len(actual)} results, expected {len(truth)}"
    for i, (got, reference, like) in enumerate(zip(actual, truth, expected, strict=True)):
        what = f"{name}: {'result' if i < count else 'gradient'} {i if i < count else i - count}"
        assert_alike(what, got, reference, like, spread[i], dtype, strides=i < count)


def _largest(value: Any) -> float:
    """The largest finite magnitude in a tensor of floating point, 0 for anything else."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.numel():
        return 0.0
    return float(value.detach().abs().nan_to_num(0.0, 0.0, 0.0).max())


def assert_alike(
    what: str,
    got: torch.Tensor | None,
    truth: torch.Tensor | None,
    like: torch.Tensor | None,
    spread: torch.Tensor,
    dtype: torch.dtype,
    *,
    strides: bool,
) -> None:
    """``got`` lies within the bound of ``truth`` and has the shape, dtype and, if asked, strides of ``like``."""
    assert (got is None) == (truth is None), f"{what}: {'missing' if got is None else 'not expected'}"
    if got is None or truth is None or like is None:
        return
    assert got.shape == like.shape, f"{what}: shape {tuple(got.shape)}, PyTorch's {tuple(like.shape)}"
    assert got.dtype == like.dtype, f"{what}: {got.dtype}, PyTorch's {like.dtype}"
    if strides and got.numel():
        shown = [s for n, s in zip(got.shape, got.stride(), strict=True) if n > 1]
        theirs = [s for n, s in zip(like.shape, like.stride(), strict=True) if n > 1]
        assert shown == theirs, f"{what}: strides {got.stride()}, PyTorch's {like.stride()}"
    if not got.is_floating_point():
        assert torch.equal(got.cpu(), truth.cpu()), f"{what}: differs"
        return
    info = torch.finfo(got.dtype)
    bound = 2 * info.eps * truth.abs().cpu() + 16 * spread + info.smallest_normal * info.eps
    actual, reference = got.double().cpu(), truth.double().cpu()
    right = ((actual - reference).abs() <= bound) | (actual == reference) | (actual.isnan() & reference.isnan())
    # What float64 holds and the dtype does not: infinite on both sides of the rounding.
    right |= (reference.abs() > info.max) & (actual.isinf() | (actual.abs() == info.max))
    if not right.all():
        where = tuple((~right).nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int((~right).sum())} of {right.numel()} out of bound; at {where} got {actual[where]:.9g}, "
            f"expected {reference[where]:.9g}, bound {float(torch.broadcast_to(bound, right.shape)[where]):.3g}"
        )


def _compare_modules(
    theirs: type[torch.nn.Module],
    ours: type[torch.nn.Module],
    sample: Any,
    dtype: torch.dtype,
    training: bool,
    device: Any,
) -> None:
    construction, forward = sample.constructor_input, sample.forward_input
    name = (
        f"{theirs.__name__}{_shown((construction.args, construction.kwargs))}{_shown((forward.args, forward.kwargs))}"
    )
    torch_module = theirs(*construction.args, **construction.kwargs).to(device, dtype).train(training)
    module = ours(*construction.args, **construction.kwargs).to(device, dtype).train(training)
    assert list(module.state_dict()) == list(torch_module.state_dict()), f"{name}: other names in its state"
    module.load_state_dict(torch_module.state_dict())
    assert repr(module) == repr(torch_module), f"{name}: {module!r}"
    state = {k: v.clone() for k, v in torch_module.state_dict().items()}
    names = [n for n, _ in torch_module.named_parameters()]

    def call(of: torch.nn.Module) -> Call:
        def run(parameters: list[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            buffers = {
                k: v.clone().double()
                if parameters_are_double(parameters, args) and v.is_floating_point()
                else v.clone()
                for k, v in state.items()
                if k not in names
            }
            result = torch.func.functional_call(
                of, {**dict(zip(names, parameters, strict=True)), **buffers}, args, kwargs
            )
            return result, list(buffers.values())

        return run

    parameters = [p.detach().clone().requires_grad_(p.requires_grad) for p in torch_module.parameters()]
    arguments = ((parameters, forward.args, forward.kwargs), {})
    _compare(name, call(torch_module), call(module), arguments, dtype)


def parameters_are_double(parameters: list[torch.Tensor], args: tuple[Any, ...]) -> bool:
    return any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in (*parameters, *args))


def _results(
    call: Call, arguments: Any, seed: int, dtype: torch.dtype, perturbed: bool = False
) -> tuple[list[torch.Tensor | None], int]:
    """The tensors of ``call``'s result, then the gradients of all inputs that require one; and how many results."""
    args, kwargs = arguments
    inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor) and t.requires_grad]
    torch.manual_seed(seed)  # of what draws
    outputs = [t for t in tree_flatten(call(*args, **kwargs))[0] if isinstance(t, torch.Tensor)]
    of = [t for t in outputs if t.requires_grad and t.grad_fn is not None]
    found: list[torch.Tensor | None] = [t.detach() for t in outputs]
    if inputs and of:
        generator = torch.Generator().manual_seed(seed)
        along = [torch.randn(t.shape, generator=generator).to(dtype).to(t.device, t.dtype) for t in of]
        along = [_perturbed(t, dtype) if perturbed else t for t in along]
        found += torch.autograd.grad(of, inputs, along, allow_unused=True)
    return found, len(outputs)


def _alike(arguments: Any) -> Any:
    """Fresh leaves with the values, strides and offsets of the arguments' tensors."""

    def copy(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().clone(memory_format=torch.preserve_format).requires_grad_(value.requires_grad)

    return tree_map(copy, arguments)


def _in_float64(arguments: Any, perturbed: bool = False) -> Any:
    def widen(value: Any) -> Any:
        if isinstance(value, torch.dtype) and value in (torch.float16, torch.bfloat16, torch.float32):
            return torch.float64
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        wide = value.detach().double()
        if perturbed:
            wide = _perturbed(wide, value.dtype)
        return wide.requires_grad_(value.requires_grad)

    return tree_map(widen, arguments)


def _perturbed(wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return wide * (1 + torch.finfo(dtype).eps * (2 * torch.rand_like(wide) - 1))


def _shown(arguments: Any) -> str:
    def short(value: Any) -> Any:
        return f"<{tuple(value.shape)}>" if isinstance(value, torch.Tensor) else value

    args, kwargs = tree_map(short, arguments)
    return re.sub(r"'(<.*?>)'", r"\1", f"({', '.join([*map(repr, args), *(f'{k}={v!r}' for k, v in kwargs.items())])})")
