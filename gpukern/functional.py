"""The functions of ``torch.nn.functional`` that gpukern computes itself, with the same signatures, defaults and errors.

All are differentiable and take float32, float16 and bfloat16 (on a CPU in reference mode also float64). Layouts are
kept: channels_last in, channels_last out. They follow ``torch.autocast`` as the PyTorch functions do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpukern.ops import activation as _activation
from gpukern.ops import batch_norm as _batch_norm
from gpukern.ops import conv2d as _conv2d
from gpukern.ops import conv_batch_norm as _conv_batch_norm
from gpukern.ops import conv_transpose2d as _conv_transpose2d
from gpukern.ops import linear as _linear
from gpukern.ops import pool2d as _pool2d
from gpukern.ops._batch_norm.problem import check_several_values
from gpukern.ops._conv2d.problem import same_padding
from gpukern.runtime.arguments import as_pair, check_batched_or_not, check_tensors
from gpukern.runtime.autocast import autocast
from gpukern.runtime.integers import require
from gpukern.runtime.tensors import check_alike, check_floating

__all__ = [
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm",
    "conv2d",
    "conv2d_batch_norm",
    "conv_transpose2d",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "leaky_relu",
    "linear",
    "max_pool2d",
    "relu",
    "relu6",
    "sigmoid",
    "silu",
    "tanh",
]


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> torch.Tensor:
    r"""``y[n,k,p,q] = act(Σ_{c,r,s} x[n, c, p·stride + r·dilation − padding, …] · w[k,c,r,s] + b[k] + residual[…])``.

    Parameters
    ----------
    input:
        [N, C, H, W] or one image [C, H, W]; any strides.
    weight:
        [K, C/groups, R, S].
    bias:
        [K] or None.
    stride, dilation:
        an int or a (vertical, horizontal) pair.
    padding:
        zeros added on both sides of each dimension (int or pair), ``"valid"`` (none) or ``"same"`` (stride 1 only;
        where the total is odd the bottom and the right get the larger part).
    groups:
        splits channels into independent convolutions; ``groups == C`` is a depthwise convolution.
    residual:
        gpukern's extension: what is added before the activation, of the result's shape.
    activation:
        gpukern's extension, one of :data:`gpukern.ops.activation.ACTIVATIONS`: ``"relu"``, ``"relu6"``,
        ``"leaky_relu"`` (with ``negative_slope``), ``"sigmoid"``, ``"hardsigmoid"``, ``"tanh"``, ``"silu"``,
        ``"gelu"``, ``"gelu_tanh"`` or ``"hardswish"``. It and the residual cost no extra pass over memory, but that
        training with one of the last four keeps what went into it.

    Returns
    -------
    [N, K, P, Q] with P = ⌊(H + 2·padding − dilation·(R−1) − 1)/stride⌋ + 1, in channels_last if input or weight is.
    Products are accumulated in fp32; for fp32 operands ``torch.backends.cudnn.allow_tf32`` decides about TF32.

    Raises
    ------
    RuntimeError for sizes, dtypes or devices that do not fit; TypeError for arguments of a wrong type; ValueError for
    an unknown activation. As ``torch.nn.functional.conv2d``, before anything is computed.
    """
    check_tensors("conv2d", input, weight, bias, residual)
    if input.dim() != 4 and check_batched_or_not("conv2d", input):
        return conv2d(
            input.unsqueeze(0), weight, bias, stride, padding, dilation, groups,
            residual=None if residual is None else residual.unsqueeze(0),
            activation=activation, negative_slope=negative_slope,
        ).squeeze(0)  # fmt: skip
    stride, dilation = as_pair("stride", stride), as_pair("dilation", dilation)
    padding = _sides(padding, weight, stride, dilation)
    input, weight, bias, residual = autocast(input, weight, bias, residual)
    if bias is not None and bias.dtype is not input.dtype:
        check_alike("conv2d", input, bias)  # a folded bias may be float32; torch's layers have none such
    return _conv2d.apply(
        input,
        weight,
        bias,
        residual,
        stride,
        padding,
        dilation,
        groups,
        _activation.check_activation(activation, negative_slope),
        negative_slope,
    )


def _sides(padding: int | Sequence[int] | str, weight, stride, dilation) -> tuple[int, int, int, int]:
    """(top, bottom, left, right)."""
    if isinstance(padding, str):
        return _named_padding(padding, weight, stride, dilation)
    vertical, horizontal = as_pair("padding", padding)
    return vertical, vertical, horizontal, horizontal


def _named_padding(name: str, weight, stride, dilation) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of "valid" and "same"."""
    if name == "valid":
        return 0, 0, 0, 0
    if name != "same":
        raise RuntimeError(f"invalid padding string: {name!r}, expected 'valid' or 'same'")
    if stride != (1, 1):
        raise RuntimeError("padding='same' is not supported for strided convolutions")
    return same_padding(tuple(weight.shape[2:]), dilation)


