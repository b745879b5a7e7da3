"""Layers whose forward calls functions of ``torch.nn.functional``, with those that gpukern has in their place.

Only classes that are named here, by which ``gpukern.convert`` finds them without an import of their package. The
forward itself, its checks and its errors stay what they are: what the names in it refer to is exchanged.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch

from gpukern import functional

_WINDOWS = "the products of queries, keys and values"

#: The class → what torch still multiplies in it, "" for nothing.
REBOUND = {
    "torch.nn.modules.activation.MultiheadAttention": _WINDOWS,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": _WINDOWS,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": _WINDOWS,
    "timm.layers.std_conv.StdConv2d": "",
    "timm.layers.std_conv.StdConv2dSame": "",
    "timm.layers.std_conv.ScaledStdConv2d": "",
    "timm.layers.std_conv.ScaledStdConv2dSame": "",
}


def qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def original(kind: type[torch.nn.Module]) -> type[torch.nn.Module] | None:
    """The class of which ``kind`` is the rebound one; None if it is not."""
    return vars(kind).get("_rebound_from")


@functools.lru_cache(maxsize=256)
def rebound(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """``kind`` with gpukern's functions in its forward: a subclass, named as ``kind``, that can be pickled."""
    forward = _MultiheadAttention.forward if kind is torch.nn.MultiheadAttention else with_ours(kind.forward)
    return derived(kind, (kind,), rebound, {"forward": forward, "_rebound_from": kind})


def derived(kind: type, bases: tuple[type, ...], make: Any, more: dict[str, Any] | None = None) -> type:
    """Return a subclass of ``bases`` under the name of ``kind``; unpickling makes it again, by ``make(kind)``."""

    def reduce(self: torch.nn.Module, protocol: int) -> tuple:
        # There is no name under which pickle would find the class: it is made anew where the object is.
        return _new, (make, kind), object.__reduce_ex__(self, 2)[2]

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, bases, {**names, **(more or {}), "__reduce_ex__": reduce})


def _new(make: Any, kind: type) -> Any:
    made = make(kind)
    return made.__new__(made)


@functools.lru_cache(maxsize=256)
def with_ours(function: types.FunctionType) -> types.FunctionType:
    """``function``, and the functions of its file that it calls, with gpukern's for those of torch.nn.functional."""
    return _in(function, _space(function))


def _space(function: types.FunctionType) -> dict[str, Any]:
    """The globals of the file of ``function``, exchanged."""
    theirs, ours = vars(torch.nn.functional), _ours()
    space = dict(function.__globals__)
    # Dynamo would look names up in the module that is called so.
    space.pop("__name__", None)
    for name, value in function.__globals__.items():
        if value is torch.nn.functional:
            space[name] = _module()
        elif isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__:
            space[name] = _in(value, space)
        known = getattr(value, "__name__", None) if callable(value) else None
        if known in ours and theirs.get(known) is value:
            space[name] = ours[known]
    return space


def _in(function: types.FunctionType, space: dict[str, Any]) -> types.FunctionType:
    made = types.FunctionType(function.__code__, space, function.__name__, function.__defaults__, function.__closure__)
    for name in ("__kwdefaults__", "__qualname__", "__module__", "__doc__", "__annotations__"):
        setattr(made, name, getattr(function, name))
    return made


@functools.cache
def _ours() -> dict[str, Any]:
    return {name: getattr(functional, name) for name in functional.__all__ if hasattr(torch.nn.functional, name)}


@functools.cache
def _module() -> types.ModuleType:
    made = types.ModuleType("torch.nn.functional")
    vars(made).update({**vars(torch.nn.functional), **_ours()})
    return made


_multi_head_attention = with_ours(torch.nn.functional.multi_head_attention_forward)


class _MultiheadAttention(torch.nn.MultiheadAttention):
    """Its forward without the one-operator path of evaluation, which would leave all of it to torch."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As :meth:`torch.nn.MultiheadAttention.forward`."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise NotImplementedError("MultiheadAttention: gpukern takes no nested tensors")
        batched = query.dim() == 3
        if self.batch_first and batched:
            query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        separate: dict[str, Any] = {}
        if not self._qkv_same_embed_dim:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            separate = {"use_separate_proj_weight": True, **{name: getattr(self, name) for name in names}}
        output, weights = _multi_head_attention(
            *(query, key, value, self.embed_dim, self.num_heads),
            *(self.in_proj_weight, self.in_proj_bias, self.bias_k, self.bias_v, self.add_zero_attn),
            *(self.dropout, self.out_proj.weight, self.out_proj.bias),
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            is_causal=is_causal,
            average_attn_weights=average_attn_weights,
            **separate,
        )
        return output.transpose(0, 1) if self.batch_first and batched else output, weights
