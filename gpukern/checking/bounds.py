"""Bounds on the error of one layer that got the same inputs as float64, rounded to the dtype.

Convolutions and linear layers are sums of n products, forward and backward, and every element must obey

    |y − ref| ≤ (6 · 2⁻²³ · √n + ε_product) · (|x| ∗ |w|) + eps(dtype) · |ref| + smallest subnormal

as in :mod:`gpukern.tune.check`: rounding errors of random sign walk √n steps of at most 2⁻²³, which six standard
deviations cover; ε_product is that of TF32, or of three TF32 products (:mod:`gpukern.runtime.precision`). |x| ∗ |w| is
the layer's own result for absolute values, n its result for ones.

Other layers of torch compute in float32 and round once. Their sensitivity is measured: S, the root mean square change
of an element, in float64, when every input, weight and incoming gradient changes by a random relative 2⁻²³, is what one
rounding of each operand does; as a sum of n terms may round its partial sums n times,

    |y − ref| ≤ 6 · √n · (S + mean S) + eps(dtype) · |ref| + smallest subnormal

n, the number of values that an element depends on, is counted by automatic differentiation. The mean, without the
largest twentieth, is for elements whose few draws were small by chance. Where an element depends on one value alone, a
rounding of that is added, 2⁻²³ · |x|, and of the incoming gradient to the input's: functions cancel inside, as GELU
does.

Layers with layers or functions inside round in between, and where a sign changes by that, gradients jump. For those,
for neighbours that are computed as one, and for layers whose gradient is computed from the rounded output, the norm of
the error is bounded, by six times that of the change when all operands and all that inner layers return change by a
random relative unit roundoff.
"""

from __future__ import annotations

import copy
import math

import torch
from torch.nn.modules import rnn, transformer

from gpukern.checking.layer import INPUT_GRAD, OUTPUT, Call, compute, restore
from gpukern.checking.models import floating
from gpukern.runtime.mode import Mode, mode_of
from gpukern.runtime.precision import TF32_CUT, TF32X3, conv_precision, matmul_precision

SIGMAS = 6.0
_SUM = 2.0**-23
_SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
#: Random changes of a layer's operands.
_DRAWS = 4
#: Elements whose terms are counted, of each tensor.
_COUNTED = 2
_PRODUCTS = (
    *(torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d),
    *(torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d),
)
_SEVERAL_STEPS = tuple(module.__name__ for module in (rnn, transformer))
_FROM_OUTPUT = ("Softmax", "Softmax2d", "Softmin", "LogSoftmax", "Tanh", "Sigmoid")
#: The share of elements whose change is typical.
_TYPICAL = 0.95

#: Of each element, or of the norm of the error.
Bound = torch.Tensor | float


def smallest(dtype: torch.dtype) -> float:
    return _SMALLEST[dtype]


def product_error(like: torch.Tensor, dtype: torch.dtype) -> float:
    """The relative error of a product of two operands of ``dtype`` on the device of ``like``."""
    if dtype is not torch.float32 or mode_of(like) is Mode.REFERENCE:
        return 0.0
    return TF32_CUT if "tf32" in (conv_precision(dtype), matmul_precision(dtype)) else TF32X3


def bounds_of(
    module: torch.nn.Module, call: Call, truth: dict[str, torch.Tensor], dtype: torch.dtype, products: float
) -> dict[str, Bound]:
    """Return the bound of every tensor of ``truth``. ``module`` and ``call`` are in float64."""
    kind = type(module)
    if kind in _PRODUCTS:
        return _of_products(module, call, truth, dtype, products)
    single = not any(module.children()) and kind.__module__.startswith(("torch.nn.", "gpukern.nn."))
    if single and kind.__module__ not in _SEVERAL_STEPS and kind.__name__ not in _FROM_OUTPUT:
        return dict(_of_elements(module, call, truth, dtype))
    return _of_norms(module, call, truth, dtype, products)


def _of_products(
    module: torch.nn.Module, call: Call, truth: dict[str, torch.Tensor], dtype: torch.dtype, products: float
) -> dict[str, Bound]:
    absolute = _compute_with(module, call, torch.abs)
    terms = _compute_with(module, call, torch.ones_like)
    return {
        name: (SIGMAS * _SUM * terms[name].sqrt() + products) * absolute[name] + _rounding(tensor, dtype)
        for name, tensor in truth.items()
        if name in absolute
    }


def _compute_with(module: torch.nn.Module, call: Call, function) -> dict[str, torch.Tensor]:
    twin = copy.deepcopy(module)
    for parameter in twin.parameters():
        parameter.data = function(parameter.data)
    return compute(twin, call.map(function, function)).tensors


