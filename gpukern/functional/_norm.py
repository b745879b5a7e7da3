"""Batch norm, alone and after a convolution; group norm and instance norm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gpukern.functional._conv import conv2d, sides
from gpukern.ops import batch_norm as _batch_norm
from gpukern.ops import conv_batch_norm as _conv_batch_norm
from gpukern.ops import group_norm as _group_norm
from gpukern.ops import instance_norm as _instance_norm
from gpukern.ops._batch_norm.problem import check_several_values
from gpukern.ops.activation import check_activation
from gpukern.runtime.amp import autocast, autocast_to_float32
from gpukern.runtime.arguments import as_bool, as_float, as_int, as_pair, check_tensors
from gpukern.runtime.integers import require
from gpukern.runtime.tensors import check_floating


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
        [N, C], [N, C, L], [N, C, H, W], [N, C, D, H, W] or [N, C, ...]; any strides.
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
    Differentiable to any order, also with frozen statistics; second and higher derivatives are computed in plain torch.
    ``torch.autocast`` does not change it, as in torch; a residual of another dtype there promotes the result, as a sum.
    See Ioffe and Szegedy, "Batch Normalization", 2015.

    Returns
    -------
    a tensor of ``input``'s shape and dtype, in channels_last if a 4-D input is, in channels_last_3d if a 5-D one is.

    Raises
    ------
    RuntimeError for sizes (IndexError for one dimension without statistics), dtypes or devices that do not fit and for
    running statistics that require a gradient or, without ``training``, are missing; ValueError for one value per
    channel in training, for one running statistic without the other, an ``eps`` that is negative or, in training, not
    positive, and for an unknown activation; TypeError for arguments of a wrong type. As
    ``torch.nn.functional.batch_norm``, before anything is computed.
    """
    check_tensors("batch_norm", input, optional=(running_mean, running_var, weight, bias, residual))
    check_floating("batch_norm", input)
    momentum, eps = as_float("momentum", momentum), as_float("eps", eps)
    if input.dim() == 1 and not input.numel():
        return input.clone()  # as torch's, whatever the channels
    _check_statistics(running_mean, running_var, training, eps)
    if training:
        check_several_values(input.shape)
    if input.dim() == 1 and not (running_mean is not None and running_mean.numel()):
        raise IndexError(f"batch_norm: expected an input of 2 dimensions at least, got size {list(input.shape)}")
    return _batch_norm.apply(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        residual,
        training,
        momentum,
        eps,
        check_activation(activation, negative_slope),
        negative_slope,
    )


def _check_statistics(running_mean, running_var, training: bool, eps: float) -> None:
    if as_bool("training", training):
        if (running_mean is None) is not (running_var is None):
            raise ValueError("running_mean and running_var must either both be None or neither be None")
        if eps <= 0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    elif eps < 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    for name, statistic in (("running_mean", running_mean), ("running_var", running_var)):
        if statistic is None:
            require(training, f"{name} must be defined in evaluation mode")
    _check_no_gradient(running_mean, running_var)


def _check_no_gradient(running_mean: torch.Tensor | None, running_var: torch.Tensor | None) -> None:
    for name, statistic in (("running_mean", running_mean), ("running_var", running_var)):
        if statistic is not None and statistic.requires_grad:
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
    check_tensors("conv2d_batch_norm", input, weight, optional=tensors)
    require(input.dim() == 4, f"conv2d_batch_norm: expected a batch [N, C, H, W], got size {list(input.shape)}")
    momentum, eps = as_float("momentum", momentum), as_float("eps", eps)
    _check_statistics(running_mean, running_var, training, eps)
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
        sides(padding, weight, stride, dilation),
        dilation,
        as_int("groups", groups),
        momentum,
        eps,
        check_activation(activation, negative_slope),
        negative_slope,
    )


