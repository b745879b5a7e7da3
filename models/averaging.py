"""An exponential moving average of a network's weights."""

from __future__ import annotations

import copy

import torch


class Average:
    """``θ̄ := d θ̄ + (1 − d) θ`` after every step, with d = min(decay, (1 + t)/(10 + t)) at step t.

    The smaller d of the first steps forgets the random weights of the beginning. Buffers, a batch norm's statistics,
    are averaged as the weights; integers are copied. ``model`` is the averaged network, in evaluation mode.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for mean, value in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, 1 - decay)
            else:
                mean.copy_(value)
        self.steps += 1

    def state_dict(self) -> dict:
        return {"steps": self.steps, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"])
