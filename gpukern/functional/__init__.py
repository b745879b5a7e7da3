"""The functions of ``torch.nn.functional`` that gpukern computes itself, with the same signatures, defaults and errors.

All are differentiable and take float32, float16 and bfloat16 (on a CPU in reference mode also float64). What is
channels_last gives channels_last, but where torch's own result is contiguous, and each function says so. They follow
``torch.autocast`` as the PyTorch functions do.
"""

import torch.fx

from gpukern.functional._activation import (
    gelu,
    hardsigmoid,
    hardswish,
    leaky_relu,
    log_softmax,
    relu,
    relu6,
    sigmoid,
    silu,
    softmax,
    tanh,
)
from gpukern.functional._conv import conv1d, conv2d, conv_transpose1d, conv_transpose2d
from gpukern.functional._dense import linear
from gpukern.functional._loss import cross_entropy
from gpukern.functional._norm import batch_norm, conv2d_batch_norm, group_norm, instance_norm
from gpukern.functional._pooling import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_max_pool1d,
    avg_pool1d,
    avg_pool2d,
    max_pool1d,
    max_pool2d,
)
from gpukern.functional._regularization import dropout, dropout1d, dropout2d, dropout3d
from gpukern.functional._row_norm import layer_norm, rms_norm
from gpukern.functional._volumes import (
    adaptive_avg_pool3d,
    adaptive_max_pool3d,
    avg_pool3d,
    conv3d,
    conv_transpose3d,
    max_pool3d,
)

# No function offers it, but saved graphs have it.
from gpukern.ops import conv_max_pool2d as conv_max_pool2d

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "batch_norm",
    "conv1d",
    "conv2d",
    "conv2d_batch_norm",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "cross_entropy",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "gelu",
    "group_norm",
    "hardsigmoid",
    "hardswish",
    "instance_norm",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log_softmax",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "relu",
    "relu6",
    "rms_norm",
    "sigmoid",
    "silu",
    "softmax",
    "tanh",
]

for _name in __all__:
    # One node of a graph that torch.fx traces, which would else go on into the function with no tensor.
    torch.fx.wrap(_name)
