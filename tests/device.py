"""Where the tests run the kernels: the GPU, or the CPU when emulating."""

import torch

from gpukern.runtime.mode import EMULATE

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not EMULATE else "cpu")
