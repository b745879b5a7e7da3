"""Receptive field of one element of each tensor in the network's input."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from gpukern.summary.layers import Window, window
from gpukern.summary.table import Size


@dataclass(frozen=True)
class View:
    """Per dimension: the size of an element's receptive field, and its distance from its neighbour's.

    ``channels_last``: the tensor is [N, H, W, C], as ConvNeXt has it between two permutations, not [N, C, H, W].
    """

    size: Size
    step: Size
    channels_last: bool = False


#: The view of an element that depends on the whole input.
ALL = View((), ())
#: One element's receptive field is not known, but all elements of a sample together see everything.
SOME = View((), (0,))


def _union(views: list[View | None]) -> View | None:
    """The view of an element computed from one element of each: that of the longest path."""
    if ALL in views:
        return ALL
    known = [view for view in views if view is not None]
    if len(known) < len(views):
        return None
    if len({(view.step, view.channels_last) for view in known}) > 1:
        return SOME
    return replace(known[0], size=tuple(max(sizes) for sizes in zip(*(view.size for view in known), strict=True)))


def _through_window(view: View, window: Window) -> View:
    if len(view.size) != len(window.kernel):
        return SOME
    dimensions = zip(view.size, view.step, window.kernel, window.dilation, strict=True)
    size = tuple(r + d * (k - 1) * j for r, j, k, d in dimensions)
    return View(size, tuple(j * s for j, s in zip(view.step, window.stride, strict=True)))


def _through_adaptive_pool(view: View, input_size: Size, output_size: Size) -> View:
    """A pool to one element sees everything; one whose windows are all alike is an ordinary pool."""
    if math.prod(output_size) == 1:
        return ALL
    if len(input_size) != len(view.size) or any(i % o for i, o in zip(input_size, output_size, strict=True)):
        return SOME
    kernel = tuple(i // o for i, o in zip(input_size, output_size, strict=True))
    return _through_window(view, Window(kernel, kernel, (0,) * len(kernel), (1,) * len(kernel)))


def _through_row_norm(view: View, dims: int, over_channels: bool = False) -> View:
    """A norm over all positions sees everything, one over the channels of each position what that sees.

    Over the last of the positions alone it covers a row: neither a window nor everything.
    """
    if view == SOME or over_channels or (view.channels_last and dims == 1):
        return view
    return ALL if dims >= len(view.size) + view.channels_last else SOME


def _permuted(view: View, order: Sequence[int]) -> View:
    """Channels may change from the second to the last dimension, and back."""
    rank = len(view.size) + 2
    given = tuple(dimension % rank for dimension in order)
    if view.channels_last:
        return replace(view, channels_last=False) if given == (0, rank - 1, *range(1, rank - 1)) else SOME
    return replace(view, channels_last=True) if given == (0, *range(2, rank), 1) else SOME


# ---- functions -----------------------------------------------------------------------------------------------------

#: Functions that compute each output element from elements of the same place, or only arrange elements anew.
_POINTWISE = re.compile(
    r"_*[ir]?(add|sub|mul|div|truediv|pow)_*|cat|concat|relu6?_?|leaky_relu_?|prelu|[sc]?elu_?|gelu|silu_?|mish|softplus|"
    r"sigmoid_?|tanh_?|hardswish_?|hardsigmoid_?|hardtanh_?|log_?sigmoid|clamp(_min|_max)?_?|where|sqrt|rsqrt|square|exp|"
    r"neg|abs|(alpha_|feature_)?dropout[123]?d?|batch_norm|local_response_norm|channel_shuffle|flatten|view|reshape|"
    r"contiguous|clone|detach|to|type|float|double|half|bfloat16|chunk|split|unbind"
)
#: Functions along dimensions, normalizing or summing: where in the arguments these are.
_ALONG = {
    **dict.fromkeys(("softmax", "log_softmax", "softmin", "mean", "sum", "amax", "amin", "max", "min", "prod"), 1),
    **dict.fromkeys(("std", "var", "var_mean", "std_mean", "logsumexp", "median"), 1),
    **dict.fromkeys(("normalize", "norm", "vector_norm"), 2),
}
#: The default dimension of F.normalize.
_DEFAULT = {"normalize": 1}
#: Those make a tensor like another, and do not read that.
_UNREAD = re.compile(r"\w+_like|new_\w+")
#: Those take a part of a tensor and leave the others.
_PICKS = re.compile(
    r"__getitem__|select|narrow|index_select|masked_select|gather|take|take_along_dim|chunk|split|tensor_split|unbind|"
    r"unfold|as_strided|diagonal|topk|grid_sample|diff|pad"
)
#: Convolutions and pools as functions, of batches.
_WINDOWS = re.compile(r"(conv|avg_pool|max_pool)[123]d|max_pool[123]d_with_indices")


class ViewsBetweenLayers(TorchFunctionMode):
    """Follows views through what a forward does between its layers: branches, norms, gates, reshapes."""

    def __init__(self, views: WeakTensorKeyDictionary) -> None:
        super().__init__()
        self._views = views

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        # Tensors without an entry do not depend on the input: parameters, constants. Inside a layer this runs as well;
        # the layer's hook then has the last word.
        inputs = [tensor for tensor in tensors((args, kwargs)) if tensor in self._views]
        if inputs and not _UNREAD.fullmatch(name):
            view = _union([self._views[tensor] for tensor in inputs])
            for tensor in tensors(result):
                after = view if view in (None, ALL) else _after(name, view, inputs[0], tensor, args, kwargs)
                picked = _PICKS.fullmatch(name) or tensor.shape[:1] != inputs[0].shape[:1]
                self._views[tensor] = None if after == SOME and picked else after
        return result


def _after(name: str, view: View, input: torch.Tensor, output: torch.Tensor, args: tuple, kwargs: dict) -> View:
    """The view of the elements of ``output``, which the function ``name`` made of ``input``."""
    if re.fullmatch(r"adaptive_(avg|max)_pool[123]d(_with_indices)?", name):
        return _through_adaptive_pool(view, tuple(input.shape[2:]), tuple(output.shape[2:]))
    if view == SOME:
        return view
    if name == "permute":
        order = args[1:] if len(args) > 2 else _argument(args, kwargs, 1, "dims", ())
        return _permuted(view, (order,) if isinstance(order, int) else order)
    if view.channels_last and name not in ("layer_norm", "rms_norm"):
        each = name == "linear" or (_POINTWISE.fullmatch(name) and output.shape == input.shape)
        return view if each else SOME
    if name == "group_norm":
        return ALL  # through the mean and the variance of the whole image
    if name == "instance_norm":
        return ALL if _argument(args, kwargs, 5, "use_input_stats", True) else view
    if name in ("layer_norm", "rms_norm"):
        return _through_row_norm(view, len(_argument(args, kwargs, 1, "normalized_shape", ())))
    if _WINDOWS.fullmatch(name):
        return _through_window(view, _window_of(name, len(view.size), args, kwargs))
    if name in _ALONG:
        along = _argument(args, kwargs, _ALONG[name], "dim", kwargs.get("axis", _DEFAULT.get(name)))
        if not isinstance(along, torch.Tensor):  # max of two tensors
            return _along(name, view, input.dim(), along)
    elif not _POINTWISE.fullmatch(name):
        return SOME
    if output.shape[2:] == input.shape[2:]:
        return view
    # Flattened, one row for each sample.
    whole = output.dim() == 2 and output.shape[0] == input.shape[0] and output.numel() == input.numel()
    return view if whole else SOME


def _along(name: str, view: View, rank: int, along: int | Sequence[int] | None) -> View:
    if along is None and name.endswith(("softmax", "softmin")):
        along = 0 if rank in (0, 1, 3) else 1
    if rank != len(view.size) + 2:
        return SOME
    along = range(rank) if along is None or along == () else [along] if isinstance(along, int) else along
    positions = {dimension % rank for dimension in along} - {0, 1}
    if not positions:
        return view
    return ALL if len(positions) == len(view.size) else SOME


def _window_of(name: str, spatial: int, args: tuple, kwargs: dict) -> Window:
    """Return the window of F.conv2d(input, weight, bias, stride, padding, dilation) or F.max_pool2d(input, size, …)."""

    def each(value: int | Sequence[int]) -> Size:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * spatial if len(values) == 1 else values

    conv = name.startswith("conv")
    first = _argument(args, kwargs, 1, "weight" if conv else "kernel_size", None)
    kernel = tuple(first.shape[2:]) if conv else each(first)
    stride = _argument(args, kwargs, 3 if conv else 2, "stride", None)
    dilation = 1 if name.startswith("avg") else _argument(args, kwargs, 5 if conv else 4, "dilation", 1)
    return Window(kernel, each(stride or (1 if conv else kernel)), (0,) * len(kernel), each(dilation))


def _argument(args: tuple, kwargs: dict, place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def tensors(value: Any) -> list[torch.Tensor]:
    """Yield the tensors in lists, tuples and dictionaries, at any depth."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, (list, tuple)) else []


