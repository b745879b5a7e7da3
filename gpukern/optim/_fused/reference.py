"""The same rules in plain torch, for CPU tensors without emulation: the mathematics, a tensor at a time.

What torch has too is computed by the operations of torch's own single-tensor code, in their order: the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

#: Numbers of a tensor's update: hyperparameters by name, the count of this update, and norms if the rule has any.
Numbers = Mapping[str, float]
States = Mapping[str, torch.Tensor]
#: Changes the parameter and the states, and leaves the gradient as it is.
Update = Callable[[torch.Tensor, torch.Tensor, States, Numbers], object]


def sgd(p: torch.Tensor, g: torch.Tensor, states: States, n: Numbers) -> None:
    """g ← ±g + λp;  b ← μb + (1 − τ)g, at first b ← g;  p ← p − γ(g + μb) with Nesterov's momentum, else p − γb."""
    p.add_(_with_momentum(_decayed(p, g, n), states, n), alpha=-n["lr"])


def adagrad(p: torch.Tensor, g: torch.Tensor, states: States, n: Numbers) -> None:
    """s ← s + g²;  p ← p − γ/(1 + (t − 1)η) · g/(√s + ε)."""
    g = _decayed(p, g, n)
    root = states["sum"].addcmul_(g, g).sqrt()
    p.addcdiv_(g, root.add_(n["eps"]), value=-n["lr"] / (1 + (n["step"] - 1) * n["lr_decay"]))


def rmsprop(p: torch.Tensor, g: torch.Tensor, states: States, n: Numbers) -> None:
    """v ← αv + (1 − α)g², centered less the square of the mean's average;  p ← p − γg/(√v + ε), or with momentum."""
    g, taken = _decayed(p, g, n), 1 - n["alpha"]
    variance = states["square_avg"].mul_(n["alpha"]).addcmul_(g, g, value=taken)
    if n["centered"]:
        mean = states["grad_avg"].lerp_(g, taken)
        variance = variance.addcmul(mean, mean, value=-1)
    root = variance.sqrt().add_(n["eps"])
    if n["momentum"]:
        p.add_(states["momentum_buffer"].mul_(n["momentum"]).addcdiv_(g, root), alpha=-n["lr"])
    else:
        p.addcdiv_(g, root, value=-n["lr"])


def adam(p: torch.Tensor, g: torch.Tensor, states: States, n: Numbers) -> None:
    """m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  p ← p − γ m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + ε)."""
    if not n["decoupled"]:
        g = _decayed(p, g, n)
    else:
        g = _signed(g, n)
        if n["weight_decay"]:
            p.mul_(1 - n["lr"] * n["weight_decay"])
    first, second = _moments(g, states, n)
    if n["amsgrad"]:
        second = torch.maximum(states["max_exp_avg_sq"], second, out=states["max_exp_avg_sq"])
    p.addcdiv_(first, _unbiased_root(second, n), value=-n["lr"] / (1 - n["beta1"] ** n["step"]))


def lion(p: torch.Tensor, g: torch.Tensor, states: States, n: Numbers) -> None:
    """p ← (1 − γλ)p − γ sign(β₁m + (1 − β₁)g);  m ← β₂m + (1 − β₂)g."""
    g, average = _signed(g, n), states["exp_avg"]
    direction = average.lerp(g, 1 - n["beta1"])
    average.lerp_(g, 1 - n["beta2"])
    # The sign of NaN would be 0.
    sign = torch.where(direction.isnan(), direction, direction.sign())
    p.mul_(1 - n["lr"] * n["weight_decay"]).add_(sign, alpha=-n["lr"])


def lars(p: torch.Tensor, g: torch.Tensor, states: States, n: Numbers) -> None:
    """SGD of (g + λp) · η‖p‖/(‖g‖ + λ‖p‖ + ε)."""
    size, slope = p.norm().item(), g.norm().item()
    g = _decayed(p, g, n)
    if size > 0 and slope > 0:
        g = g * (n["trust_coefficient"] * size / (slope + n["weight_decay"] * size + n["eps"]))
    p.add_(_with_momentum(g, states, n), alpha=-n["lr"])


def lamb(p: torch.Tensor, g: torch.Tensor, states: States, n: Numbers) -> None:
    """u = m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + ε) + λp;  p ← p − γ‖p‖/‖u‖ · u."""
    first, second = _moments(_signed(g, n), states, n)
    direction = first / (1 - n["beta1"] ** n["step"]) / _unbiased_root(second, n)
    if n["weight_decay"]:
        direction.add_(p, alpha=n["weight_decay"])
    size, length = p.norm().item(), direction.norm().item()
    p.add_(direction, alpha=-n["lr"] * (size / length if size > 0 and length > 0 else 1.0))


#: By the name of the rule.
UPDATES: dict[str, Update] = {update.__name__: update for update in (sgd, adagrad, rmsprop, adam, lion, lars, lamb)}


def _signed(g: torch.Tensor, n: Numbers) -> torch.Tensor:
    return -g if n["maximize"] else g


def _decayed(p: torch.Tensor, g: torch.Tensor, n: Numbers) -> torch.Tensor:
    g = _signed(g, n)
    return g.add(p, alpha=n["weight_decay"]) if n["weight_decay"] else g


def _with_momentum(g: torch.Tensor, states: States, n: Numbers) -> torch.Tensor:
    if not n["momentum"]:
        return g
    buffer = states["momentum_buffer"]
    if n["step"] == 1:
        buffer.copy_(g)
    else:
        buffer.mul_(n["momentum"]).add_(g, alpha=1 - n["dampening"])
    return g.add(buffer, alpha=n["momentum"]) if n["nesterov"] else buffer


def _moments(g: torch.Tensor, states: States, n: Numbers) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = states["exp_avg"], states["exp_avg_sq"]
    return first.lerp_(g, 1 - n["beta1"]), second.mul_(n["beta2"]).addcmul_(g, g, value=1 - n["beta2"])


def _unbiased_root(second: torch.Tensor, n: Numbers) -> torch.Tensor:
    return second.sqrt().div_((1 - n["beta2"] ** n["step"]) ** 0.5).add_(n["eps"])
