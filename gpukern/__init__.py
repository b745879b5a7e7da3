"""gpukern: layers for PyTorch on Triton kernels, optimizers on CuPy, fusion for inference, testable without a GPU."""

from gpukern import functional, nn, onnx, optim
from gpukern.convert import convert
from gpukern.flops import register_formulas
from gpukern.fusion import fuse, load
from gpukern.summary import summary
from gpukern.version import __version__

__all__ = ["__version__", "convert", "functional", "fuse", "load", "nn", "onnx", "optim", "summary"]

register_formulas()
onnx.register_decompositions()
