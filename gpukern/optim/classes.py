"""The optimizers: torch's, with its constructors, and three for large batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from gpukern.optim._fused import rules
from gpukern.optim.optimizer import Optimizer


class SGD(Optimizer, torch.optim.SGD):
    """``b ← μ b + (1 − τ) g``, at first ``b ← g``; ``p ← p − γ b``, with ``nesterov`` ``p ← p − γ (g + μ b)``.

    γ is ``lr``, μ ``momentum``, τ ``dampening``, and g the gradient plus ``weight_decay`` · p. ``torch.optim.SGD``; for
    the rest see :class:`Optimizer`.
    """

    _rule = rules.SGD
    _counts = False
    _takes_sparse = True


class Adagrad(Optimizer, torch.optim.Adagrad):
    """``s ← s + g²``; ``p ← p − γ / (1 + (t − 1) η) · g / (√s + ε)``, η is ``lr_decay``, t counts the updates.

    Duchi, Hazan and Singer, "Adaptive subgradient methods for online learning and stochastic optimization", 2011.
    ``torch.optim.Adagrad``; for the rest see :class:`Optimizer`.
    """

    _rule = rules.ADAGRAD
    _begins: ClassVar = {"sum": "initial_accumulator_value"}
    _takes_sparse = True


class RMSprop(Optimizer, torch.optim.RMSprop):
    """``v ← α v + (1 − α) g²``; ``p ← p − γ g / (√v + ε)``, with ``momentum`` by a buffer of these directions.

    ``centered`` takes the square of an average of g from v. Tieleman and Hinton, lecture 6.5 of "Neural networks for
    machine learning", 2012. ``torch.optim.RMSprop``; for the rest see :class:`Optimizer`.
    """

    _rule = rules.RMSPROP


class Adam(Optimizer, torch.optim.Adam):
    """``m ← β₁ m + (1 − β₁) g``, ``v ← β₂ v + (1 − β₂) g²``; ``p ← p − γ m̂ / (√v̂ + ε)``.

    ``m̂ = m / (1 − β₁ᵗ)`` and ``v̂ = v / (1 − β₂ᵗ)`` are without the bias towards the zeros at the beginning; with
    ``amsgrad`` v is its own largest so far. Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015.
    ``torch.optim.Adam``; for the rest see :class:`Optimizer`.
    """

    _rule = rules.ADAM
    _names = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")


class AdamW(Adam, torch.optim.AdamW):
    """:class:`Adam` with ``p ← (1 − γ λ) p`` in place of λ p in the gradient, λ being ``weight_decay``.

    Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019. ``torch.optim.AdamW``.
    """


class Lion(Optimizer):
    """``p ← (1 − γ λ) p − γ sign(β₁ m + (1 − β₁) g)``; ``m ← β₂ m + (1 − β₂) g``.

    Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023. For the rest see :class:`Optimizer`.
    """

    _rule = rules.LION
    _names = ("lr", "betas", "weight_decay", "maximize")
    _counts = False

    def __init__(
        self,
        params: Iterable,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        _check(lr, betas, weight_decay=weight_decay)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **options)


class LARS(Optimizer):
    """:class:`SGD` whose gradient, for each tensor, is ``(g + λ p) · η ‖p‖ / (‖g‖ + λ ‖p‖ + ε)``.

    η is ``trust_coefficient``, λ ``weight_decay``. Tensors whose norm or whose gradient's norm is zero are updated as
    by SGD. You, Gitman and Ginsburg, "Large batch training of convolutional networks", 2017. For the rest see
    :class:`Optimizer`.
    """

    _rule = rules.LARS
    _counts = False

    def __init__(
        self,
        params: Iterable,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        _check(lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust_coefficient, eps=eps)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        defaults = {
            **{"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay},
            **{"nesterov": nesterov, "trust_coefficient": trust_coefficient, "eps": eps, "maximize": maximize},
        }
        super().__init__(params, defaults, **options)


class LAMB(Optimizer):
    """``u = m̂ / (√v̂ + ε) + λ p``; ``p ← p − γ ‖p‖ / ‖u‖ · u`` for each tensor, with the moments of :class:`Adam`.

    You et al., "Large batch optimization for deep learning: training BERT in 76 minutes", ICLR 2020. For the rest see
    :class:`Optimizer`.
    """

    _rule = rules.LAMB
    _names = ("lr", "betas", "eps", "weight_decay", "maximize")

    def __init__(
        self,
        params: Iterable,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        _check(lr, betas, weight_decay=weight_decay, eps=eps)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **options)


def _check(lr: float | torch.Tensor, betas: tuple[float, float] = (0.0, 0.0), **others: float) -> None:
    """ValueError, in torch's words, for what is out of range."""
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    for place, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {place}: {beta}")
    for name, value in others.items():
        if not value >= 0.0:
            raise ValueError(f"Invalid {name} value: {value}")