# ---- layers --------------------------------------------------------------------------------------------------------

#: Layers of these modules and their subclasses see what their input sees.
_POINTWISE_MODULES = frozenset(
    f"torch.nn.modules.{module}" for module in ("activation", "batchnorm", "dropout", "flatten", "padding")
)
#: Except these, which look along a dimension: the functions that they call determine how.
_ALONG_A_DIMENSION = (
    torch.nn.MultiheadAttention, torch.nn.Softmin,
    torch.nn.GLU,
)  # fmt: skip


def through_layer(
    layer: torch.nn.Module, input: torch.Tensor, output: torch.Tensor, views: WeakTensorKeyDictionary, features: bool
) -> View | None:
    """The view of the elements of ``output``. ``features``: the network's input has no positions, only features."""
    view = views.get(input)
    if isinstance(layer, torch.nn.Linear):
        # A sample in one row is covered entirely; for rows that are positions or tokens, it is not known which.
        if view == ALL or (input.dim() == 2 and (features or view is not None)):
            return ALL
        return view if view is not None and view.channels_last else view and SOME
    if view is None or view == ALL:
        return view
    if isinstance(layer, (torch.nn.LayerNorm, torch.nn.RMSNorm)):
        return _through_row_norm(view, len(layer.normalized_shape), type(layer).__name__ == "LayerNorm2d")
    if view.channels_last and isinstance(layer, (_AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _InstanceNorm)):
        return SOME
    if isinstance(layer, (_AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd)):
        return _through_adaptive_pool(view, tuple(input.shape[2:]), tuple(output.shape[2:]))
    if isinstance(layer, torch.nn.GroupNorm):
        return ALL  # through the mean and the variance of the whole image
    if isinstance(layer, _InstanceNorm):
        return ALL if layer.training or not layer.track_running_stats else view
    if isinstance(layer, (torch.nn.Softmax, torch.nn.LogSoftmax, torch.nn.Softmax2d)):
        return _along("softmax", view, input.dim(), getattr(layer, "dim", -3))
    found = window(layer)
    if found is not None:
        return SOME if view.channels_last else _through_window(view, found)
    pointwise = any(kind.__module__ in _POINTWISE_MODULES for kind in type(layer).__mro__)
    if pointwise and not isinstance(layer, _ALONG_A_DIMENSION):
        return view
    return views.get(output)
