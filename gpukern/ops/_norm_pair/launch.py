"""Two batch norms that are added, by the kernels: functions of the same names and signatures as ``reference.py``."""

from __future__ import annotations

import torch

from gpukern.ops._activation.properties import PROPERTIES
from gpukern.ops._batch_norm.launch import norm_of
from gpukern.ops._batch_norm.problem import Norm
from gpukern.ops._batch_norm.tiles import empty_like, tiles_of
from gpukern.ops._norm_pair import kernels
from gpukern.ops._reduction.functions import Sums
from gpukern.ops._reduction.launch import with_workspace
from gpukern.runtime.launcher import launch
from gpukern.runtime.tensors import check_kernel_dtype


def normalize_pair(
    z_a: torch.Tensor, norm_a: Norm, z_b: torch.Tensor, norm_b: Norm, activation: str, negative_slope: float
) -> torch.Tensor:
    check_kernel_dtype("normalize_pair", z_a.dtype)
    output = empty_like(z_a)
    if output.numel():
        tiles = tiles_of(False, z_a, z_b, output)
        launch(
            kernels.norm_pair_kernel,
            (tiles.plan.steps * tiles.plan.channel_tiles,),
            z_a.device,
            (*tiles.images, *_kernel_norms(norm_a, norm_b), tiles.sizes, norm_a.eps, norm_b.eps, negative_slope),
            {"ACTIVATION": activation} | tiles.options,
        )
    return output


def normalize_pair_sums(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    z_a: torch.Tensor,
    norm_a: Norm,
    z_b: torch.Tensor,
    norm_b: Norm,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    check_kernel_dtype("normalize_pair", z_a.dtype)
    C, device = z_a.shape[1], z_a.device
    if z_a.numel() == 0:
        return torch.zeros((3, C), dtype=torch.float32, device=device)
    totals = torch.empty((3, C), dtype=torch.float32, device=device)
    tiles = tiles_of(True, grad, _read(y, activation), z_a, z_b)
    chosen, sums = tiles.plan, Sums(totals=totals)
    if chosen.splits > 1:
        sums = with_workspace(sums, C, device, chosen.splits, chosen.channel_tiles, sums=3)
    launch(
        kernels.norm_pair_sums_kernel,
        (chosen.splits * chosen.channel_tiles,),
        device,
        (
            *(*tiles.images, *_kernel_norms(norm_a, norm_b), sums, tiles.sizes),
            *(chosen.steps, chosen.steps_per_split, chosen.splits, norm_a.eps, norm_b.eps, negative_slope),
        ),
        {"WHOLE": chosen.splits == 1, **_activation(activation)} | tiles.options,
    )
    return totals


def normalize_pair_gradients(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    z_a: torch.Tensor,
    norm_a: Norm,
    z_b: torch.Tensor,
    norm_b: Norm,
    sums: torch.Tensor,
    of_b: torch.Tensor,
    activation: str,
    negative_slope: float,
) -> tuple[torch.Tensor | None, ...]:
    check_kernel_dtype("normalize_pair", z_a.dtype)
    out_a, out_b = empty_like(z_a), empty_like(z_b)
    pairs = (norm_a.weight, sums[1]), (norm_a.bias, sums[0]), (norm_b.weight, of_b), (norm_b.bias, sums[0])
    # In fp32 the sums are the gradients, of which autograd may change each.
    kept = (
        None
        if p is None
        else s
        if p.dtype is s.dtype and p is not norm_b.bias
        else torch.empty_like(p, memory_format=torch.contiguous_format)
        for p, s in pairs
    )
    grads = kernels.Parameters(*kept)
    if z_a.numel():
        written = (None if g is None or g is s else g for g, (_, s) in zip(grads, pairs, strict=True))
        tiles = tiles_of(False, grad, _read(y, activation), z_a, z_b, out_a, out_b)
        eps = norm_a.eps, norm_b.eps
        launch(
            kernels.norm_pair_input_grad_kernel,
            (tiles.plan.steps * tiles.plan.channel_tiles,),
            z_a.device,
            (
                *(*tiles.images, *_kernel_norms(norm_a, norm_b), sums.contiguous(), of_b.contiguous()),
                *(kernels.Parameters(*written), tiles.sizes, *eps, negative_slope),
            ),
            {**_activation(activation)} | tiles.options,
        )
    else:
        for grad_of_parameter in grads:
            if grad_of_parameter is not None:
                grad_of_parameter.zero_()
    return out_a, out_b, *grads


def _kernel_norms(*norms: Norm) -> tuple:
    return tuple(norm_of(norm.mean, norm.variance, norm.weight, norm.bias) for norm in norms)


def _needs_input(activation: str) -> bool:
    return activation != "none" and PROPERTIES[activation].needs_input


def _read(y: torch.Tensor | None, activation: str) -> torch.Tensor | None:
    """Return ``y`` if the activation's derivative is one of y."""
    return None if activation == "none" or _needs_input(activation) else y


def _activation(activation: str) -> dict[str, str | bool]:
    return {"ACTIVATION": activation, "NEEDS_INPUT": _needs_input(activation)}
