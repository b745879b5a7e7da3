"""Limits of a tensor's device, or of the device that is pretended."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

from gpukern.runtime.device import EMULATED, DeviceSpec

_pretended: DeviceSpec | None = None


def device_spec(device: torch.device) -> DeviceSpec:
    """The limits of ``device``; for the CPU (emulated kernels) those of :data:`gpukern.runtime.device.EMULATED`."""
    return _pretended or _query(device)


@contextlib.contextmanager
def pretend(spec: DeviceSpec) -> Iterator[None]:
    """Plan for ``spec`` inside the block, whatever the tensors' device: for tools that compile or explain."""
    global _pretended
    before, _pretended = _pretended, spec
    try:
        yield
    finally:
        _pretended = before


@functools.cache
def _query(device: torch.device) -> DeviceSpec:
    if device.type != "cuda":
        return EMULATED
    properties = torch.cuda.get_device_properties(device)
    return DeviceSpec(
        name=properties.name,
        compute_capability=(properties.major, properties.minor),
        sm_count=properties.multi_processor_count,
        shared_memory=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )
