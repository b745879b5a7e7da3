"""The error of what has no dense form."""

from __future__ import annotations


class DenseError(ValueError):
    """No dense network computes a patch classifier; the message has the name of the layer and the reason."""

    #: The layer or function, once it is known.
    layer: str | None = None

    def in_layer(self, name: str) -> DenseError:
        """The error with the name in front, unless it has one."""
        if self.layer is not None:
            return self
        made = DenseError(f"{name}: {self}")
        made.layer = name
        return made
