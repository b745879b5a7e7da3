"""``Sequential``: neighbours that one kernel computes are computed by one.

Which children make a run follows from their classes alone, and is found once for each sequence of classes. Whether a
run may be computed as one is checked in every call: hooks on its inside would miss what it no longer makes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.nn.modules.module import _has_any_global_hook

from gpukern.nn import activation as activations
from gpukern.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormAct2d
from gpukern.nn.conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from gpukern.nn.group_norm import GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from gpukern.nn.layer_norm import LayerNorm, LayerNorm2d, RMSNorm
from gpukern.nn.leaf import derived, refuse_script
from gpukern.nn.linear import Linear

ACTIVATIONS = frozenset(kind for kind in vars(activations).values() if hasattr(kind, "_epilogue"))
#: Layers whose kernels take an activation.
_HEADS = frozenset(
    (
        *(Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, Linear),
        *(BatchNorm1d, BatchNorm2d, BatchNorm3d, GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d),
        *(LayerNorm, LayerNorm2d, RMSNorm),
    )
)


class Run(NamedTuple):
    """The children from ``first`` to before ``end``: a head, perhaps the batch norm of a convolution, an activation.

    ``norm`` and ``activation``: their places, or None. They are the same for a batch norm that has an activation.
    """

    first: int
    norm: int | None
    activation: int | None
    end: int


class Sequential(torch.nn.Sequential):
    """``torch.nn.Sequential`` that computes neighbouring layers of ``gpukern.nn`` together.

    ================================================  ==============================================================
    children                                          computed by
    ================================================  ==============================================================
    Conv2d, BatchNorm2d (, activation)                :func:`gpukern.functional.conv2d_batch_norm`: in training the
                                                      convolution's kernel makes the statistics
    Conv2d, BatchNormAct2d                            the same
    a convolution or Linear, activation               the layer's kernel, with the activation in its epilogue
    BatchNorm1d, 2d or 3d, activation                 the same
    GroupNorm or InstanceNorm1d/2d/3d, activation     the same
    LayerNorm, LayerNorm2d or RMSNorm, activation     the same
    ================================================  ==============================================================

    Children, ``state_dict``, running statistics, results and gradients are those of ``torch.nn.Sequential``, but for
    roundings: what goes into an activation may stay in float32 where it would have been rounded to float16 or bfloat16,
    and the sums of statistics are taken in another order. Only layers of exactly these classes run together. Those with
    a hook (of their own, or for all modules), a parametrization or a ``forward`` of the object's own, and those that
    were compiled by themselves, are called one by one, as all other children are.
    """

    def forward(self, input):
        children = tuple(self._modules.values())
        # Dynamo traces through the cache, and would warn of it.
        steps = (_steps if torch.compiler.is_compiling() else _kept_steps)(tuple(map(type, children)))
        if not steps or _has_any_global_hook():
            return super().forward(input)
        for step in steps:
            input = children[step](input) if type(step) is int else _compute(input, children, step)
        return input

    def __prepare_scriptable__(self):
        refuse_script(self)


def runs(kinds: tuple[type, ...]) -> tuple[Run, ...]:
    """The runs of two children at least among children of these classes."""
    return tuple(step for step in _steps(kinds) if isinstance(step, Run))


def _steps(kinds: tuple[type, ...]) -> tuple[Run | int, ...]:
    """Runs, and between them the places of the children that are called alone; nothing if there are no runs."""
    found: list[Run | int] = []
    first = 0
    while first < len(kinds):
        run = _run_at(kinds, first)
        found.append(run if run.end > first + 1 else first)
        first = run.end
    return tuple(found) if len(found) < len(kinds) else ()


_kept_steps = functools.lru_cache(maxsize=1024)(_steps)


def _run_at(kinds: tuple[type, ...], first: int) -> Run:
    norm = activation = None
    end = first + 1
    if kinds[first] in _HEADS:
        following = kinds[end] if end < len(kinds) else None
        if kinds[first] is Conv2d and following in (BatchNorm2d, BatchNormAct2d):
            norm, end = end, end + 1
        if following is BatchNormAct2d and norm is not None:
            activation = norm
        elif end < len(kinds) and kinds[end] in ACTIVATIONS:
            activation, end = end, end + 1
    return Run(first, norm, activation, end)


def _compute(input, children: tuple[Any, ...], run: Run):
    """Return the result of the children of ``run``, one after the other, on ``input``."""
    first, norm, activation, end = run
    if norm is not None and not children[norm].training:
        # There are no statistics to make, but the norm may still take the activation.
        input = children[first](input)
        first, norm = norm, None
        if end == first + 1:
            return children[first](input)
    epilogue: Any = {} if activation is None else children[activation]._epilogue
    # A tracer's placeholder is no tensor; a single image is what BatchNorm2d refuses. There is nothing to save for an
    # empty batch, and each layer has a rule of its own for the strides of nothing.
    together = epilogue is not None and isinstance(input, torch.Tensor) and (norm is None or input.dim() == 4)
    together = together and not _is_empty(input)
    for i in range(first, end):
        together = together and is_plain(children[i])
    if not together:
        for i in range(first, end):
            input = children[i](input)
        return input
    if norm is None:
        return children[first]._compute(input, **epilogue)
    return children[norm]._compute_after(children[first], input, **epilogue)


def _is_empty(input: torch.Tensor) -> bool:
    return 0 in [size for size in input.shape if type(size) is int]  # a tracer's size must not be inspected


def is_plain(layer: torch.nn.Module) -> bool:
    """Whether a call of ``layer`` runs its class's forward and nothing else."""
    own = vars(layer)
    return not (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or layer._compiled_call_impl
        or "forward" in own
        or "_conv_forward" in own
    )


# ---- subclasses of torch.nn.Sequential that gpukern.convert meets ----------------------------------------------------


def subclass_of(kind: type[torch.nn.Sequential]) -> type[torch.nn.Module]:
    """``kind`` with the forward of :class:`Sequential`."""
    return Sequential if kind is torch.nn.Sequential else derived(Sequential, kind)  # type: ignore[arg-type]
