"""Layers on gpukern's kernels: subclasses of the ``torch.nn`` class of the same name.

Same constructor, same parameters and ``state_dict``; only the computation differs. ``isinstance(layer,
torch.nn.Conv2d)`` stays true, and checkpoints move both ways. ``BatchNormAct2d``, which torch.nn has not, is a
``torch.nn.BatchNorm2d`` with an epilogue. ``Sequential`` computes neighbours among these layers together.
"""

from gpukern.nn.activation import GELU, Hardsigmoid, Hardswish, LeakyReLU, ReLU, ReLU6, Sigmoid, SiLU, Tanh
from gpukern.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormAct2d
from gpukern.nn.conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from gpukern.nn.dropout import Dropout, Dropout1d, Dropout2d, Dropout3d
from gpukern.nn.group_norm import GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from gpukern.nn.linear import Linear
from gpukern.nn.pooling import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveMaxPool1d,
    AvgPool1d,
    AvgPool2d,
    MaxPool1d,
    MaxPool2d,
)
from gpukern.nn.pooling3d import AdaptiveAvgPool3d, AdaptiveMaxPool3d, AvgPool3d, MaxPool3d
from gpukern.nn.sequential import Sequential
from gpukern.nn.sync_batch_norm import SyncBatchNorm

__all__ = [
    "GELU",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct2d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "GroupNorm",
    "Hardsigmoid",
    "Hardswish",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LeakyReLU",
    "Linear",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "ReLU",
    "ReLU6",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "SyncBatchNorm",
    "Tanh",
]
