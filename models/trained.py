"""The network that a checkpoint of ``models.train`` holds."""

from __future__ import annotations

from typing import Any

import torch

from models.config import Config
from models.lenet import LeNet5


def network(state: dict[str, Any]) -> torch.nn.Module:
    """As it was evaluated when ``state`` was saved, on the CPU: with averaged weights where there are such.

    On torch's layers; LeNet-5 on gpukern's. KeyError or RuntimeError where the state is not whole.
    """
    # Checkpoints from before there was a choice do not name it.
    known = Config.__dataclass_fields__
    config = Config(**{name: value for name, value in state["config"].items() if name in known})
    classes = len(state.get("classes", range(LeNet5.CLASSES)))
    model = config.make_network(classes, tuple(state.get("image_size", LeNet5.INPUT_SIZE)))
    if config.precision == "fp64":
        model = model.double()
    model.load_state_dict((state.get("average") or state)["model"])
    return model
