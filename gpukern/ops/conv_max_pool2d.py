"""A convolution, its activation and the max pool that follows, for inference: one kernel where that is faster.

The pool is that of windows that do not overlap, 2 × 2 at a stride of 2, as in VGG, LeNet and most networks for small
images. Only a quarter of the convolution's output is written, and nothing is read back.
"""

from __future__ import annotations

from typing import Any

import torch

from gpukern.conv import POOL_WINDOWS, Padding, Pair, conv_problem
from gpukern.conv import output_size as convolved_size
from gpukern.ops._pool2d.problem import output_size as pooled_size
from gpukern.ops.activation import activation as apply_activation
from gpukern.ops.activation import activation_grad, affine_jvp, needs_input
from gpukern.ops.conv2d import channel_sum, conv2d, conv2d_input_grad, conv2d_weight_grad
from gpukern.ops.pool2d import max_pool2d, max_pool2d_backward, max_pool2d_gather, max_pool2d_with_taps
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator
from gpukern.runtime.tensors import check_alike, check_bias, memory_format_of
from gpukern.runtime.transforms import Batch

_implementations = Implementations("gpukern.conv.pooled")


def _output_shape(input, weight, bias, *geometry) -> tuple[int, int, int, int]:
    """[N, K, ⌊P/2⌋, ⌊Q/2⌋]. RuntimeError, as torch raises it, for sizes and dtypes that do not fit together."""
    check_alike("conv2d", input, weight)
    check_bias("conv2d", input, bias)
    size = convolved_size(input.shape, weight.shape, None if bias is None else bias.shape, *geometry)
    convolved = input.shape[0], weight.shape[0], *size
    return *convolved[:2], *pooled_size(convolved, *POOL_WINDOWS)


def _forward(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    geometry = stride, padding, dilation, groups
    _output_shape(input, weight, bias, *geometry)
    problem = conv_problem(input.shape, weight.shape, None if bias is None else bias.shape, *geometry)
    launch = _implementations.of(input).conv2d_max_pool2d
    return launch(problem, input, weight, bias, activation, negative_slope)


def _fake(input, weight, bias, stride, padding, dilation, groups, activation, negative_slope) -> torch.Tensor:
    shape = _output_shape(input, weight, bias, stride, padding, dilation, groups)
    return input.new_empty(shape).to(memory_format=memory_format_of(input, weight))


def _save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    input, weight, bias, *geometry, activation, negative_slope = arguments
    ctx.save_for_backward(input, weight, bias)
    ctx.state = tuple(geometry), (activation, negative_slope)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple:
    # Forward did not save the convolution's output: recompute it, and the positions of its maxima.
    input, weight, bias = ctx.saved_tensors
    geometry, epilogue = ctx.state
    if needs_input(epilogue[0]):
        saved = conv2d(input, weight, bias, None, *geometry, "none", 0.0)
        y = apply_activation(saved, *epilogue)
    else:
        saved = y = conv2d(input, weight, bias, None, *geometry, *epilogue)
    _, taps = max_pool2d_with_taps(y.detach(), *POOL_WINDOWS)
    grad = max_pool2d_backward(grad, taps, y.shape, _is_last(y), *POOL_WINDOWS)
    if epilogue[0] != "none":
        grad = activation_grad(grad, saved, *epilogue)
    needs_input_grad, needs_weight_grad, needs_bias = ctx.needs_input_grad[:3]
    return (
        conv2d_input_grad(grad, weight, input.shape, _is_last(input), *geometry) if needs_input_grad else None,
        conv2d_weight_grad(grad, input, weight.shape, _is_last(weight), *geometry) if needs_weight_grad else None,
        channel_sum(grad) if needs_bias else None,
        *(None,) * 6,
    )


def _jvp(operator: Operator, arguments: tuple, tangents: tuple, output: torch.Tensor) -> torch.Tensor | None:
    inner = (*arguments[:3], None, *arguments[3:])
    y = conv2d(*inner)
    tangent = affine_jvp(conv2d, inner, (*tangents, None), y)
    if tangent is None:
        return None
    return max_pool2d_gather(tangent, max_pool2d_with_taps(y, *POOL_WINDOWS)[1], *POOL_WINDOWS)


def _is_last(tensor: torch.Tensor) -> bool:
    return memory_format_of(tensor) is torch.channels_last


def _in_torch(input, weight, bias, *others) -> torch.Tensor:
    return max_pool2d.decomposition(conv2d.decomposition(input, weight, bias, None, *others), *POOL_WINDOWS)


def _flops(of_conv, input, weight, bias, *geometry, out_shape, **_) -> int:
    return of_conv(input, weight, (*out_shape[:2], *convolved_size(input, weight, bias, *geometry[:4])))


#: ``max_pool2d(act(x ∗ w + b), 2)``: [N, C, H, W] with [K, C/groups, R, S] gives [N, K, ⌊P/2⌋, ⌊Q/2⌋], of float32,
#: float16 or bfloat16; the bias may be float32. padding is top, bottom, left, right. A NaN in a window is its maximum.
#: RuntimeError, as torch's, for sizes that do not fit together. Its backward computes the convolution once more.
conv2d_max_pool2d = Operator(
    "conv2d_max_pool2d",
    "(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, "
    "str activation, float negative_slope) -> Tensor",
    forward=_forward,
    fake=_fake,
    save=_save,
    backward=_backward,
    jvp=_jvp,
    batch=Batch(images=(0,)),
    decomposition=_in_torch,
    flops=_flops,
)
