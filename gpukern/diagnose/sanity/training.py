"""Checks by training a copy: a handful of examples, the user's own step, the size of the updates."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch

from gpukern.checking.models import DROPPING
from gpukern.diagnose.calling import call, copied, copied_optimizer, random_state_kept, seed_everything
from gpukern.diagnose.sanity.layers import layers_of
from gpukern.diagnose.sanity.subject import Step, Subject, loss_of
from gpukern.diagnose.sanity.values import Check
from gpukern.formatting import brief
from gpukern.fusion.errors import first_line

#: Learning rates of Adam that are tried on the handful, until one learns it.
_RATES = (1e-3, 1e-2, 1e-4)
#: Shares of the first loss at which a handful is learned, of classes and of numbers.
_LEARNED, _LEARNED_NUMBERS = 0.1, 0.02
#: Steps over which updates are averaged; ratios to the weights that are usual, and that are plainly wrong.
_UPDATES = 5
USUAL, _POSSIBLE = (1e-4, 3e-2), (1e-6, 0.5)


def check_handful(subject: Subject) -> tuple[Check, tuple[float, ...]]:
    """Train on a few examples without dropout and weight decay, until they are known by heart."""
    name = "a handful learned"
    places = subject.random_places(subject.examples)
    batch = subject.some(places)
    best: tuple[float, ...] = ()
    best_right: float | None = None
    for rate in _RATES:
        try:
            losses, right = _train(subject, batch, rate)
        except Exception as problem:  # whatever a model or a loss raises
            return Check(name, "not checked", f"training fails: {first_line(problem)}"), best
        if not best or _least(losses) < _least(best):
            best, best_right = losses, right
        if _is_learned(subject, losses, right):
            break
    return _judge(name, subject, best, best_right, len(places)), best


def _train(subject: Subject, batch: tuple[Any, Any], rate: float) -> tuple[tuple[float, ...], float | None]:
    """The loss of each step, and the share of classes that is right where it is least."""
    model = subject.fresh()
    _without_dropout(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=rate)
    losses: list[float] = []
    right: float | None = None
    with random_state_kept(subject.seed):
        for _ in range(subject.steps):
            optimizer.zero_grad()
            output = call(model, batch[0])
            loss = subject.loss(output, batch[1])
            losses.append(float(loss.detach()))
            if losses[-1] == _least(losses):
                right = _right(subject, output, batch[1])
            if not math.isfinite(losses[-1]) or (len(losses) > 1 and 0 <= losses[-1] < 1e-3 * abs(losses[0])):
                break
            loss.backward()
            optimizer.step()
    return tuple(losses), right


def _right(subject: Subject, output: Any, labels: Any) -> float | None:
    """The share of classes that is right; None if the targets are no classes."""
    if subject.labels is None or not isinstance(output, torch.Tensor) or output.dim() != labels.dim() + 1:
        return None
    counted = labels >= 0
    return float((output.argmax(1) == labels)[counted].double().mean()) if bool(counted.any()) else None


def _without_dropout(model: torch.nn.Module) -> None:
    """Chance must not be what keeps the loss up."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif type(module).__name__ in DROPPING:
            module.eval()
        elif isinstance(getattr(module, "dropout", None), float):  # attention, recurrent layers
            module.dropout = 0.0  # type: ignore[assignment]


def _least(losses: Iterable[float]) -> float:
    return min((loss for loss in losses if math.isfinite(loss)), default=math.inf)


def _is_learned(subject: Subject, losses: tuple[float, ...], right: float | None) -> bool:
    share = _LEARNED if right is not None else _LEARNED_NUMBERS
    return _least(losses) <= share * max(abs(losses[0]), abs(subject.chance or 0.0)) and right in (None, 1.0)


