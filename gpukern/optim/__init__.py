"""Optimizers of ``torch.optim``, and others for large batches, that update a whole model in one kernel launch.

On CUDA tensors the kernels are CUDA C++, compiled and launched through CuPy; on a CPU plain PyTorch, or with
``GPUKERN_EMULATE=1`` the same kernels compiled for the host.
"""

from gpukern.optim.classes import LAMB, LARS, SGD, Adagrad, Adam, AdamW, Lion, RMSprop
from gpukern.optim.elementwise import elementwise_kernel
from gpukern.optim.optimizer import Optimizer

__all__ = ["LAMB", "LARS", "SGD", "Adagrad", "Adam", "AdamW", "Lion", "Optimizer", "RMSprop", "elementwise_kernel"]
