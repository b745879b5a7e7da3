"""Layers on gpukern's kernels: subclasses of the ``torch.nn`` class of the same name.

Same constructor, same parameters and ``state_dict``; only the computation differs. ``isinstance(layer,
torch.nn.Conv2d)`` stays true, and checkpoints move both ways. ``BatchNormAct2d``, which torch.nn has not, is a
``torch.nn.BatchNorm2d`` with an epilogue, and ``LayerNorm2d`` ConvNeXt's layer norm over channels. ``Sequential``
computes neighbours among these layers together.
"""

from gpukern.nn.activation import (
    GELU,
    Hardsigmoid,
    Hardswish,
    LeakyReLU,
    LogSoftmax,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Softmax,
    Softmax2d,
    Tanh,
)
from gpukern.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormAct2d
from gpukern.nn.conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from gpukern.nn.dropout import Dropout, Dropout1d, Dropout2d, Dropout3d
from gpukern.nn.group_norm import GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from gpukern.nn.layer_norm import LayerNorm, LayerNorm2d, RMSNorm
from gpukern.nn.linear import Linear
from gpukern.nn.loss import CrossEntropyLoss
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
    "CrossEntropyLoss",
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
    "LayerNorm",
    "LayerNorm2d",
    "LeakyReLU",
    "Linear",
    "LogSoftmax",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "RMSNorm",
    "ReLU",
    "ReLU6",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softmax2d",
    "SyncBatchNorm",
    "Tanh",
]