def group_norm(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> torch.Tensor:
    r"""``y = act((x − mean) / √(var + eps) · weight + bias + residual)`` for each group of channels of each image.

    Parameters
    ----------
    input:
        [N, C], [N, C, L], [N, C, H, W] or [N, C, ...]; any strides.
    num_groups:
        a divisor of C. Mean and variance, the biased one, are those of C / num_groups neighbouring channels.
    weight, bias:
        [C] or None.
    residual, activation, negative_slope:
        gpukern's extension, as in :func:`conv2d`: ``residual`` has the input's shape. They cost no extra pass over
        memory, forward or backward, beyond reading the residual.

    float16 and bfloat16 inputs take parameters of their own dtype or of float32; computes in fp32. Reads every tensor
    once where a group fits the registers of a program (some ten thousand values), else twice. Differentiable to any
    order; second and higher derivatives are computed in plain torch. ``torch.autocast`` on a GPU computes it in
    float32, as torch does. See Wu and He, "Group Normalization", 2018.

    Returns
    -------
    a tensor of ``input``'s shape and dtype, in channels_last (channels_last_3d) if the input is.

    Raises
    ------
    RuntimeError for sizes, dtypes or devices that do not fit; ValueError for a single value in all groups together and
    for an unknown activation; TypeError for arguments of a wrong type; ZeroDivisionError for no groups. As
    ``torch.nn.functional.group_norm``, before anything is computed.
    """
    check_tensors("group_norm", input, optional=(weight, bias, residual))
    num_groups, eps = as_int("num_groups", num_groups), as_float("eps", eps)
    require(input.dim() >= 2, f"Expected at least 2 dimensions for input tensor but received {input.dim()}")
    shape = input.shape
    check_several_values((shape[0] * shape[1] // num_groups, num_groups, *shape[2:]))
    check_floating("group_norm", input)
    input, weight, bias, residual = autocast_to_float32(input, weight, bias, residual)
    activation = check_activation(activation, negative_slope)
    return _group_norm.group_norm(input, weight, bias, residual, num_groups, eps, activation, negative_slope)[0]


def instance_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> torch.Tensor:
    r"""``y = act((x − mean) / √(var + eps) · weight + bias + residual)`` for each channel of each image.

    Parameters
    ----------
    input:
        [N, C, L], [N, C, H, W] or [N, C, ...]; any strides.
    running_mean, running_var:
        [C], the statistics unless ``use_input_stats``. With it those of each image are used (``var`` the biased one),
        and these, which may then be None, are updated in place, without a gradient: ``r ← (1 − momentum) · r +
        momentum · new``, where ``new`` is the mean over the images, of unbiased variances. No values leave them alone.
    weight, bias:
        [C] or None.
    residual, activation, negative_slope:
        gpukern's extension, as in :func:`group_norm`.

    float16 and bfloat16 inputs take parameters and statistics of their own dtype or of float32; computes in fp32.
    Differentiable to any order; second and higher derivatives are computed in plain torch. See Ulyanov, Vedaldi and
    Lempitsky, "Instance Normalization", 2016.

    Returns
    -------
    a tensor of ``input``'s shape and dtype, unlike torch's in channels_last (channels_last_3d) if the input is.

    Raises
    ------
    RuntimeError for sizes, dtypes or devices that do not fit and for running statistics that require a gradient or,
    without ``use_input_stats``, are missing; ValueError for one value per channel with it, for one running statistic
    without the other, and for an unknown activation; TypeError for arguments of a wrong type. As
    ``torch.nn.functional.instance_norm``, before anything is computed.
    """
    check_tensors("instance_norm", input, optional=(running_mean, running_var, weight, bias, residual))
    momentum, eps = as_float("momentum", momentum), as_float("eps", eps)
    if as_bool("use_input_stats", use_input_stats):
        if math.prod(input.shape[2:]) == 1:
            raise ValueError(f"Expected more than 1 spatial element when training, got input size {input.shape}")
        if (running_mean is None) is not (running_var is None):
            raise ValueError("running_mean and running_var must either both be None or neither be None")
    elif running_mean is None or running_var is None:
        raise RuntimeError("Expected running_mean and running_var to be defined when use_input_stats is false")
    check_floating("instance_norm", input)
    _check_no_gradient(running_mean, running_var)
    return _instance_norm.apply(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        residual,
        use_input_stats,
        momentum,
        eps,
        check_activation(activation, negative_slope),
        negative_slope,
    )