def conv_transpose2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> torch.Tensor:
    r"""``y[n, c, p·stride + r·dilation − padding, …] = act(Σ_{k,r,s} x[n,k,p,q] · w[k,c,r,s] + b[c] + residual[…])``.

    The gradient of :func:`conv2d` for its input, as an operation. ``input`` is [N, K, P, Q] or one image, ``weight``
    [K, C/groups, R, S], ``bias`` [C]; the result [N, C, H, W] has H = (P − 1)·stride − 2·padding + dilation·(R − 1) +
    output_padding + 1. All else, gpukern's extensions too, is as in :func:`conv2d`. Raises as
    ``torch.nn.functional.conv_transpose2d``, before anything is computed.
    """
    check_tensors("conv_transpose2d", input, weight, bias, residual)
    if input.dim() != 4 and check_batched_or_not("conv_transpose2d", input):
        return conv_transpose2d(
            input.unsqueeze(0), weight, bias, stride, padding, output_padding, groups, dilation,
            residual=None if residual is None else residual.unsqueeze(0),
            activation=activation, negative_slope=negative_slope,
        ).squeeze(0)  # fmt: skip
    stride, dilation = as_pair("stride", stride), as_pair("dilation", dilation)
    padding, extra = as_pair("padding", padding), as_pair("output_padding", output_padding)
    input, weight, bias, residual = autocast(input, weight, bias, residual)
    if bias is not None and bias.dtype is not input.dtype:
        check_alike("conv_transpose2d", input, bias)
    return _conv_transpose2d.apply(
        input,
        weight,
        bias,
        residual,
        stride,
        padding,
        extra,
        dilation,
        groups,
        _activation.check_activation(activation, negative_slope),
        negative_slope,
    )


def linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> torch.Tensor:
    r"""``y = act(x Wᵀ + b)``: input [*, in_features], weight [out_features, in_features] give [*, out_features].

    ``activation`` and ``negative_slope`` as in :func:`conv2d`. Accumulates in fp32; for fp32 operands
    ``torch.set_float32_matmul_precision`` decides about TF32. Raises RuntimeError for sizes, dtypes or devices that do
    not fit, TypeError and ValueError as :func:`conv2d` does.
    """
    check_tensors("linear", input, weight, bias)
    input, weight, bias = autocast(input, weight, bias)
    if bias is not None and bias.dtype is not input.dtype:
        check_alike("linear", input, bias)
    return _linear.apply(input, weight, bias, _activation.check_activation(activation, negative_slope), negative_slope)


