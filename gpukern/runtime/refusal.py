"""What a driver says no to. Without Triton: who only plans must know of it too."""

from __future__ import annotations


class DescriptorRefused(RuntimeError):
    """The driver makes no tensor map of a descriptor that keeps all documented rules; nothing was launched."""
