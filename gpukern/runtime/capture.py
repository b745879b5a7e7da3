"""Identity of the CUDA graph capture that a stream takes part in: PyTorch only reports that there is one."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

_ACTIVE = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE


def capture_id(stream: int) -> int | None:
    """Return the capture's number, unique in the process; None if the driver does not give it.

    ``stream`` is the address of a ``CUstream``. Streams that fork from one that is captured take part in its capture.
    """
    ask = _driver()
    if ask is None:
        return None
    status, number = ctypes.c_int(), ctypes.c_uint64()
    failed = ask(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None)
    return number.value if not failed and status.value == _ACTIVE else None


@functools.cache
def _driver() -> Callable[..., int] | None:
    """Return ``cuStreamGetCaptureInfo_v2``: added in CUDA 11.3, and kept by later drivers for programs built for it."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None