def _of_elements(
    module: torch.nn.Module, call: Call, truth: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    squares = {name: torch.zeros_like(tensor) for name, tensor in truth.items()}
    for changed in _changes(module, call, _SUM):
        for name, tensor in changed.items():
            if name in squares:
                squares[name] += (tensor - truth[name]) ** 2
    terms = _terms(module, call)
    given = sum(each.numel() for each in floating((call.args, call.kwargs)))
    found: dict[str, torch.Tensor] = {}
    for name, tensor in truth.items():
        change = (squares[name] / _DRAWS).sqrt()
        moved = change[change > 0]
        if moved.numel():
            largest = moved.kthvalue(max(1, int(_TYPICAL * moved.numel()))).values
            # An element that no change reaches is a copy.
            change = torch.where(change > 0, change + moved.clamp(max=largest).mean(), change)
        # What has no derivative, such as running statistics, is made of all that the layer got.
        count = terms.get(name) or max(1, given // max(1, tensor.numel()))
        found[name] = SIGMAS * math.sqrt(count) * change + _rounding(tensor, dtype)
    inputs, grad = floating((call.args, call.kwargs)), call.grads[0]
    if terms.get(OUTPUT) == 1 and len(inputs) == 1 and inputs[0].shape == truth[OUTPUT].shape:
        found[OUTPUT] += _SUM * inputs[0].abs()
        if grad is not None and INPUT_GRAD in found:
            found[INPUT_GRAD] += _SUM * grad.abs()
    return found


def _of_norms(
    module: torch.nn.Module, call: Call, truth: dict[str, torch.Tensor], dtype: torch.dtype, products: float
) -> dict[str, Bound]:
    # Sums inside are rounded in float32, whatever the dtype.
    roundoff = torch.finfo(dtype).eps / 2 + 8 * _SUM + products
    squares = dict.fromkeys(truth, 0.0)
    for changed in _changes(module, call, roundoff):
        for name, tensor in changed.items():
            if name in squares:
                squares[name] += _norm(tensor - truth[name]) ** 2
    return {
        name: SIGMAS * math.sqrt(squares[name] / _DRAWS) + _norm(_rounding(tensor, dtype))
        for name, tensor in truth.items()
    }


def _norm(tensor: torch.Tensor) -> float:
    return tensor.norm().item()


def _rounding(truth: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.finfo(dtype).eps * truth.abs() + smallest(dtype)


def _changes(module: torch.nn.Module, call: Call, relative: float):
    """Yield results for operands, and results of inner layers, that changed by a random ``relative`` amount."""
    twin = copy.deepcopy(module)
    buffers = [buffer.clone() for buffer in twin.buffers()]
    values = [parameter.data for parameter in twin.parameters()]
    generator = torch.Generator().manual_seed(0)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        # On the CPU, so that it is the same on all devices.
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
        return tensor * (1 + relative * noise)

    # What a maximum chooses among must stay in order: equal values are frequent in 16 bits.
    choosing = "MaxPool" in type(module).__name__
    handles = [
        inner.register_forward_hook(lambda _, __, output: disturbed(output, change))
        for inner in twin.modules()
        if inner is not twin and not any(inner.children())
    ]
    for _ in range(_DRAWS):
        restore(twin, buffers)
        for parameter, value in zip(twin.parameters(), values, strict=True):
            parameter.data = change(value)
        yield compute(twin, call.map((lambda tensor: tensor) if choosing else change, change)).tensors
    for handle in handles:
        handle.remove()


def disturbed(output, change):
    """``output`` of a layer, and the gradient that comes back to it, changed by ``change``."""
    if not isinstance(output, torch.Tensor) or not output.is_floating_point():
        return output
    changed = change(output)
    if changed.requires_grad:
        changed.register_hook(change)
    return changed


def _terms(module: torch.nn.Module, call: Call) -> dict[str, int]:
    """How many values a few elements of each result depend on; at least one."""
    try:
        results = compute(copy.deepcopy(module), call, create_graph=True)
    except (RuntimeError, NotImplementedError):  # no second derivative
        return {}
    found = {}
    for name, tensor in results.tensors.items():
        if not tensor.requires_grad or not tensor.numel():
            continue
        counts = [_dependencies(tensor, place, results.sources) for place in _places(tensor)]
        found[name] = max(1, *counts)
    return found


def _places(tensor: torch.Tensor) -> list[int]:
    """Elements spread over ``tensor``, that is flat."""
    return [(2 * number + 1) * tensor.numel() // (2 * _COUNTED) for number in range(_COUNTED)]


def _dependencies(tensor: torch.Tensor, place: int, sources: list[torch.Tensor]) -> int:
    element = tensor.flatten()[place]
    grads = torch.autograd.grad(element, sources, retain_graph=True, allow_unused=True)
    return sum(int(grad.count_nonzero()) for grad in grads if grad is not None)
