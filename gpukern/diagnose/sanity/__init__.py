"""Sanity checks before a training. See :func:`sanity_check`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from gpukern.diagnose.calling import python_module, random_state_kept
from gpukern.diagnose.sanity.data import check_inputs, check_labels, check_relation
from gpukern.diagnose.sanity.gradients import check_gradients
from gpukern.diagnose.sanity.layers import check_activations, check_parameters
from gpukern.diagnose.sanity.losses import behaviour, check_chance, check_loss, check_regularization
from gpukern.diagnose.sanity.report import SanityReport
from gpukern.diagnose.sanity.subject import Step, Subject, probe, read_batch
from gpukern.diagnose.sanity.training import check_handful, check_step, check_updates
from gpukern.diagnose.sanity.values import Check, Measured

__all__ = ["SanityReport", "sanity_check"]


def sanity_check(
    model: torch.nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], torch.Tensor] = F.cross_entropy,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    training_step: Step | None = None,
    chance: float | None = None,
    regularization: float | Callable[[torch.nn.Module], torch.Tensor] | None = None,
    examples: int = 20,
    steps: int = 200,
    entries: int = 24,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> SanityReport:
    """Look for the usual mistakes before a training, on copies of the model and the optimizer.

    =====================  ===========================================================================================
    check                  what is well
    =====================  ===========================================================================================
    ``inputs``             finite, of about zero mean and unit deviation where the first layer gets them
    ``labels``             more than one class, all of them classes of the model
    ``labels fit inputs``  nearest neighbours have the same label more often than under random permutations
    ``loss function``      fits the output: no softmax twice, no ``nll_loss`` of logits, no broadcast
    ``loss at chance``     ln C for C classes, ln 2 for binary ones, else ``chance``
    ``regularization``     raises the loss, and has a gradient
    ``gradients``          agree in float64 with (L(θ + h) − L(θ − h))/2h within 1e-4, but for kinks such as ReLU's
    ``parameters``         all require a gradient, get one, and belong to the optimizer
    ``activations``        few dead ReLUs, little saturation, about the same scale in all layers
    ``a handful learned``  a few examples can be learned to the end, by Adam without dropout and weight decay
    ``training step``      its gradients do not depend on the step before: ``zero_grad`` is not missing
    ``updates``            ‖Δθ‖/‖θ‖ of a step of the optimizer is about 1e-3
    =====================  ===========================================================================================

    Parameters
    ----------
    model:
        any module. The model, its gradients, the optimizer and the random states stay as they are.
    batch:
        (inputs, targets), as a loader yields it: inputs are a tensor, a tuple or list of arguments, or a dict of
        arguments by name. 64 samples or more, so that something can be said of the labels.
    loss:
        ``loss(output, targets)``, one number in a tensor.
    optimizer:
        of the model's parameters: whether it has all of them, and how much it changes them.
    training_step:
        ``training_step(model, optimizer, batch)``: zero_grad, forward, backward, step, on what it is given.
    chance:
        what the loss is for a model that knows nothing, where it follows from no number of classes.
    regularization:
        λ of a penalty λ/2 ‖θ‖², or a function of the model; the optimizer's weight decay if not given.
    examples, steps:
        how many are to be learned, in how many steps at most.
    entries:
        how many derivatives are compared.
    seed:
        of all random numbers, such as the choice of derivatives.
    progress:
        called with the name of the check that runs, and the number of checks that are done and in all.

    Returns
    -------
    A :class:`SanityReport`: ``passed``, ``checks``, ``findings``, ``report["loss function"]``, ``plot``, ``to_json``;
    it prints as a table.

    Raises
    ------
    TypeError, ValueError for a batch of another form, numbers below 1 or a ``training_step`` without an optimizer;
    DiagnoseError if the model fails for the
    inputs, or model or optimizer cannot be copied.
    """
    model = python_module(model, "sanity_check")
    if min(examples, steps, entries) < 1:
        raise ValueError(f"examples, steps and entries must be at least 1, got {examples}, {steps}, {entries}")
    if training_step is not None and optimizer is None:
        raise ValueError("training_step needs an optimizer")
    inputs, targets = read_batch(model, batch)
    subject = Subject(
        model, inputs, targets, loss, optimizer, training_step, chance, regularization, examples, steps, entries, seed
    )
    with random_state_kept(), torch.enable_grad():
        return _run(subject, progress or (lambda what, done, total: None))


def _run(subject: Subject, progress: Callable[[str, int, int], None]) -> SanityReport:
    progress("forward", 0, 12)
    first = probe(subject)
    behaves = behaviour(subject, first) if first.value is not None else None
    checks: list[Check] = []

    def add(check: Check) -> None:
        checks.append(check)
        progress(check.name, len(checks), 12)

    add(check_inputs(subject))
    add(check_labels(subject, first))
    add(check_relation(subject))
    add(check_loss(subject, first, behaves))
    add(check_chance(subject, first, behaves))
    add(check_regularization(subject, first))
    measured = Measured()
    if first.value is None:
        add(check_activations(subject))
        names = ("gradients", "parameters", "a handful learned", "training step", "updates")
        for name in names:
            add(Check(name, "not checked", "the loss fails"))
        return SanityReport(type(subject.model).__name__, tuple(checks), measured)
    gradients, derivatives = check_gradients(subject)
    add(gradients)
    add(check_parameters(subject))
    add(check_activations(subject))
    handful, losses = check_handful(subject)
    add(handful)
    step = check_step(subject)
    add(step)
    updates, ratios = check_updates(subject, step)
    add(updates)
    return SanityReport(type(subject.model).__name__, tuple(checks), Measured(losses, ratios, derivatives))
