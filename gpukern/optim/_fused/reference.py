"""The same rules in plain torch, for CPU tensors without emulation: the mathematics, a tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

#: Of one tensor's update: hyperparameters by name, the number of this update, and norms where the rule has any.
Numbers = Mapping[str, float]
States = Mapping[str, torch.Tensor]
Update = Callable[[torch.Tensor, torch.Tensor, States, Numbers], torch.Tensor]


def sgd(p: torch.Tensor, g: torch.Tensor, states: States, n: Numbers) -> torch.Tensor:
    """g ← ±g + λp;  b ← μb + (1 − τ)g, at first b ← g;  p ← p − γ(g + μb) with Nesterov's momentum, else p − γb."""
    return p - n["lr"] * _with_momentum(_decayed(p, g, n), states, n)


def adagrad(p: torch.Tensor, g: torch.Tensor, states: States, n: Numbers) -> torch.Tensor:
    """s ← s + g²;  p ← p − γ/(1 + (t − 1)η) · g/(√s + ε)."""
    g = _decayed(p, g, n)
    states["sum"].add_(g * g)
    return p - n["lr"] / (1 + (n["step"] - 1) * n["lr_decay"]) * g / (states["sum"].sqrt() + n["eps"])


def rmsprop(p: torch.Tensor, g: torch.Tensor, states: States, n: Numbers) -> torch.Tensor:
    """v ← αv + (1 − α)g², centered less the square of the mean's average;  p ← p − γg/(√v + ε), or with momentum."""
    g = _decayed(p, g, n)
    states["square_avg"].mul_(n["alpha"]).add_((1 - n["alpha"]) * g * g)
    variance = states["square_avg"]
    if n["centered"]:
        states["grad_avg"].add_((1 - n["alpha"]) * (g - states["grad_avg"]))
        variance = variance - states["grad_avg"] ** 2
    direction = g / (variance.sqrt() + n["eps"])
    if n["momentum"]:
        direction = states["momentum_buffer"].mul_(n["momentum"]).add_(direction)
    return p - n["lr"] * direction


def adam(p: torch.Tensor, g: torch.Tensor, states: States, n: Numbers) -> torch.Tensor:
    """m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  p ← p − γ m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + ε)."""
    if n["decoupled"]:
        g = _signed(g, n)
        p = p * (1 - n["lr"] * n["weight_decay"])
    else:
        g = _decayed(p, g, n)
    first, second = _moments(g, states, n)
    if n["amsgrad"]:
        second = states["max_exp_avg_sq"].copy_(torch.maximum(states["max_exp_avg_sq"], second))
    root = math.sqrt(1 - n["beta2"] ** n["step"])
    return p - n["lr"] / (1 - n["beta1"] ** n["step"]) * first / (second.sqrt() / root + n["eps"])


def lion(p: torch.Tensor, g: torch.Tensor, states: States, n: Numbers) -> torch.Tensor:
    """p ← (1 − γλ)p − γ sign(β₁m + (1 − β₁)g);  m ← β₂m + (1 − β₂)g."""
    g, average = _signed(g, n), states["exp_avg"]
    direction = average + (1 - n["beta1"]) * (g - average)
    average.add_((1 - n["beta2"]) * (g - average))
    return p * (1 - n["lr"] * n["weight_decay"]) - n["lr"] * torch.where(direction.isnan(), direction, direction.sign())


def lars(p: torch.Tensor, g: torch.Tensor, states: States, n: Numbers) -> torch.Tensor:
    """SGD of (g + λp) · η‖p‖/(‖g‖ + λ‖p‖ + ε)."""
    size, slope = p.norm().item(), g.norm().item()
    g = _decayed(p, g, n)
    if size > 0 and slope > 0:
        g = g * (n["trust_coefficient"] * size / (slope + n["weight_decay"] * size + n["eps"]))
    return p - n["lr"] * _with_momentum(g, states, n)


def lamb(p: torch.Tensor, g: torch.Tensor, states: States, n: Numbers) -> torch.Tensor:
    """u = m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + ε) + λp;  p ← p − γ‖p‖/‖u‖ · u."""
    first, second = _moments(_signed(g, n), states, n)
    root = math.sqrt(1 - n["beta2"] ** n["step"])
    direction = first / (1 - n["beta1"] ** n["step"]) / (second.sqrt() / root + n["eps"])
    if n["weight_decay"]:
        direction = direction + n["weight_decay"] * p
    size, length = p.norm().item(), direction.norm().item()
    return p - n["lr"] * (size / length if size > 0 and length > 0 else 1.0) * direction


#: By the name of the rule.
UPDATES: dict[str, Update] = {update.__name__: update for update in (sgd, adagrad, rmsprop, adam, lion, lars, lamb)}


def _signed(g: torch.Tensor, n: Numbers) -> torch.Tensor:
    return -g if n["maximize"] else g


def _decayed(p: torch.Tensor, g: torch.Tensor, n: Numbers) -> torch.Tensor:
    g = _signed(g, n)
    return g + n["weight_decay"] * p if n["weight_decay"] else g


def _with_momentum(g: torch.Tensor, states: States, n: Numbers) -> torch.Tensor:
    if not n["momentum"]:
        return g
    buffer = states["momentum_buffer"]
    if n["step"] == 1:
        buffer.copy_(g)
    else:
        buffer.mul_(n["momentum"]).add_((1 - n["dampening"]) * g)
    return g + n["momentum"] * buffer if n["nesterov"] else buffer


def _moments(g: torch.Tensor, states: States, n: Numbers) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = states["exp_avg"], states["exp_avg_sq"]
    first.add_((1 - n["beta1"]) * (g - first))
    second.mul_(n["beta2"]).add_((1 - n["beta2"]) * g * g)
    return first, second
