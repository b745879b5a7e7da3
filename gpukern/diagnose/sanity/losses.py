"""Checks of the loss: what it does with random outputs, its value at chance, and its regularization."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from gpukern.diagnose.calling import random_state_kept
from gpukern.diagnose.errors import DiagnoseError
from gpukern.diagnose.sanity.subject import Probe, Subject
from gpukern.diagnose.sanity.values import Check
from gpukern.formatting import brief
from gpukern.fusion.errors import first_line

#: Ratios of the first loss to that of chance.
_BELOW, _ABOVE, _FAR_ABOVE = 0.7, 1.5, 5.0


@dataclass(frozen=True)
class Behaviour:
    """How a loss reacts to random outputs in place of the model's, where the targets are classes.

    ``softmax``: adding a constant to all outputs of a sample changes nothing; ``linear``: it is subtracted, as by
    ``nll_loss``; ``zero``: the loss of outputs that are all 0; ``ignores_targets``.
    """

    softmax: bool = False
    linear: bool = False
    binary: bool = False
    squared: bool = False
    zero: float = math.nan
    ignores_targets: bool = False


def behaviour(subject: Subject, probe: Probe) -> Behaviour | None:
    """Call the loss with random outputs. None where the output is no single tensor, or the loss fails for them."""
    output, targets = probe.logits, subject.targets
    if output is None or not isinstance(targets, torch.Tensor) or not output.numel():
        return None
    generator = torch.Generator().manual_seed(subject.seed)
    random = torch.randn(output.shape, generator=generator).to(output.device, torch.float32)
    classes = subject.labels is not None and output.dim() == targets.dim() + 1

    def value(made: torch.Tensor, wanted: torch.Tensor = targets) -> float:
        # Roundings to 16 bits would hide what is looked for.
        return float(subject.loss(made.double() if output.dtype is torch.float64 else made, wanted))

    try:
        with torch.no_grad(), random_state_kept(subject.seed):
            plain, shifted, zero = value(random), value(random + 1), value(torch.zeros_like(random))
            turned = value(random, targets.roll(1, 0)) if len(targets) == len(output) else math.nan
            alike = {name: _near(plain, value_) for name, value_ in _known(random, targets).items()}
    except Exception:  # the loss has been called with the model's own output before, and that is judged
        return None
    constant = bool((targets == targets.roll(1, 0)).all())
    return Behaviour(
        softmax=classes and _near(plain, shifted),
        linear=classes and _near(shifted - plain, -1.0),
        binary=alike.get("binary", False),
        squared=alike.get("squared", False),
        zero=zero,
        ignores_targets=not constant and turned == plain,
    )


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-5)


def _known(output: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """The values of two losses that take targets of the outputs' shape."""
    if targets.shape != output.shape:
        return {}
    wanted = targets.to(output.dtype)
    return {
        "squared": float(F.mse_loss(output, wanted)),
        "binary": float(F.binary_cross_entropy_with_logits(output, wanted)),
    }


def check_loss(subject: Subject, probe: Probe, behaves: Behaviour | None) -> Check:
    """Whether the loss fits the model's output and the targets."""
    name = "loss function"
    if probe.value is None:
        return Check(
            name, "wrong", f"the loss fails: {probe.failed}", "pair the loss with the output and targets it takes"
        )
    if probe.warned:
        return Check(
            name, "wrong", f"output and targets differ in shape, and are broadcast: {probe.warned}",
            "give both the same shape, as by targets[:, None]",
        )  # fmt: skip
    if not math.isfinite(probe.value):
        return Check(name, "wrong", f"the loss is {probe.value}", "look at the inputs, and at logarithms of 0")
    found = _misfit(subject, probe, behaves) if behaves is not None and probe.logits is not None else None
    if found is not None:
        return found
    if probe.value < 0 and (behaves is None or not behaves.linear):
        return Check(
            name, "warning", f"the loss is negative: {brief(probe.value)}", "a log-likelihood wants its sign changed"
        )
    return Check(name, "ok", "it fits the output, and depends on the targets")