def _judge(name: str, subject: Subject, losses: tuple[float, ...], right: float | None, number: int) -> Check:
    first, last = losses[0], _least(losses)
    words = f"the loss of {number} examples falls from {brief(first)} to {brief(last)} in {len(losses)} steps"
    if right is not None:
        words += f", {100 * right:.0f} % are right"
    if _is_learned(subject, losses, right):
        return Check(name, "ok", words)
    if right == 1.0:
        advice = "label smoothing has such a floor; a softmax too many, too"
        return Check(name, "warning", f"{words}: it stays above {100 * _LEARNED:.0f} % of the first", advice)
    return Check(
        name, "wrong", f"a handful is not learned: {words}",
        "what cannot learn a few examples learns nothing: look at the loss, frozen or dead layers, and the capacity",
    )  # fmt: skip


# ---- the user's own step ---------------------------------------------------------------------------------------------


class _Watched:
    """Copies of model and optimizer, and the gradients with which the optimizer steps."""

    def __init__(self, subject: Subject, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._subject, self.model, self.optimizer = subject, model, optimizer
        self.stepped: list[torch.Tensor | None] | None = None
        optimizer.register_step_pre_hook(self._remember)

    def _remember(self, *rest: Any) -> None:
        self.stepped = [None if each.grad is None else each.grad.detach().clone() for each in self.model.parameters()]

    def step(self, seed: int) -> list[torch.Tensor | None] | None:
        """Take the user's step; return the gradients, or None if the optimizer did not step."""
        self.stepped = None
        seed_everything(seed)
        assert self._subject.step is not None
        self._subject.step(self.model, self.optimizer, self._subject.batch())
        return self.stepped

    def twin(self) -> _Watched:
        """The same without gradients."""
        model = copied(self.model, "sanity_check").train()
        return _Watched(self._subject, model, copied_optimizer(self.optimizer, self.model, model))


def check_step(subject: Subject) -> Check:
    """Whether the user's step computes gradients of its own batch alone, and lets the optimizer step with them."""
    name = "training step"
    if subject.step is None or subject.optimizer is None:
        return Check(name, "not checked", "give training_step= and optimizer= to find a missing zero_grad()")
    before = [parameter.detach().clone() for parameter in subject.model.parameters()]
    state = copy.deepcopy(subject.optimizer.state_dict())
    try:
        with random_state_kept():
            found = _check_step(name, subject)
    except Exception as problem:  # whatever a user's function raises
        found = Check(name, "wrong", f"it fails: {first_line(problem)}", "look at the names in its traceback")
    outside = False
    with torch.no_grad():
        for parameter, value in zip(subject.model.parameters(), before, strict=True):
            if not torch.equal(parameter, value) and not bool(value.isnan().any()):
                parameter.copy_(value)
                outside = True
    if outside:
        subject.optimizer.load_state_dict(state)
        told = "it trains another model than the one it is given"
        return Check(name, "wrong", told, "use the arguments model and optimizer, no variables from outside")
    return found


def _check_step(name: str, subject: Subject) -> Check:
    model = subject.fresh()
    optimizer = subject.fresh_optimizer(model)
    assert optimizer is not None
    watched = _Watched(subject, model, optimizer)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    gradients = watched.step(subject.seed)
    if gradients is None:
        return Check(name, "wrong", "optimizer.step() is never called", "call it after backward()")
    if not any(each is not None and bool(each.any()) for each in gradients):
        told = "the optimizer steps with gradients that are zero or missing"
        return Check(name, "wrong", told, "call zero_grad() before backward(), and step() after it")
    pairs = zip(weights, model.parameters(), strict=True)
    if all(torch.equal(before, after.detach()) for before, after in pairs):
        return Check(
            name, "wrong", "no weight changes", "look at the learning rate, and at whose parameters the optimizer has"
        )
    left = [None if each.grad is None else each.grad.detach().clone() for each in model.parameters()]
    twin = watched.twin()
    second, alone = watched.step(subject.seed + 1), twin.step(subject.seed + 1)
    if second is None or alone is None:
        return Check(name, "ok", "gradients are computed, and the optimizer steps, though not every time")
    if _same(second, alone):
        return Check(name, "ok", "every step uses the gradients of its own batch")
    if _same(second, [_sum(one, other) for one, other in zip(alone, left, strict=True)]):
        return Check(
            name, "wrong", "missing zero_grad: gradients of the step before are added to those of the batch",
            "call optimizer.zero_grad() before backward()",
        )  # fmt: skip
    told = "the gradients depend on the step before, with the same weights and random numbers"
    return Check(name, "warning", told, "look at what is kept between steps")


def _sum(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    return other if one is None else one if other is None else one + other


def _same(ones: list[torch.Tensor | None], others: list[torch.Tensor | None]) -> bool:
    """Whether gradients are the same but for the order of sums."""
    for one, other in zip(ones, others, strict=True):
        if one is None or other is None:
            if one is not other and bool((one if other is None else other).any()):  # type: ignore[union-attr]
                return False
        elif float((one - other).double().norm()) > 1e-3 * float(other.double().norm()) + 1e-12:
            return False
    return True


# ---- the size of the updates -----------------------------------------------------------------------------------------


def check_updates(subject: Subject, step: Check) -> tuple[Check, dict[str, float]]:
    """‖Δθ‖/‖θ‖ of each weight in a step of the optimizer, which is near 1e-3 where learning goes well.

    ``step`` is what :func:`check_step` found: a wrong one is not taken.
    """
    name = "updates"
    if subject.optimizer is None:
        return Check(name, "not checked", "give optimizer= to compare its updates with the weights"), {}
    try:
        ratios = _ratios(subject, _plain_step(subject) if step.verdict == "wrong" else subject.step)
    except Exception as problem:  # whatever a model, a loss or an optimizer raises
        return Check(name, "not checked", f"training fails: {first_line(problem)}"), {}
    if not ratios:
        return Check(name, "not checked", "no weight of two dimensions or more is trained"), {}
    ordered = sorted(ratios.values())
    middle = ordered[len(ordered) // 2]
    words = f"a step changes the weights by {brief(middle)} of themselves, {brief(ordered[0])} to {brief(ordered[-1])}"
    if not all(map(math.isfinite, ordered)):
        return Check(
            name, "wrong", "weights become NaN or infinite within five steps", "take a smaller learning rate"
        ), ratios
    if USUAL[0] <= middle <= USUAL[1]:
        still = [each for each, ratio in ratios.items() if ratio == 0]
        if still:
            told = f"{words}; no change in {layers_of(still)}"
            return Check(name, "warning", told, "look whether it gets a gradient"), ratios
        return Check(name, "ok", f"{words}; about 1e-3 is usual"), ratios
    small = middle < USUAL[0]
    wrong = middle < _POSSIBLE[0] if small else middle > _POSSIBLE[1]
    advice = "take a larger learning rate" if small else "take a smaller learning rate"
    return Check(name, "wrong" if wrong else "warning", f"{words}, where about 1e-3 is usual", advice), ratios


def _ratios(subject: Subject, step: Step | None) -> dict[str, float]:
    model = subject.fresh()
    optimizer = subject.fresh_optimizer(model)
    assert optimizer is not None
    weights = {name: each for name, each in model.named_parameters() if _is_weight(name, each)}
    sums = dict.fromkeys(weights, 0.0)
    step = step or _plain_step(subject)
    with random_state_kept(subject.seed):
        for _ in range(_UPDATES):
            before = {name: each.detach().clone() for name, each in weights.items()}
            step(model, optimizer, subject.batch())
            for name, each in weights.items():
                norm = float(before[name].double().norm())
                sums[name] += float((each.detach() - before[name]).double().norm()) / norm if norm else math.nan
    # A weight of zeros has no ratio in its first step.
    return {
        name: total / _UPDATES
        for name, total in sums.items()
        if not (math.isnan(total) and _began_at_zero(subject, name))
    }


def _is_weight(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether a layer multiplies by it: no bias, no embedding of positions, which begin near zero."""
    return parameter.requires_grad and parameter.dim() > 1 and name.endswith("weight")


def _began_at_zero(subject: Subject, name: str) -> bool:
    return not bool(subject.model.get_parameter(name).any())


def _plain_step(subject: Subject) -> Step:
    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
        optimizer.zero_grad()
        loss_of(subject, model, batch).backward()
        optimizer.step()

    return step
