"""Layers of other libraries that gpukern computes, by the names of their classes: the libraries are not imported."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.module import _has_any_global_hook

from gpukern.nn.attention import MultiheadAttention
from gpukern.nn.group_norm import GroupNorm
from gpukern.nn.layer_norm import LayerNorm, LayerNorm2d
from gpukern.nn.leaf import derived
from gpukern.nn.rebinding import Rebound
from gpukern.nn.sequential import ACTIVATIONS, is_plain


class _GroupNormAct(GroupNorm):
    """timm's ``act(drop(group_norm(x)))``, in one pass where nothing is dropped."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        own: Any = self
        drop, act = own.drop, own.act
        epilogue: Any = act._epilogue if type(act) in ACTIVATIONS and is_plain(act) else None
        if epilogue is None or type(drop) is not torch.nn.Identity or _has_any_global_hook():
            return act(drop(self._compute(input)))
        return self._compute(input, **epilogue)


_OURS: dict[str, type[torch.nn.Module]] = {
    "timm.layers.norm.GroupNorm": GroupNorm,
    "timm.layers.norm.GroupNorm1": GroupNorm,
    "timm.layers.norm_act.GroupNormAct": _GroupNormAct,
    "timm.layers.norm.LayerNorm": LayerNorm,
    "timm.layers.norm.LayerNorm2d": LayerNorm2d,
    "torchvision.models.convnext.LayerNorm2d": LayerNorm2d,
    "models.convnext.LayerNorm2d": LayerNorm2d,
    "timm.layers.std_conv.StdConv2d": Rebound,
    "timm.layers.std_conv.StdConv2dSame": Rebound,
    "timm.layers.std_conv.ScaledStdConv2d": Rebound,
    "timm.layers.std_conv.ScaledStdConv2dSame": Rebound,
    "torch.nn.modules.activation.MultiheadAttention": MultiheadAttention,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": Rebound,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": Rebound,
}

_ATTENTION = "the products of queries, keys and values"
#: What torch still computes in them.
_PARTS = {
    "torch.nn.modules.activation.MultiheadAttention": _ATTENTION,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": _ATTENTION,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": _ATTENTION,
}

#: Files of torch, and classes, that compute no values: they copy or move them, or scale a whole sample or channel.
_MOVING_FILES = ("torch.nn.modules.padding", "torch.nn.modules.pixelshuffle", "torch.nn.modules.channelshuffle")
_MOVING = (
    "torchvision.ops.misc.Permute",
    "torchvision.ops.stochastic_depth.StochasticDepth",
    "timm.layers.drop.DropPath",
    "timm.layers.layer_scale.LayerScale",
    "timm.layers.layer_scale.LayerScale2d",
)


def replacement_of(kind: type[torch.nn.Module]) -> type[torch.nn.Module] | None:
    """Return the subclass of ``kind`` that gpukern computes; None for what it does not know."""
    ours = _OURS.get(_name(kind))
    return None if ours is None or issubclass(kind, ours) else derived(ours, kind)  # type: ignore[arg-type]  # classes are hashable


def left_part(kind: type[torch.nn.Module]) -> str:
    """Return what torch still computes in a layer that gpukern replaces; "" for nothing."""
    return _PARTS.get(_name(kind), "")


def uses_weights_of_children(kind: type[torch.nn.Module]) -> bool:
    """Whether such a layer computes with the tensors of those inside, and does not call them."""
    return _OURS.get(_name(kind)) in (MultiheadAttention, Rebound)


def only_moves(kind: type[torch.nn.Module]) -> bool:
    """Whether such a layer computes no values of its own."""
    return kind.__module__ in _MOVING_FILES or _name(kind) in _MOVING


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def why_not(layer: torch.nn.Module) -> str | None:
    """Return the reason why a layer of a class that :func:`replacement_of` knows is left alone; None without one."""
    if getattr(layer, "_fast_norm", False):
        return "timm's fast norm computes in autocast's dtype, which is left to torch"
    return None
