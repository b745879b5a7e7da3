"""What launch plans need to know about a GPU, as plain numbers: plans are made and tested on machines without one."""

from __future__ import annotations

from dataclasses import dataclass


# eq=False: specs are constants or made once for each device, and are looked up by on every call.
@dataclass(frozen=True, eq=False)
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

#: Emulated kernels run with the plan of this device: few multiprocessors, so that the interpreter, which takes the same
#: time for a small tile as for a large one, gets few tiles.
EMULATED = DeviceSpec("emulated", (9, 0), sm_count=2, shared_memory=H100.shared_memory)