def max_pool2d(
    input: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""``y[n,c,p,q] = max_{r,s} x[n, c, p·stride + r·dilation − padding, …]``, −∞ outside the image; NaN wins.

    Parameters
    ----------
    input:
        [N, C, H, W] or one image [C, H, W]; any strides.
    kernel_size, stride, padding, dilation:
        an int or a (vertical, horizontal) pair. ``stride`` is ``kernel_size`` by default; the padding is at most half
        of the kernel.
    ceil_mode:
        rounds the output size up, so that windows may hang over the bottom and the right; a window that would begin
        in the padding there is dropped.
    return_indices:
        also return the int64 places h·W + w of the maxima (the first of equal ones), as ``max_unpool2d`` takes them.

    Returns
    -------
    [N, C, P, Q] with P = ⌊(H + 2·padding − dilation·(R−1) − 1)/stride⌋ + 1, in the layout of ``input``; exact.

    Raises
    ------
    RuntimeError for sizes or dtypes that do not fit, TypeError for arguments of a wrong type: as
    ``torch.nn.functional.max_pool2d``, before anything is computed.
    """
    check_tensors("max_pool2d", input)
    check_floating("max_pool2d", input)
    if input.dim() != 4 and check_batched_or_not("max_pool2d", input):
        pooled = max_pool2d(input.unsqueeze(0), kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        return tuple(y.squeeze(0) for y in pooled) if return_indices else pooled.squeeze(0)
    kernel, stride = _window(kernel_size, stride)
    return _pool2d.max_pool(
        input,
        kernel,
        stride,
        as_pair("padding", padding),
        as_pair("dilation", dilation),
        _flag("ceil_mode", ceil_mode),
        _flag("return_indices", return_indices),
    )


def avg_pool2d(
    input: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    r"""``y[n,c,p,q] = Σ_{r,s} x[n, c, p·stride + r − padding, …] / divisor``, zeros outside the image.

    The divisor is the number of elements in the window, those of the padding included if ``count_include_pad`` (but
    not what hangs over the padding by ``ceil_mode``), or ``divisor_override``. The other arguments, the result and
    the errors as in :func:`max_pool2d`. Sums in fp32.
    """
    check_tensors("avg_pool2d", input)
    check_floating("avg_pool2d", input)
    if input.dim() != 4 and check_batched_or_not("avg_pool2d", input):
        return avg_pool2d(
            input.unsqueeze(0), kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        ).squeeze(0)
    kernel, stride = _window(kernel_size, stride)
    if type(divisor_override) not in (int, type(None)):
        raise TypeError(f"divisor_override must be an int or None, got {divisor_override!r}")
    return _pool2d.avg_pool2d(
        input,
        kernel,
        stride,
        as_pair("padding", padding),
        (1, 1),
        _flag("ceil_mode", ceil_mode),
        _flag("count_include_pad", count_include_pad),
        divisor_override,
    )


def adaptive_avg_pool2d(input: torch.Tensor, output_size: int | Sequence[int | None]) -> torch.Tensor:
    r"""``y[n,c,p,q]`` is the mean of x over the rows ⌊p·H/P⌋ … ⌈(p+1)·H/P⌉ − 1 and likewise columns.

    ``output_size`` is an int or a pair (P, Q), where None keeps the size of the input. input [N, C, H, W] or
    [C, H, W] gives [N, C, P, Q] or [C, P, Q] in the same layout. Sums in fp32. Raises RuntimeError for sizes or
    dtypes that do not fit, TypeError for arguments of a wrong type.
    """
    check_tensors("adaptive_avg_pool2d", input)
    check_floating("adaptive_avg_pool2d", input)
    if input.dim() != 4 and check_batched_or_not("adaptive_avg_pool2d", input):
        return adaptive_avg_pool2d(input.unsqueeze(0), output_size).squeeze(0)
    if isinstance(output_size, Sequence) and not isinstance(output_size, str):
        if len(output_size) != 2:
            raise RuntimeError(f"output_size must have 2 elements, got {output_size!r}")
        output_size = [
            size if wanted is None else wanted for wanted, size in zip(output_size, input.shape[2:], strict=True)
        ]
    return _pool2d.adaptive_avg_pool2d(input, as_pair("output_size", output_size))


def _window(kernel_size, stride) -> tuple[tuple[int, int], tuple[int, int]]:
    """(kernel, stride); a stride of None or () is the kernel's size."""
    kernel = as_pair("kernel_size", kernel_size)
    if stride is None or (isinstance(stride, (tuple, list)) and not stride):
        return kernel, kernel
    return kernel, as_pair("stride", stride)


def _flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return value


def batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> torch.Tensor:
    r"""``y = act((x − mean) / √(var + eps) · weight + bias + residual)``, for each channel.

    Parameters
    ----------
    input:
        [N, C], [N, C, L], [N, C, H, W] or [N, C, ...]; any strides.
    running_mean, running_var:
        [C], the statistics unless ``training``. With ``training`` those of the batch are used (``var`` the biased
        one), and these, which may then be None, are updated in place, without a gradient: ``r ← (1 − momentum) · r +
        momentum · new``, where the new variance is the unbiased one. An empty batch leaves them alone.
    weight, bias:
        [C] or None.
    residual, activation, negative_slope:
        gpukern's extension, as in :func:`conv2d`: ``residual`` has the input's shape. They cost no extra pass over
        memory, forward or backward, beyond reading the residual.

    float16 and bfloat16 inputs take parameters and statistics of their own dtype or of float32; computes in fp32.
    Differentiable to any order, also with frozen statistics. ``torch.autocast`` does not change it, as in torch.

    Returns
    -------
    a tensor of ``input``'s shape and dtype, in channels_last if a 4-D input is.

    Raises
    ------
    RuntimeError for sizes, dtypes or devices that do not fit and for running statistics that require a gradient or,
    without ``training``, are missing; ValueError for one value per channel in training, for one running statistic
    without the other, an ``eps`` that is not positive in training, and for an unknown activation; TypeError for
    arguments of a wrong type. As ``torch.nn.functional.batch_norm``, before anything is computed.
    """
    check_tensors("batch_norm", input, running_mean, running_var, weight, bias, residual)
    check_floating("batch_norm", input)
    _check_statistics(running_mean, running_var, training, momentum, eps)
    if training:
        check_several_values(input.shape)
    return _batch_norm.apply(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        residual,
        training,
        float(momentum),
        float(eps),
        _activation.check_activation(activation, negative_slope),
        negative_slope,
    )


def _check_statistics(running_mean, running_var, training: bool, momentum: float, eps: float) -> None:
    for name, value in (("momentum", momentum), ("eps", eps)):
        if not isinstance(value, (float, int)):
            raise TypeError(f"batch_norm(): {name} must be a float, not {type(value).__name__}")
    if training:
        if (running_mean is None) is not (running_var is None):
            raise ValueError("running_mean and running_var must either both be None or neither be None")
        if eps <= 0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    for name, statistic in (("running_mean", running_mean), ("running_var", running_var)):
        if statistic is None:
            require(training, f"{name} must be defined in evaluation mode")
        elif statistic.requires_grad:
            raise RuntimeError(f"batch_norm is not differentiable with respect to {name}: it cannot require a gradient")


def conv2d_batch_norm(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> torch.Tensor:
    r"""``batch_norm(conv2d(input, weight, bias, …), running_mean, running_var, …)``, differentiable to any order.

    In training the convolution's epilogue makes the statistics, so that its output is read once more, not twice. The
    arguments are those of :func:`conv2d`, whose input must be a batch here, and of :func:`batch_norm`: ``norm_weight``
    and ``norm_bias`` are its weight and bias [K], ``residual`` and ``activation`` follow it. Raises what these raise.
    """
    if not training:
        z = conv2d(input, weight, bias, stride, padding, dilation, groups)
        return batch_norm(
            z, running_mean, running_var, norm_weight, norm_bias, False, momentum, eps,
            residual=residual, activation=activation, negative_slope=negative_slope,
        )  # fmt: skip
    tensors = bias, running_mean, running_var, norm_weight, norm_bias, residual
    check_tensors("conv2d_batch_norm", input, weight, *tensors)
    require(input.dim() == 4, f"conv2d_batch_norm: expected a batch [N, C, H, W], got size {list(input.shape)}")
    _check_statistics(running_mean, running_var, training, momentum, eps)
    stride, dilation = as_pair("stride", stride), as_pair("dilation", dilation)
    input, weight, bias, residual = autocast(input, weight, bias, residual)
    return _conv_batch_norm.apply(
        input,
        weight,
        bias,
        norm_weight,
        norm_bias,
        residual,
        running_mean,
        running_var,
        stride,
        _sides(padding, weight, stride, dilation),
        dilation,
        groups,
        float(momentum),
        float(eps),
        _activation.check_activation(activation, negative_slope),
        negative_slope,
    )


def relu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """``y = max(x, 0)``, of the shape and layout of ``input``. ``inplace=True`` overwrites ``input``."""
    return _elementwise("relu", input, inplace)


def relu6(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """``y = min(max(x, 0), 6)``."""
    return _elementwise("relu6", input, inplace)


def leaky_relu(input: torch.Tensor, negative_slope: float = 0.01, inplace: bool = False) -> torch.Tensor:
    """``y = x`` where x > 0, ``negative_slope · x`` elsewhere. Raises ValueError for a negative slope."""
    return _elementwise("leaky_relu", input, inplace, negative_slope)


def sigmoid(input: torch.Tensor) -> torch.Tensor:
    """``y = 1 / (1 + exp(−x))``."""
    return _elementwise("sigmoid", input, inplace=False)


def hardsigmoid(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """``y = min(max(x + 3, 0), 6) / 6``."""
    return _elementwise("hardsigmoid", input, inplace)


def tanh(input: torch.Tensor) -> torch.Tensor:
    """``y = tanh(x)``."""
    return _elementwise("tanh", input, inplace=False)


def silu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """``y = x / (1 + exp(−x))``."""
    return _elementwise("silu", input, inplace)


def gelu(input: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    """``y = x Φ(x)``, Φ the normal distribution function, or with ``approximate="tanh"`` its form with a tanh.

    Raises RuntimeError for another ``approximate``.
    """
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"approximate argument must be either none or tanh, got {approximate!r}")
    return _elementwise("gelu" if approximate == "none" else "gelu_tanh", input, inplace=False)


def hardswish(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """``y = x · min(max(x + 3, 0), 6) / 6``."""
    return _elementwise("hardswish", input, inplace)


def _elementwise(name: str, input: torch.Tensor, inplace: bool, negative_slope: float = 0.0) -> torch.Tensor:
    check_tensors(name, input)
    check_floating(name, input)
    _activation.check_activation(name, negative_slope)
    compute = _activation.activation_ if inplace else _activation.activation
    return compute(input, name, negative_slope)
