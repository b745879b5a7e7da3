"""How well a network does on samples it is not trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from models.data import Samples
from models.distributed import Group

_BATCH = 500


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    samples: Samples,
    inputs: Callable[[torch.Tensor], torch.Tensor] | None = None,
    group: Group | None = None,
    batch_size: int = _BATCH,
    dtype: torch.dtype | None = None,
) -> tuple[float, float]:
    """The mean cross entropy and the share of ``samples`` whose largest logit is that of their label.

    ``inputs`` makes the model's inputs of images; both are in evaluation mode meanwhile, and compute in mixed
    precision where there is a ``dtype``. In several processes each computes a share, and all get the result.
    """
    group = group or Group()
    modules = [module for module in (model, inputs) if isinstance(module, torch.nn.Module)]
    modes = [{each: each.training for each in module.modules()} for module in modules]
    for module in modules:
        module.eval()
    images, labels = samples.images[group.rows], samples.labels[group.rows]
    sums = torch.zeros(2, dtype=torch.float64, device=labels.device)
    for part, wanted in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        with torch.autocast(labels.device.type, dtype, enabled=dtype is not None):
            logits = model(part if inputs is None else inputs(part))
        sums[0] += torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum")
        sums[1] += (logits.argmax(1) == wanted).sum()
    for mode in modes:
        for module, was_training in mode.items():  # not all of a module's parts are in the same mode
            module.training = was_training
    loss, correct = group.sum(sums).tolist()
    return loss / len(samples), correct / len(samples)


def accuracy(model: torch.nn.Module, samples: Samples, batch_size: int = _BATCH) -> float:
    """The share of ``samples`` whose largest logit is that of their label."""
    return evaluate(model, samples, batch_size=batch_size)[1]
