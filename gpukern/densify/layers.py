"""Layers on patches as dense networks compute them: by the rules of their functions, or as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules import activation, batchnorm, conv, dropout, instancenorm, rnn
from torch.nn.utils import parametrize

import gpukern.nn
from gpukern.densify import pointwise, shaping, windows
from gpukern.densify.epilogues import Held
from gpukern.densify.errors import DenseError
from gpukern.densify.recorder import Recorder
from gpukern.densify.steps import Layer as LayerOperation
from gpukern.densify.values import Value, told
from gpukern.nn.sequential import is_plain

#: Why layers have no dense form.
_REFUSED: tuple[tuple[Any, str], ...] = (
    (conv._ConvTransposeNd, "a transposed convolution makes more pixels than the patch has"),
    ((rnn.RNNBase, rnn.RNNCellBase), "a recurrent layer takes the positions one after the other"),
    ((instancenorm._InstanceNorm, nn.GroupNorm), "its statistics are of the whole patch, other ones for each patch"),
    ((nn.MultiheadAttention, nn.TransformerEncoderLayer), "attention looks at all positions of the patch"),
    ((nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle), "it changes the resolution within the patch"),
    (nn.Dropout1d, pointwise.ONE_DIMENSION),
)
_ALONE = "a model of one layer alone: put it into a torch.nn.Sequential"
_ALONG = {nn.Softmax: "softmax", nn.LogSoftmax: "log_softmax", nn.Softmin: "softmin"}


def read(to: Recorder, name: str, layer: nn.Module, input: Value) -> Value:
    """The value that ``layer``, called ``name``, makes of ``input``."""
    for kinds, why in _REFUSED:
        if isinstance(layer, kinds):
            raise DenseError(why)
    for kind, rule in _RULES.items():
        if isinstance(layer, kind):
            if not name and parametrize.is_parametrized(layer):
                raise DenseError(_ALONE)
            if not is_plain(layer):
                raise DenseError("it has hooks, or a forward of its own, which a dense network would not call")
            return rule(to, name, layer, input)
    return _as_it_is(to, name, layer, input)


def _own(layer: str, name: str) -> Held:
    return Held(f"{layer}.{name}" if layer else name)


def _conv2d(to: Recorder, name: str, layer: Any, input: Value) -> Value:
    if layer.padding_mode != "zeros":
        windows.unpadded(layer._reversed_padding_repeated_twice[::2])
    return windows.conv2d(
        to, input, _own(name, "weight"), _own(name, "bias") if layer.bias is not None else None,
        layer.stride, layer.padding, layer.dilation, layer.groups,
        shape=(layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size),
    )  # fmt: skip


def _linear(to: Recorder, name: str, layer: Any, input: Value) -> Value:
    bias = _own(name, "bias") if layer.bias is not None else None
    shape = layer.out_features, layer.in_features
    return windows.linear(to, input, _own(name, "weight"), bias, shape=shape)


def _max_pool2d(to: Recorder, name: str, layer: Any, input: Value) -> Value:
    return windows.max_pool2d(
        to, input, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode, layer.return_indices
    )


def _avg_pool2d(to: Recorder, name: str, layer: Any, input: Value) -> Value:
    return windows.avg_pool2d(
        to, input, layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode, layer.count_include_pad,
        layer.divisor_override,
    )  # fmt: skip


def _adaptive_max_pool2d(to: Recorder, name: str, layer: Any, input: Value) -> Value:
    return windows.adaptive_max_pool2d(to, input, layer.output_size, layer.return_indices)


def _softmax(to: Recorder, name: str, layer: Any, input: Value) -> Value:
    function = next(_ALONG[kind] for kind in type(layer).__mro__ if kind in _ALONG)
    return pointwise.softmax(to, input, layer.dim, name=function)


_RULES: dict[type[nn.Module], Callable[[Recorder, str, Any, Value], Value]] = {
    nn.Conv2d: _conv2d,
    nn.Linear: _linear,
    nn.MaxPool2d: _max_pool2d,
    nn.AvgPool2d: _avg_pool2d,
    nn.AdaptiveAvgPool2d: lambda to, _, layer, input: windows.adaptive_avg_pool2d(to, input, layer.output_size),
    nn.AdaptiveMaxPool2d: _adaptive_max_pool2d,
    nn.Flatten: lambda to, _, layer, input: shaping.flatten(to, input, layer.start_dim, layer.end_dim),
    nn.Unflatten: lambda to, _, layer, input: shaping.unflatten(to, input, layer.dim, layer.unflattened_size),
    nn.Identity: lambda to, _, layer, input: input,
    **dict.fromkeys(_ALONG, _softmax),
    nn.GLU: lambda to, _, layer, input: pointwise.glu(to, input, layer.dim),
    **{
        kind: lambda to, _, layer, input: shaping.pad(to, input, layer.padding)
        for kind in (nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)
    },
}


# ---- layers as they are ----------------------------------------------------------------------------------------------


def _as_it_is(to: Recorder, name: str, layer: Any, input: Value) -> Value:
    layout = "images"
    if isinstance(layer, batchnorm._NormBase):
        _batch_norm(layer, input)
    elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and not isinstance(layer, gpukern.nn.LayerNorm2d):
        layout = _row_norm(layer, input)
    elif isinstance(layer, nn.PReLU):
        _channels(layer.num_parameters, input, or_one=True)
    elif isinstance(layer, (nn.LocalResponseNorm, nn.Softmax2d, gpukern.nn.LayerNorm2d)):
        windows.images(input)
    elif not _is_pointwise(layer):
        raise DenseError("there is no dense form of it")
    if not name:
        raise DenseError(_ALONE)
    operation = LayerOperation(name, layout)
    # In evaluation mode a dropout gives the same tensor.
    return (
        to.view(operation, input, input)
        if isinstance(layer, dropout._DropoutNd)
        else to.add(operation, (input,), input)
    )


def _is_pointwise(layer: nn.Module) -> bool:
    of_torch = {kind.__module__ for kind in type(layer).__mro__}
    return bool(of_torch & {activation.__name__, dropout.__name__})


def _batch_norm(layer: Any, input: Value) -> None:
    if layer.running_mean is None:
        raise DenseError(
            "it has no running statistics: in evaluation mode too it norms a patch by the others of its batch"
        )
    if input.rank == 3 or not input.is_pixelwise:
        raise DenseError(f"it norms {told(input.shape)}: each position of the patch by statistics of its own")
    _channels(layer.num_features, input)
    if input.rank == 2:
        # Its rows are maps in the dense network, which has a copy of the layer.
        vars(layer)["_check_input_dim"] = takes_maps


def takes_maps(input: Any) -> None:
    """Refuse nothing, in the place of a check that the input of a batch norm has two dimensions."""


def _row_norm(layer: Any, input: Value) -> str:
    if input.rank != 2 or input.positions != 1 or len(layer.normalized_shape) != 1:
        raise DenseError(f"it norms over positions of {told(input.shape)}: other statistics for each patch")
    _channels(layer.normalized_shape[0], input)
    return "channels_last"


def _channels(count: int, input: Value, or_one: bool = False) -> None:
    if count != input.channels and not (or_one and count == 1):
        raise DenseError(f"it takes {count} channels, and gets {told(input.shape)}")
    if count != 1 and not input.is_pixelwise:
        raise DenseError(f"its channels are those of the flattened {told(input.shape)}")


#: Of images, where no layer tells: before the first there may be a concatenation.
_MOST_CHANNELS = 17


def input_channels(model: nn.Module, patch: tuple[int, int]) -> list[int]:
    """Numbers of channels that the model's input may have, the likeliest first: nothing tells which layer is first."""
    found: list[int] = []
    for module in model.modules():
        if isinstance(module, conv._ConvNd):
            found.append(module.in_channels)
        elif isinstance(module, nn.Linear) and module.in_features % (patch[0] * patch[1]) == 0:
            found.append(module.in_features // (patch[0] * patch[1]))
    found += [module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    found += [parameter.shape[1] for parameter in model.parameters() if parameter.dim() == 4]
    return list(dict.fromkeys((*found, *range(1, _MOST_CHANNELS))))