def _misfit(subject: Subject, probe: Probe, behaves: Behaviour) -> Check | None:
    output = probe.logits
    assert output is not None
    name = "loss function"
    if behaves.ignores_targets:
        return Check(name, "wrong", "the loss does not change when the targets are exchanged", "let it use the targets")
    if subject.labels is not None and behaves.softmax and output.shape[1] == 1:
        return Check(
            name, "wrong", "cross-entropy of one class is always 0",
            "give the model an output for each class, or take binary_cross_entropy_with_logits",
        )  # fmt: skip
    if subject.labels is not None and output.dim() > 1 and (behaves.softmax or behaves.linear):
        return _check_classes(name, output.detach(), behaves)
    if behaves.binary and bool(((output >= 0) & (output <= 1)).all()) and output.numel() >= 8:
        return Check(
            name, "wrong", "sigmoid twice: the outputs are probabilities, and the loss applies a sigmoid to them",
            "leave the sigmoid out of the model, or take binary_cross_entropy",
        )  # fmt: skip
    if behaves.squared and _are_classes(subject, output):
        return Check(
            name, "warning", "wrong loss: squared errors of classes, whose gradient vanishes where it is surely wrong",
            "take cross_entropy of logits and class numbers",
        )  # fmt: skip
    return None


def _check_classes(name: str, output: torch.Tensor, behaves: Behaviour) -> Check | None:
    rounding = max(1e-3, 4 * torch.finfo(output.dtype).eps)
    output = output.double()
    sums, log_sums = output.sum(1), output.logsumexp(1)
    probabilities = bool((output >= 0).all()) and bool(((sums - 1).abs() < rounding).all())
    log_probabilities = bool((log_sums.abs() < rounding).all())
    if behaves.softmax and probabilities:
        floor = math.log(math.e + output.shape[1] - 1) - 1
        return Check(
            name, "wrong",
            "softmax twice: the outputs are probabilities, and the loss applies a softmax to them; "
            f"it cannot fall below {floor:.2f}",
            "leave the softmax out of the model: cross_entropy takes logits",
        )  # fmt: skip
    if behaves.linear and not log_probabilities:
        what = "probabilities" if probabilities else "logits"
        return Check(
            name, "wrong", f"wrong loss: nll_loss of {what}: it takes logarithms of probabilities",
            "take cross_entropy, or log_softmax before nll_loss",
        )  # fmt: skip
    if behaves.softmax and bool((output >= 0).all()) and output.numel() >= 8:
        zeros = float((output == 0).double().mean())
        if zeros > 0.1:
            finding = f"an activation is applied to the logits: none is negative, {100 * zeros:.0f} % are 0"
        elif bool((output <= 1).all()):
            finding = "the logits are squeezed between 0 and 1, as by a sigmoid"
        else:
            return None
        return Check(name, "wrong", finding, "let the last layer be linear")
    return None


def _are_classes(subject: Subject, output: torch.Tensor) -> bool:
    """Whether the targets are class numbers, or one-hot."""
    if subject.labels is not None:
        return int(subject.labels.max()) < 1000
    targets = subject.targets
    one_hot = targets.dim() == 2 and targets.shape[1] > 1 and bool(((targets == 0) | (targets == 1)).all())
    return one_hot and bool((targets.sum(1) == 1).all())


