"""Cross entropy in plain torch: the path of CPU tensors, and the oracle of the tests."""

from __future__ import annotations

import torch

from gpukern.ops._cross_entropy.problem import MEAN, NONE, Options
from gpukern.runtime.tensors import elementwise_like


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    options: Options,
    dtype: torch.dtype,
    gradient: list[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, Σ weight[label] over the labels that are not ignored, in fp32 at least): torch's own.

    ``gradient`` is the kernels': see ``launch.py``.
    """
    # In halves torch rounds the logarithms of the softmax on the way.
    x = input.to(torch.promote_types(dtype, torch.float32))
    labels = not target.is_floating_point()
    if labels and target.dtype is not torch.int64:
        target = target.long()  # torch's takes bytes of images nowhere
    if weight is not None and labels:
        weight = weight.to(x.dtype)
    loss = torch.nn.functional.cross_entropy(
        x,
        target,
        weight,
        ignore_index=options.ignore_index if labels else -100,
        reduction=options.reduction,
        label_smoothing=options.smoothing,
    )
    return loss.to(dtype), divisor(input, target, weight, options)


def divisor(input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, options: Options) -> torch.Tensor:
    """What the mean over labels divides by; 0 where nothing is divided by it."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    if target.is_floating_point() or options.reduction == NONE or not input.numel():
        return input.new_zeros((), dtype=dtype)
    kept = target != options.ignore_index
    if weight is None:
        return kept.sum().to(dtype)
    return torch.where(kept, weight.to(dtype)[torch.where(kept, target, 0).long()], 0).sum()


def cross_entropy_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    total: torch.Tensor,
    options: Options,
    wants_input: bool,
    wants_target: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(∂L/∂input, ∂L/∂target), empty where not wanted, in the layouts of input and target."""
    found = gradients(grad, input, target, weight, total, options, wants_input, wants_target)
    wants = (wants_input, input), (wants_target, target)
    like = [elementwise_like(tensor) if wanted else tensor.new_empty(0) for wanted, tensor in wants]
    return tuple(out.copy_(each) for out, each in zip(like, found, strict=True))  # type: ignore[return-value]


def gradients(
    grad: torch.Tensor,
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    total: torch.Tensor,
    options: Options,
    wants_input: bool,
    wants_target: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``(p · Σ q − q) · g`` and ``− (1 − smoothing) · weight · log p · g``, g ∂L/∂loss of each row."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    logs = torch.log_softmax(input.to(dtype), 1)
    classes = input.shape[1]
    of_class = logs.new_ones(classes) if weight is None else weight.to(dtype)
    of_class = of_class.view(-1, *(1,) * (input.dim() - 2))
    share = options.smoothing / max(classes, 1)
    g = grad.to(dtype)
    g = (g if options.reduction == NONE else g.expand(input.shape[0], *input.shape[2:])).unsqueeze(1)
    if target.is_floating_point():
        q = (target.to(dtype) * (1 - options.smoothing) + share) * of_class
        if options.reduction == MEAN and input.numel():
            g = g / (input.numel() // classes)
    else:
        kept = (target != options.ignore_index).unsqueeze(1)
        label = torch.where(kept, target.unsqueeze(1), 0).long()
        chosen = torch.zeros_like(logs)
        if classes:  # of none all rows are ignored
            chosen = chosen.scatter(1, label, 1.0)
        q = chosen * of_class * (1 - options.smoothing) + share * of_class
        if options.reduction == MEAN:
            g = g / total
        # An ignored row has the gradient 0, though all may be ignored.
        q, g = torch.where(kept, q, 0), torch.where(kept, g, 0)
    by_input = (logs.exp() * q.sum(1, keepdim=True) - q) * g if wants_input else input.new_empty(0)
    by_target = -(1 - options.smoothing) * of_class * logs * g if wants_target else target.new_empty(0)
    return by_input.to(input.dtype), by_target.to(target.dtype)
