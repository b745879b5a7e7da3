"""What launch plans need to know about a GPU, as plain numbers: plans are made and tested on machines without one."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceSpec:
    """Limits of one GPU.

    ``shared_memory`` is the most a block can ask for, in bytes; ``sm_count`` the number of streaming multiprocessors.
    """

    name: str
    compute_capability: tuple[int, int]
    sm_count: int
    shared_memory: int


# Sources: NVIDIA A100 and H100 architecture whitepapers (SM counts); CUDA C++ Programming Guide, table "Technical
# Specifications per Compute Capability" (163 KB and 227 KB of shared memory for a block).
A100 = DeviceSpec("A100", (8, 0), sm_count=108, shared_memory=163 * 1024)
H100 = DeviceSpec("H100", (9, 0), sm_count=132, shared_memory=227 * 1024)

#: Emulated kernels run with the plan of this device.
EMULATED = H100


@functools.cache
def device_spec(device: torch.device) -> DeviceSpec:
    """The limits of ``device``; for the CPU (emulated kernels) those of :data:`EMULATED`."""
    if device.type != "cuda":
        return EMULATED
    properties = torch.cuda.get_device_properties(device)
    return DeviceSpec(
        name=properties.name,
        compute_capability=(properties.major, properties.minor),
        sm_count=properties.multi_processor_count,
        shared_memory=properties.shared_memory_per_block_optin,
    )
