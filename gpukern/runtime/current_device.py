"""The limits of the device a tensor is on."""

from __future__ import annotations

import functools

import torch

from gpukern.runtime.device import EMULATED, DeviceSpec


@functools.cache
def device_spec(device: torch.device) -> DeviceSpec:
    """The limits of ``device``; for the CPU (emulated kernels) those of :data:`gpukern.runtime.device.EMULATED`."""
    if device.type != "cuda":
        return EMULATED
    properties = torch.cuda.get_device_properties(device)
    return DeviceSpec(
        name=properties.name,
        compute_capability=(properties.major, properties.minor),
        sm_count=properties.multi_processor_count,
        shared_memory=properties.shared_memory_per_block_optin,
    )
