"""gpukern: convolution, pooling and linear layers for PyTorch on Triton kernels, testable without a GPU."""

from gpukern import functional, nn
from gpukern.version import __version__

__all__ = ["__version__", "functional", "nn"]
