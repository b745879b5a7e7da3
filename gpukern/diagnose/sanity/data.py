"""Checks of a batch: its inputs, its labels, and whether they have to do with each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from gpukern.diagnose.calling import call, floating, random_state_kept, tensors
from gpukern.diagnose.sanity.subject import Probe, Subject
from gpukern.diagnose.sanity.values import Check
from gpukern.formatting import brief, count

#: Samples that are compared with each other, their neighbours, and random permutations of the labels.
_COMPARED, _NEIGHBOURS, _PERMUTATIONS = 1024, 5, 999
#: Samples, and samples of a class, from which neighbours would show it if labels had to do with inputs. Photographs are
#: the hard case: of 128 images of CIFAR-10 the neighbours of 15 % have the same label, in place of 10 %.
_ENOUGH, _ENOUGH_OF_A_CLASS = 128, 10
#: Rows and columns to which images are averaged before.
_SIDE = 16


def check_inputs(subject: Subject) -> Check:
    """Finite, not all the same, about zero mean and unit deviation, where the first layer with weights gets them."""
    name = "inputs"
    found = floating(subject.inputs)
    if not found:
        return Check(name, "ok", "whole numbers, which the model looks up or converts")
    for values in found:
        bad = int((~values.isfinite()).sum())
        if bad:
            return Check(name, "wrong", f"{bad:,} values are NaN or infinite", "look for them where the data is read")
    first = max(found, key=lambda each: each.numel())
    if subject.samples > 1 and len(first) == subject.samples and bool((first == first[:1]).all()):
        return Check(name, "wrong", "all samples of the batch are the same", "look at how a sample is chosen")
    bad_range, words = _unnormalized(first)
    if bad_range == "ok":
        return _check_scales(first, words)
    inside = _seen_by_first_layer(subject)
    if inside is not None and _unnormalized(inside)[0] == "ok":
        return Check(name, "ok", f"{words}; the model normalizes them: {_unnormalized(inside)[1]}")
    return Check(
        name, bad_range, f"the inputs are not normalized: {words}",
        "subtract the mean and divide by the deviation of the training set",
    )  # fmt: skip


def _unnormalized(values: torch.Tensor) -> tuple[Any, str]:
    values = values.detach().double()
    mean, deviation = float(values.mean()), float(values.std(correction=0))
    low, high = (brief(float(each)) for each in values.aminmax())
    words = f"mean {brief(mean)}, deviation {brief(deviation)}, {low} to {high}"
    if deviation > 10 or abs(mean) > 10:
        return "wrong", words
    if abs(mean) > max(deviation, 0.5) or not 0.1 <= deviation <= 4:
        return "warning", words
    return "ok", words


def _check_scales(values: torch.Tensor, words: str) -> Check:
    """Features in a table must not differ in scale by orders of magnitude."""
    if values.dim() == 2 and len(values) > 2:
        deviations = values.detach().double().std(0)
        deviations = deviations[deviations > 0]
        if len(deviations) > 1 and deviations.max() > 100 * deviations.min():
            scales = f"{brief(float(deviations.min()))} to {brief(float(deviations.max()))}"
            advice = "normalize every feature by its own mean and deviation"
            return Check("inputs", "warning", f"the inputs are not normalized: features deviate by {scales}", advice)
    return Check("inputs", "ok", words)


def _seen_by_first_layer(subject: Subject) -> torch.Tensor | None:
    """What the first convolution or linear layer gets."""
    seen: list[torch.Tensor] = []

    def remember(module: torch.nn.Module, args: tuple) -> None:
        if not seen:
            seen.extend(each.detach() for each in floating(args)[:1])

    model = subject.fresh()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() >= 2:
            module.register_forward_pre_hook(remember)
    with random_state_kept(subject.seed), torch.no_grad():
        call(model, subject.inputs)
    return seen[0] if seen else None


def check_labels(subject: Subject, probe: Probe) -> Check:
    """Labels within the classes, more than one of them, none with nearly all samples, no two for the same input."""
    name = "labels"
    values = [each for each in tensors(subject.targets) if each.dim() and each.numel()]
    if not values:
        return Check(name, "not checked", "the targets hold no tensor")
    if any(not bool(each.isfinite().all()) for each in values):
        return Check(name, "wrong", "targets are NaN or infinite", "look for them where the data is read")
    if all(each.numel() > 1 and bool((each == each.flatten()[0]).all()) for each in values):
        same = brief(float(values[0].flatten()[0]))
        return Check(
            name,
            "wrong",
            f"the labels are constant: all are {same}",
            "shuffle the data, or look at how labels are read",
        )
    labels, logits = subject.labels, probe.logits
    if labels is None:
        return Check(name, "ok", "targets are finite and differ")
    classes = logits.shape[1] if logits is not None and logits.dim() == labels.dim() + 1 else None
    ignored = getattr(subject.loss, "ignore_index", -100)
    counted = labels[labels != ignored]
    if classes is not None and counted.numel():
        low, high = (int(each) for each in counted.aminmax())
        if low < 0 or high >= classes:
            told = f"labels are {low} to {high}, and the model has the classes 0 to {classes - 1}"
            return Check(name, "wrong", told, "number the classes from 0, and give the model as many outputs")
    conflict = _conflicts(subject, labels)
    if conflict:
        return Check(
            name, "warning", f"{count(conflict, 'input')} occur twice with different labels", "remove one of each"
        )
    return _balance(name, counted.flatten(), classes)


def _balance(name: str, labels: torch.Tensor, classes: int | None) -> Check:
    present, numbers = labels.unique(return_counts=True)
    largest = float(numbers.max()) / labels.numel()
    told = (
        f"{count(len(present), 'class', 'classes')} of {classes or len(present)}, the largest has {100 * largest:.0f} %"
    )
    if largest > 0.9:
        always = f"{told}: always answering {int(present[numbers.argmax()])} is right as often"
        return Check(name, "warning", always, "weigh the classes, or judge by more than the accuracy")
    if classes is not None and len(present) < classes and labels.numel() >= 10 * classes:
        missing = sorted(set(range(classes)) - set(present.tolist()))
        listed = ", ".join(map(str, missing[:8]))
        return Check(name, "warning", f"{told}: no sample of class {listed}", "shuffle the data")
    return Check(name, "ok", told)


def _conflicts(subject: Subject, labels: torch.Tensor) -> int:
    """The number of inputs that occur again with another label."""
    found = [each for each in tensors(subject.inputs) if each.dim() and len(each) == subject.samples]
    if labels.shape != (subject.samples,) or not found:
        return 0
    rows = torch.cat([each.flatten(1).double() for each in found], 1) if found[0].dim() > 1 else found[0][:, None]
    _, same = rows.unique(dim=0, return_inverse=True)
    pairs = torch.stack([same.to(labels.device), labels.long()], 1).unique(dim=0)
    return len(pairs) - len(same.unique())


def check_relation(subject: Subject) -> Check:
    """Whether similar inputs have similar labels: beside random permutations of the labels, by nearest neighbours."""
    name = "labels fit inputs"
    values = [each for each in floating(subject.inputs) if each.dim() > 1 and len(each) == subject.samples]
    targets = [each for each in tensors(subject.targets) if each.numel() == subject.samples]
    if not values or not targets:
        return Check(name, "not checked", "needs floating-point inputs and one target for each sample")
    target = targets[0].flatten().cpu()[:_COMPARED]
    if len(target) < 8 or len(target.unique()) < 2:
        return Check(name, "not checked", "needs more samples, of more than one class")
    rows = _rows(values[0].detach()[:_COMPARED].double().cpu())
    found, chance, p = _agreement(rows, target, subject.seed)
    if target.is_floating_point():
        told = f"targets of nearest neighbours differ by {brief(-found)}, of random pairs by {brief(-chance)}"
    else:
        told = f"nearest neighbours share their label in {100 * found:.0f} % of cases, others in {100 * chance:.0f} %"
    if p <= 0.01:
        return Check(name, "ok", told)
    enough = max(_ENOUGH, 0 if target.is_floating_point() else _ENOUGH_OF_A_CLASS * len(target.unique()))
    if len(target) < enough:
        return Check(name, "not checked", f"needs a batch of {enough} samples: {told}")
    return Check(
        name, "warning", f"the labels look shuffled: {told} (p = {p:.2f})",
        "look at some inputs beside their labels: are both read, and shuffled, in the same order?",
    )  # fmt: skip


def _rows(values: torch.Tensor) -> torch.Tensor:
    """A row of numbers for each sample, alike in scale: images by their contrast, features by their deviations."""
    if values.dim() == 2:
        return (values - values.mean(0)) / values.std(0).clamp_min(1e-12)
    if values.dim() == 4:
        height, width = (min(size, _SIDE) for size in values.shape[2:])
        values = torch.nn.functional.adaptive_avg_pool2d(values, (height, width))
    rows = values.flatten(1)
    return (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True).clamp_min(1e-12)


def _agreement(rows: torch.Tensor, target: torch.Tensor, seed: int) -> tuple[float, float, float]:
    """How much the targets of neighbours agree, by how much those of random pairs would, and how often more."""
    distances = torch.cdist(rows, rows)
    distances.fill_diagonal_(math.inf)
    neighbours = distances.topk(min(_NEIGHBOURS, len(rows) - 1), largest=False).indices
    score: Callable[[torch.Tensor], torch.Tensor]
    if target.is_floating_point():
        score = lambda each: -(each[neighbours] - each[:, None]).abs().double().mean()  # noqa: E731
    else:
        score = lambda each: (each[neighbours] == each[:, None]).double().mean()  # noqa: E731
    generator = torch.Generator().manual_seed(seed)
    found = float(score(target))
    random = [float(score(target[torch.randperm(len(target), generator=generator)])) for _ in range(_PERMUTATIONS)]
    as_good = sum(each >= found for each in random)
    return found, sum(random) / len(random), (1 + as_good) / (1 + len(random))
