"""What 8-bit kernels need of a GPU."""

from __future__ import annotations

import torch

from gpukern.runtime.current_device import device_spec


def check_device(operation: str, device: torch.device, *dtypes: torch.dtype) -> None:
    """Raise NotImplementedError if a kernel for ``dtypes`` needs what ``device`` does not have."""
    if torch.float8_e4m3fn not in dtypes:
        return
    spec = device_spec(device)
    if spec.compute_capability < (8, 9):
        major, minor = spec.compute_capability
        raise NotImplementedError(
            f"{operation}: float8_e4m3fn needs a GPU of compute capability 8.9 or higher (Ada, Hopper, Blackwell), "
            f"but {spec.name} has {major}.{minor}, on which int8 works"
        )
