"""The network that a checkpoint of ``models.train`` holds."""

from __future__ import annotations

from typing import Any

from models.lenet import LeNet5


def network(state: dict[str, Any]) -> LeNet5:
    """As it was when ``state`` was saved, on the CPU. KeyError or RuntimeError where the state is not whole."""
    # Checkpoints from before there was a choice do not name it.
    model = LeNet5(batch_norm=state["config"].get("batch_norm", False))
    model.load_state_dict(state["model"])
    return model
