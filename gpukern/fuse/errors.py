"""What fusing raises."""


class FusionError(RuntimeError):
    """The model cannot be captured, or what came out does not compute what it did."""
