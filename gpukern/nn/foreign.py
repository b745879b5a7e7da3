"""Layers of other libraries that gpukern computes, by the names of their classes: the libraries are not imported."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.module import _has_any_global_hook

from gpukern.nn.group_norm import GroupNorm
from gpukern.nn.layer_norm import LayerNorm, LayerNorm2d
from gpukern.nn.leaf import derived
from gpukern.nn.sequential import ACTIVATIONS, is_plain


class _GroupNormAct(GroupNorm):
    """timm's ``act(drop(group_norm(x)))``, in one pass where nothing is dropped."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        drop, act = self.drop, self.act
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
}


def replacement_of(kind: type[torch.nn.Module]) -> type[torch.nn.Module] | None:
    """Return the subclass of ``kind`` that gpukern computes; None for what it does not know."""
    ours = _OURS.get(f"{kind.__module__}.{kind.__qualname__}")
    return None if ours is None or issubclass(kind, ours) else derived(ours, kind)


def why_not(layer: torch.nn.Module) -> str | None:
    """Return the reason why a layer of a class that :func:`replacement_of` knows is left alone; None without one."""
    if getattr(layer, "_fast_norm", False):
        return "timm's fast norm computes in autocast's dtype, which is left to torch"
    return None
