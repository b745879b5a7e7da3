"""ResNet-18 as a trained one is: its batch norms do something."""

from __future__ import annotations

import torch
from torch import nn

from models import resnet


def resnet18(width: int = 64) -> nn.Module:
    """With batch-norm statistics that are not trivial, in inference mode."""
    return as_if_trained(resnet.resnet18(width=width))


def as_if_trained(model: nn.Module) -> nn.Module:
    """``model`` itself, in inference mode, with batch norms that change the scale and the mean."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
    return model.eval()
