"""Layers of other libraries that gpukern computes, by the names of their classes: the libraries are not imported."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.module import _has_any_global_hook

from gpukern import functional as F
from gpukern.nn.conv import Conv2d
from gpukern.nn.group_norm import GroupNorm
from gpukern.nn.leaf import derived
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


class _StdConv2d(Conv2d):
    """timm's convolution with filters that are normalized in every call, as a batch norm's channels in training."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        filters = self.weight.reshape(1, self.out_channels, -1)
        filters = F.batch_norm(filters, None, None, training=True, momentum=0.0, eps=self.eps)  # type: ignore[arg-type]
        return F.conv2d(
            input, filters.reshape_as(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups
        )


_OURS: dict[str, type[torch.nn.Module]] = {
    "timm.layers.norm.GroupNorm": GroupNorm,
    "timm.layers.norm.GroupNorm1": GroupNorm,
    "timm.layers.norm_act.GroupNormAct": _GroupNormAct,
    "timm.layers.std_conv.StdConv2d": _StdConv2d,
}


def replacement_of(kind: type[torch.nn.Module]) -> type[torch.nn.Module] | None:
    """Return the subclass of ``kind`` that gpukern computes; None for what it does not know."""
    ours = _OURS.get(f"{kind.__module__}.{kind.__qualname__}")
    return None if ours is None or issubclass(kind, ours) else derived(ours, kind)  # type: ignore[arg-type]  # classes are hashable


def why_not(layer: torch.nn.Module) -> str | None:
    """Return the reason why a layer of a class that :func:`replacement_of` knows is left alone; None without one."""
    if getattr(layer, "_fast_norm", False):
        return "timm's fast norm computes in autocast's dtype, which is left to torch"
    return None
