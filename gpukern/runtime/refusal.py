"""The error for a refusal by the driver. Imports no Triton: planning alone needs it too."""

from __future__ import annotations


class DescriptorRefused(RuntimeError):
    """The driver makes no tensor map of a descriptor that keeps all documented rules; nothing was launched."""