def check_chance(subject: Subject, probe: Probe, behaves: Behaviour | None) -> Check:
    """Whether an untrained model has the loss of one that knows nothing."""
    name = "loss at chance"
    if probe.value is None:
        return Check(name, "not checked", "the loss fails")
    chance, told = _chance(subject, probe, behaves)
    if chance is None:
        return Check(name, "not checked", f"the loss is {brief(probe.value)}; give chance=, what knowing nothing costs")
    words = f"{probe.value:.3g} beside {told}"
    ratio = probe.value / chance if chance > 0 else math.nan
    if not math.isfinite(ratio):
        return Check(name, "wrong" if not math.isfinite(probe.value) else "not checked", words)
    if ratio < _BELOW:
        advice = "expected of a trained model; otherwise look whether the inputs give the labels away"
        return Check(name, "warning", f"{words}: below chance before any training", advice)
    if ratio > _ABOVE:
        advice = "scale the last layer's weights, or the inputs, down"
        far = ratio > _FAR_ABOVE
        return Check(name, "wrong" if far else "warning", f"{words}: the model begins surely wrong", advice)
    summed = behaves is not None and behaves.softmax and behaves.zero > 1.9 * math.log(probe.output.shape[1])
    if summed:
        return Check(
            name,
            "warning",
            f"{words}: it is summed over the batch",
            "take the mean: rates need no change with the batch",
        )
    return Check(name, "ok", words)


def _chance(subject: Subject, probe: Probe, behaves: Behaviour | None) -> tuple[float | None, str]:
    if subject.chance is not None:
        return subject.chance, f"{subject.chance:.3g}, as given"
    output, labels = probe.logits, subject.labels
    if labels is not None and output is not None and output.dim() == labels.dim() + 1 and output.shape[1] > 1:
        known = math.log(output.shape[1])
        if behaves is not None and behaves.softmax and behaves.zero > 1.9 * known:
            return behaves.zero, f"{behaves.zero:.3g} of equal outputs"
        if behaves is not None and (behaves.softmax or behaves.linear):
            return known, f"ln {output.shape[1]} = {known:.3g}"
    if behaves is not None and behaves.binary:
        return math.log(2), f"ln 2 = {math.log(2):.3g}"
    return None, ""


def check_regularization(subject: Subject, probe: Probe) -> Check:
    """Whether the penalty of the weights raises the loss, by how much, and has a gradient."""
    name = "regularization"
    model = subject.fresh()
    penalty, told = _penalty(subject, model)
    if penalty is None:
        return Check(name, "not checked", "there is none: no weight decay of an optimizer, no regularization=")
    try:
        value = penalty()
    except Exception as problem:  # whatever a user's function raises
        return Check(name, "wrong", f"{told} fails: {first_line(problem)}")
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not bool(value.isfinite().all()):
        raise DiagnoseError(f"{told} must return one finite number in a tensor, got {value!r}")
    amount = float(value.detach())
    if amount <= 0:
        return Check(
            name,
            "wrong",
            f"{told} does not raise the loss: it adds {brief(amount)}",
            "look at its sign, and at the weights",
        )
    if not value.requires_grad:
        return Check(
            name, "wrong", f"{told} has no gradient: it changes no weight", "compute it from parameters, not from .data"
        )
    if probe.value is None:
        return Check(name, "not checked", "the loss fails")
    words = f"{told} raises the loss from {probe.value:.4g} to {probe.value + amount:.4g}"
    if amount > 10 * abs(probe.value):
        return Check(name, "warning", f"{words}: it outweighs the data", "make it smaller")
    return Check(name, "ok", words)


def _penalty(subject: Subject, model: torch.nn.Module) -> tuple[Callable[[], torch.Tensor] | None, str]:
    given = subject.regularization
    if callable(given):
        return lambda: given(model), "the regularization"
    if given is not None:
        return lambda: _squares(given, list(model.parameters())), f"{given:g}/2 ‖θ‖²"
    optimizer = subject.fresh_optimizer(model)
    if optimizer is None or not any(group.get("weight_decay", 0) for group in optimizer.param_groups):
        return None, ""
    groups = [(group.get("weight_decay", 0), group["params"]) for group in optimizer.param_groups]
    return lambda: torch.stack([_squares(decay, each) for decay, each in groups]).sum(), "weight decay"


def _squares(factor: float, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    trained = [each for each in parameters if each.requires_grad]
    if not trained:
        return torch.zeros(())
    return factor / 2 * torch.stack([each.float().square().sum().cpu() for each in trained]).sum()
