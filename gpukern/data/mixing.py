"""Targets that are no single class: smoothed labels, and mixtures of two samples."""

from __future__ import annotations

import torch

from gpukern.runtime.arguments import as_float, as_int, check_tensors
from gpukern.runtime.integers import require
from gpukern.runtime.tensors import check_floating, memory_format_of


def smooth_labels(labels: torch.Tensor, classes: int, smoothing: float = 0.1) -> torch.Tensor:
    """``t[n, c] = (1 − s) · [c = labels[n]] + s / classes``, float32 [N, classes], for :func:`cross_entropy`.

    The loss is that of the labels with ``label_smoothing=s``, which needs no such tensor: this is for what mixes or
    weighs targets itself. ``labels``: int64 [N]. See Szegedy et al., "Rethinking the Inception architecture for
    computer vision", 2016. RuntimeError for other labels, and as ``torch.nn.functional.one_hot`` for one that is no
    class; ValueError for a smoothing outside [0, 1].
    """
    check_tensors("smooth_labels", labels)
    smoothing = as_float("smoothing", smoothing)
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing has to be between 0 and 1, but got {smoothing}")
    if labels.dtype is not torch.int64 or labels.dim() != 1:
        raise RuntimeError(f"smooth_labels: expected int64 labels [N], but got {list(labels.shape)} of {labels.dtype}")
    targets = torch.nn.functional.one_hot(labels, as_int("classes", classes)).float()
    return targets.mul_(1 - smoothing).add_(smoothing / classes)


def mixup(
    images: torch.Tensor,
    targets: torch.Tensor,
    alpha: float = 0.2,
    *,
    classes: int | None = None,
    smoothing: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x̃ = λ x + (1 − λ) x′`` and ``t̃ = λ t + (1 − λ) t′`` with each sample's partner x′ at random in the batch.

    λ has the distribution Beta(``alpha``, ``alpha``), one number for the batch. The targets are probabilities of the
    classes, which ``gpukern.functional.cross_entropy`` and torch's take.

    Parameters
    ----------
    images:
        floating-point [N, ...]; the result has its dtype and memory format.
    targets:
        labels, int64 [N], and then ``classes`` must be told; or probabilities [N, classes].
    alpha:
        above 0; small numbers leave most batches nearly as they are.
    smoothing:
        of labels, as for :func:`smooth_labels`.
    generator:
        of the CPU, where λ and the partners are drawn; by default torch's own.

    See Zhang et al., "mixup: beyond empirical risk minimization", 2018. Raises ValueError for ``alpha`` and
    ``smoothing``, NotImplementedError for images of bytes, RuntimeError for shapes, TypeError without ``classes``.
    """
    check_tensors("mixup", images, targets)
    check_floating("mixup", images)
    alpha = as_float("alpha", alpha)
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha has to be above 0 and finite, but got {alpha}")
    if not targets.is_floating_point():
        if classes is None:
            raise TypeError("mixup: of labels the number of classes must be told: classes=")
        targets = smooth_labels(targets, classes, smoothing)
    elif smoothing:
        raise ValueError("mixup: smoothing is for labels, and these targets are probabilities")
    require(
        images.dim() > 0 and targets.dim() == 2 and len(images) == len(targets),
        f"mixup: expected as many targets [N, classes] as images, but got {list(targets.shape)} for "
        f"{list(images.shape)}",
    )
    # Of two classes Dirichlet's distribution is Beta's, and torch draws it with a generator.
    share = float(torch._sample_dirichlet(torch.full((2,), alpha, dtype=torch.float64), generator)[0])
    partners = torch.randperm(len(images), generator=generator).to(images.device)
    mixed = images[partners].lerp(images, share).contiguous(memory_format=memory_format_of(images))
    return mixed, targets[partners].lerp(targets, share)
