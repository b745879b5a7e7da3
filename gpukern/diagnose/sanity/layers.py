"""Checks of the layers: which are trained, and whether what they return carries a gradient."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from gpukern.diagnose.activation_values import FEW_OUTPUTS, MANY_DEAD, MANY_SATURATED, ActivationValues
from gpukern.diagnose.activations import activation_statistics
from gpukern.diagnose.calling import random_state_kept
from gpukern.diagnose.errors import DiagnoseError
from gpukern.diagnose.sanity.subject import Subject, loss_of
from gpukern.diagnose.sanity.values import Check
from gpukern.fusion.errors import first_line

#: Names that are listed.
_LISTED = 4
#: The share of dead units of a layer that is worth a warning; more than is expected of few samples.
_SOME_DEAD = 0.2


def check_parameters(subject: Subject) -> Check:
    """Whether every parameter requires a gradient, gets one, and belongs to the optimizer."""
    name = "parameters"
    every = dict(subject.model.named_parameters())
    if not every:
        return Check(name, "not checked", "the model has none")
    frozen = [each for each, parameter in every.items() if not parameter.requires_grad]
    if len(frozen) == len(every):
        return Check(
            name, "wrong", "all layers are frozen: no parameter requires a gradient", "call requires_grad_(True)"
        )
    left_out = _left_out(subject, every)
    if left_out:
        return Check(
            name, "wrong", f"frozen: {layers_of(left_out)} not in the optimizer",
            "make the optimizer of model.parameters(), after the last layer was replaced",
        )  # fmt: skip
    try:
        without, zero = _gradients(subject)
    except Exception as problem:  # whatever a model or a loss raises
        return Check(
            name, "wrong", f"backward fails: {first_line(problem)}", "look at detach(), no_grad() and in-place changes"
        )
    if without:
        return Check(
            name, "wrong", f"frozen: {layers_of(without)} without a gradient",
            "it is not used, or detach() or no_grad() cuts it off",
        )  # fmt: skip
    if frozen:
        return Check(
            name, "warning", f"frozen: {layers_of(frozen)} with requires_grad=False",
            "as it should be where a layer is kept; otherwise call requires_grad_(True)",
        )  # fmt: skip
    if zero:
        return Check(
            name, "warning", f"{layers_of(zero)} with gradients of zero",
            "nothing is learned there: dead units, or a layer behind it that begins with zeros",
        )  # fmt: skip
    return Check(
        name, "ok", f"all {len(every):,} get a gradient" + (" and are in the optimizer" if subject.optimizer else "")
    )


def _left_out(subject: Subject, every: dict[str, torch.nn.Parameter]) -> list[str]:
    if subject.optimizer is None:
        return []
    held = {id(parameter) for group in subject.optimizer.param_groups for parameter in group["params"]}
    return [name for name, parameter in every.items() if parameter.requires_grad and id(parameter) not in held]


def _gradients(subject: Subject) -> tuple[list[str], list[str]]:
    """The parameters that get no gradient, and those whose gradient is zero."""
    model = subject.fresh()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    with random_state_kept(subject.seed):
        loss = loss_of(subject, model, (subject.inputs, subject.targets))
        gradients = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
    without = [name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is None]
    zero = [
        name
        for (name, _), gradient in zip(named, gradients, strict=True)
        if gradient is not None and gradient.numel() and not bool(gradient.any())
    ]
    return without, zero


def layers_of(names: Iterable[str]) -> str:
    """The layers of these parameters."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
    more = f" and {len(layers) - _LISTED} more" if len(layers) > _LISTED else ""
    return f"layer{'s' * (len(layers) > 1)} {', '.join(layers[:_LISTED])}{more}"


def check_activations(subject: Subject) -> Check:
    """Whether ReLUs are dead, other activations saturated, and values keep their scale from layer to layer."""
    name = "activations"
    try:
        report = activation_statistics(subject.fresh(), subject.inputs, seed=subject.seed)
    except DiagnoseError as problem:
        return Check(name, "not checked", str(problem))
    for layer in report.layers:
        if layer.output.nonfinite:
            told = f"{layer.name} returns {layer.output.nonfinite:,} values that are NaN or infinite"
            return Check(name, "wrong", told, "scale weights and inputs down")
    dead = _dead(report)
    if dead:
        return dead
    far = [layer for layer in report.layers if layer.saturated is not None and layer.saturated >= MANY_SATURATED]
    if far:
        worst = max(far, key=lambda layer: layer.saturated or 0)
        told = (
            f"saturated: {100 * (worst.saturated or 0):.0f} % of the outputs of {worst.name}, where the slope is near 0"
        )
        return Check(name, "warning", told, "scale the weights before it by Xavier, or normalize")
    if report.findings:
        return Check(
            name,
            "warning",
            report.findings[0],
            "initialize by Kaiming before ReLUs and by Xavier before tanh, or normalize",
        )
    return Check(name, "ok", "none is dead or saturated, and they keep their scale")


def _dead(report: ActivationValues) -> Check | None:
    found = [(layer.dead, layer) for layer in report.layers if layer.dead and layer.observed >= FEW_OUTPUTS]
    if not found:
        return None
    share, worst = max(found, key=lambda each: each[0])
    # By chance a unit is negative for all of few samples.
    if share < max(_SOME_DEAD, 4 * 0.5**worst.observed):
        return None
    others = f", and {len(found) - 1} other layers have some" if len(found) > 1 else ""
    return Check(
        "activations", "wrong" if share >= MANY_DEAD else "warning",
        f"dead ReLUs: {100 * share:.0f} % of the units of {worst.name} are zero for every sample{others}",
        "look at the bias and the scale of the weights before it; a smaller learning rate keeps units alive",
    )  # fmt: skip
