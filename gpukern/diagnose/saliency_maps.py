"""Saliency maps: which pixels the score of a class depends on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gpukern.diagnose.calling import buffers_kept, device_of, python_module, random_state_kept
from gpukern.diagnose.errors import DiagnoseError
from gpukern.diagnose.figures import panels, written
from gpukern.diagnose.images import check_images, show_image
from gpukern.runtime.evaluation import evaluate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Saliency:
    """``maps`` [N, H, W] of ``images``, for the scores of the classes ``labels`` [N]."""

    images: torch.Tensor
    maps: torch.Tensor
    labels: torch.Tensor
    scores: torch.Tensor

    def plot(self, path: str | os.PathLike[str] | None = None, *, names: Sequence[str] = (), most: int = 8) -> Figure:
        """Draw the first ``most`` images above their maps; ``names`` are those of the classes."""
        number = min(most, len(self.images))
        figure, axes = panels(2, number, 1.5 * number + 0.3, 3.5)
        for column in range(number):
            show_image(axes[0, column], self.images[column])
            label = int(self.labels[column])
            axes[0, column].set_title(names[label] if names else str(label), fontsize=9)
            axes[1, column].imshow(self.maps[column].float().cpu().numpy(), cmap="inferno")
            axes[1, column].set_axis_off()
        figure.suptitle("Images, and where the score of their class depends on them", fontsize=11)
        return written(figure, path)


def saliency(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor | None = None) -> Saliency:
    """Compute max over channels of |∂ score / ∂ pixel| for each image (Simonyan et al., 2013).

    The score of sample n is logit ``labels[n]`` of the model's output [N, C], in evaluation mode; without labels that
    of the largest logit. The model, its gradients and its mode are left as they were.

    Parameters
    ----------
    images:
        [N, C, H, W] or [N, H, W], floating point, as the model takes them.
    labels:
        [N], whole numbers below C.

    Raises
    ------
    TypeError, ValueError for images or labels of another form; DiagnoseError if the output is not [N, C], or does not
    depend on the images.
    """
    model = python_module(model, "saliency")
    images = check_images(images, "saliency")
    if not images.is_floating_point():
        raise TypeError(f"saliency() needs floating-point images, got {images.dtype}")
    device = device_of(model)
    pixels = images.detach().to(device or images.device).clone().requires_grad_()
    with random_state_kept(), buffers_kept(model), torch.enable_grad():
        evaluate(model)
        logits = model(pixels.clone())  # not the leaf: the first layer may work in place
        if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != len(images):
            got = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise DiagnoseError(f"saliency() needs logits [N, C] of the model, got {got}")
        chosen = logits.argmax(1) if labels is None else _checked(labels, logits)
        scores = logits.gather(1, chosen[:, None])[:, 0]
        if not scores.requires_grad:
            raise DiagnoseError("the model's output does not depend on the images by anything with a gradient")
        # The sum: one image's score does not depend on another image in evaluation mode.
        (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    maps = gradient.abs().amax(1) if gradient.dim() == 4 else gradient.abs()
    return Saliency(images.detach(), maps.detach(), chosen.detach(), scores.detach())


def _checked(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    labels = torch.as_tensor(labels, device=logits.device)
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"saliency() takes {len(logits)} whole numbers as labels, got {list(labels.shape)}, {labels.dtype}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(f"labels must be 0 to {logits.shape[1] - 1}, got {int(labels.min())} to {int(labels.max())}")
    return labels.long()
