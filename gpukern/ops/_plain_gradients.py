"""Gradients of an operator's gradients, through the same computation in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def gradients_through(
    plain: Callable[..., Any],
    tensors: Sequence[torch.Tensor | None],
    others: Sequence[Any],
    grads: Sequence[torch.Tensor | None],
    needed: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """One gradient or None for each of ``tensors`` and of ``others``, the arguments of ``plain``.

    ``grads``: of each of its outputs, None where nothing comes in. ``needed``: which of the first tensors want one.
    """
    with torch.enable_grad():
        # Aliases of the saved tensors: gradients by them alone, and through them any higher order.
        aliases: list[Any] = [None if t is None else t.view_as(t) for t in tensors]
        outputs = plain(*aliases, *others)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [i for i, needs in enumerate(needed) if needs]
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
    found: list[torch.Tensor | None] = [None] * (len(tensors) + len(others))
    if pairs and wanted:
        results = torch.autograd.grad(
            [y for y, _ in pairs],
            [aliases[i] for i in wanted],
            [g for _, g in pairs],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        for i, result in zip(wanted, results, strict=True):
            found[i] = result
    return tuple(found)
