"""Cross entropy against float64: class indices and probabilities, every option, layout and length of rows."""

from __future__ import annotations

import gc
import itertools
import math
import weakref

import pytest
import torch
import torch.nn.functional as T

import gpukern.functional as F
import gpukern.nn
from gpukern.ops._cross_entropy import launch
from gpukern.ops._cross_entropy.problem import Options
from gpukern.runtime.mode import EMULATE, Mode, mode_of
from tests.numerics import FP32_EPS, assert_within, rounding_bound
from tests.opinfo import check_module, check_samples
from tests.ops.softmax_cases import INFINITIES, lengths, short_tiles
from tests.traffic import counted_traffic

pytestmark = pytest.mark.usefixtures("poisoned")

REDUCTIONS = ("none", "mean", "sum")
#: shape, and whether it is channels_last; the last has more rows than a program counts labels of.
LOGITS = {
    "matrix": ((5, 7), False),
    "row": ((7,), False),
    "signals": ((2, 6, 3), False),
    "NCHW": ((2, 5, 3, 4), False),
    "channels_last": ((2, 8, 3, 4), True),
    "volumes": ((2, 3, 2, 2, 2), False),
}


def make(kind: str, dtype: torch.dtype, probabilities: bool) -> tuple[torch.Tensor, torch.Tensor]:
    shape, last = LOGITS[kind]
    x, classes = (3 * torch.randn(shape)).to(dtype), shape[min(1, len(shape) - 1)]
    x = x.to(memory_format=torch.channels_last) if last else x
    if probabilities:
        return x, torch.rand(shape).to(dtype)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    return x, torch.randint(classes, rows)


def bounds(x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, smoothing: float, ignore: int):
    """(of the loss of each row, of ∂loss/∂x, Σ|q|), before rounding to a dtype: float64, in rows × classes.

    A logarithm of the softmax errs by a unit of d = x − max x, by that of the sum and by six deviations of its random
    walk; a loss by that times the coefficients, and by half a unit for each of its products and sums.
    """
    classes = x.shape[1]
    d = (x - x.amax(1, keepdim=True)).abs()
    of_log = FP32_EPS * (d + 2 * math.log(classes + 1) + 8 + 3 * math.sqrt(classes))
    w = torch.ones(classes).double() if weight is None else weight
    q = target if target.is_floating_point() else T.one_hot(target.where(target != ignore, 0), classes).double()
    q = ((1 - smoothing) * q + smoothing / classes) * w
    if not target.is_floating_point():
        q = q * (target != ignore)[:, None]
    logs = x.log_softmax(1)
    terms = 6 * FP32_EPS * math.sqrt(classes)
    of_loss = (q * (of_log + (terms + 4 * FP32_EPS) * logs.abs())).sum(1)
    p, sums = logs.exp(), q.sum(1, keepdim=True)
    of_grad = sums * p * (of_log + terms + 6 * FP32_EPS) + 4 * FP32_EPS * q
    return of_loss, of_grad, of_log + 2 * FP32_EPS * logs.abs()


@pytest.mark.parametrize("probabilities", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_losses_and_gradients(dtype, probabilities, where):
    options = itertools.cycle([(None, 0.0), (1, 0.0), (None, 0.3), (1, 0.3)])
    for short, kind, reduction in itertools.product(lengths(where, dtype), LOGITS, REDUCTIONS):
        weighted, smoothing = next(options)
        logits, target = make(kind, dtype, probabilities)
        classes = logits.shape[min(1, logits.dim() - 1)]
        weight = torch.rand(classes).to(dtype) if weighted else None
        ignore = -100
        if not probabilities and target.dim():
            ignore = int(target.flatten()[0])
        x = logits.to(where).requires_grad_()
        t = target.to(where).requires_grad_(probabilities)
        truth, truths_target = logits.double().requires_grad_(), target
        if probabilities:
            truths_target = target.double().requires_grad_()
        given = {"reduction": reduction, "ignore_index": ignore, "label_smoothing": smoothing}
        with short_tiles(short):
            loss = F.cross_entropy(x, t, None if weight is None else weight.to(where), **given)
            g = torch.randn(loss.shape).to(dtype)
            found = torch.autograd.grad(loss, [x, t] if probabilities else [x], g.to(where))
        right = T.cross_entropy(truth, truths_target, None if weight is None else weight.double(), **given)
        assert loss.dtype is dtype and loss.shape == right.shape and loss.is_contiguous()
        truths = [truth, truths_target] if probabilities else [truth]
        expected = torch.autograd.grad(right, truths, g.double())

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[None] if tensor.dim() == 1 else tensor.movedim(1, -1).reshape(-1, classes)  # noqa: B023

        flat = rows(target.double()) if probabilities else target.reshape(-1)
        of_loss, of_grad, of_log = bounds(
            rows(logits.double()), flat, None if weight is None else weight.double(), smoothing, ignore
        )
        every = T.cross_entropy(
            logits.double(), truths_target.detach(), None if weight is None else weight.double(),
            **(given | {"reduction": "none"}),
        )  # fmt: skip
        scale = g.double().expand(every.shape).reshape(-1, 1).abs()
        if reduction != "none":
            # Sums err by six deviations of a random walk.
            of_loss = of_loss.sum() + 6 * FP32_EPS * math.sqrt(every.numel()) * every.abs().sum()
        if reduction == "mean":
            kept = torch.ones(every.numel()) if probabilities else (flat != ignore).double()
            by = kept if weight is None or probabilities else weight.double()[flat] * kept
            of_loss, scale = of_loss / by.sum(), scale / by.sum()
        assert_within(kind, loss, right.detach(), of_loss.reshape(right.shape) + rounding_bound(right, dtype))
        # The gradient is rounded when it is written, and when it is scaled.
        back = 2 * rounding_bound(rows(expected[0]), dtype) + of_grad * scale
        assert_within(f"{kind}, gradient", rows(found[0]), rows(expected[0]), back)
        if probabilities:
            of_target = rounding_bound(rows(expected[1]), dtype, 2) + of_log * scale
            assert_within(f"{kind}, by the target", rows(found[1]), rows(expected[1]), of_target)
        if logits.dim() == 4 and not logits.is_contiguous():
            assert found[0].is_contiguous(memory_format=torch.channels_last)


def test_what_is_ignored_and_what_the_mean_divides_by(where):
    """All rows ignored, none at all, labels of bytes, weights of zero: torch's results, infinities and NaN."""
    x = torch.randn(4, 3)
    everything = [torch.full((4,), 1), torch.tensor([1, 0, 1, 2]), torch.tensor([2, 1, 0, 1], dtype=torch.uint8)]
    for target, reduction, smoothing in itertools.product(everything, REDUCTIONS, (0.0, 0.2, -1.0)):
        for weight in (None, torch.tensor([0.5, 2.0, 0.0])):
            leaf, truth = x.to(where).requires_grad_(), x.clone().requires_grad_()
            given = {"reduction": reduction, "ignore_index": 1, "label_smoothing": smoothing}
            loss = F.cross_entropy(leaf, target.to(where), None if weight is None else weight.to(where), **given)
            right = T.cross_entropy(truth, target.long(), weight, **given)  # torch smoothes no bytes with weights
            torch.testing.assert_close(loss.cpu(), right, equal_nan=True)
            (found,) = torch.autograd.grad(loss.sum(), leaf)
            (expected,) = torch.autograd.grad(right.sum(), truth)
            torch.testing.assert_close(found.cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_tensors(reduction, where):
    for shape in ((0, 3), (0, 3, 2, 2), (2, 3, 0, 2), (2, 3, 0)):
        rows = (shape[0], *shape[2:])
        for target in (torch.zeros(rows, dtype=torch.int64), torch.zeros(shape)):
            x, truth = torch.zeros(shape, device=where, requires_grad=True), torch.zeros(shape, requires_grad=True)
            loss = F.cross_entropy(x, target.to(where), reduction=reduction)
            right = T.cross_entropy(truth, target, reduction=reduction)
            torch.testing.assert_close(loss.cpu(), right, equal_nan=True)
            loss.sum().backward()
            assert x.grad.shape == shape
    x = torch.zeros(2, 0, device=where, requires_grad=True)
    F.cross_entropy(x, torch.full((2,), -100, device=where), reduction=reduction).sum().backward()
    assert x.grad.shape == (2, 0)


def test_infinities_and_nan_are_torchs(where):
    rows = torch.tensor(INFINITIES)
    labels = [torch.full((len(rows),), label) for label in (0, 1, 2)] + [torch.tensor([1, -100, -100, -100, 0, 2])]
    weights = (None, torch.tensor([0.0, 0.0, 1.0]))
    targets = [*labels, torch.eye(6)[:, :3]]
    for short, target, weight, smoothing in itertools.product(lengths(where), targets, weights, (0.0, 0.1)):
        x, truth = rows.to(where).requires_grad_(), rows.double().requires_grad_()
        given = {"reduction": "none", "label_smoothing": smoothing}
        g = torch.rand(len(rows)) + 0.5
        with short_tiles(short):
            loss = F.cross_entropy(x, target.to(where), None if weight is None else weight.to(where), **given)
            found = loss.detach(), *torch.autograd.grad(loss, x, g.to(where))
        labels_or_not = target.double() if target.is_floating_point() else target
        right = T.cross_entropy(truth, labels_or_not, None if weight is None else weight.double(), **given)
        expected = right.detach(), *torch.autograd.grad(right, truth, g.double())
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_label_that_is_no_class(device):
    """An IndexError on a CPU; where nobody waits for a GPU its row alone is NaN, and nothing else is touched."""
    x, target = torch.randn(3, 4, device=device), torch.tensor([0, 7, -1], device=device)
    if device.type == "cpu":
        for ours in (F.cross_entropy, T.cross_entropy):
            with pytest.raises(IndexError, match=r"Target 7 is out of bounds\."):
                ours(x, target)
            with pytest.raises(IndexError, match=r"Target -1 is out of bounds\."):
                ours(x[2:], target[2:])
    for smoothing, weight in itertools.product((0.0, 0.5), (None, torch.rand(4, device=device))):
        grads: list[torch.Tensor] = []
        loss, _ = launch.cross_entropy(x, target, weight, Options("sum", -100, smoothing), torch.float32, grads)
        rows, _ = launch.cross_entropy(x, target, weight, Options("none", -100, smoothing), torch.float32)
        assert loss.isnan() and rows.isnan().tolist() == [False, True, True]
        assert grads[0].isnan().any(1).tolist() == [False, True, True]


ERRORS = {
    "batch": lambda f, t: f(t(4, 3), torch.zeros(3, dtype=torch.int64)),
    "two labels": lambda f, t: f(t(4, 3), torch.zeros(4, 1, dtype=torch.int64)),
    "no labels": lambda f, t: f(t(4, 3), torch.tensor(1)),
    "signal": lambda f, t: f(t(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)),
    "image": lambda f, t: f(t(2, 3, 4, 5), torch.zeros(2, 4, 4, dtype=torch.int64)),
    "image of rows": lambda f, t: f(t(2, 3, 4, 5), torch.zeros(2, 4, dtype=torch.int64)),
    "volume": lambda f, t: f(t(2, 3, 4, 5, 6), torch.zeros(2, 4, 5, dtype=torch.int64)),
    "row": lambda f, t: f(t(3), torch.tensor([1, 1])),
    "number": lambda f, t: f(t(), torch.zeros(2, dtype=torch.int64)),
    "integers of the shape": lambda f, t: f(t(4, 3), torch.ones(4, 3, dtype=torch.int64)),
    "float labels": lambda f, t: f(t(4, 3), torch.zeros(4)),
    "int32 labels": lambda f, t: f(t(4, 3), torch.zeros(4, dtype=torch.int32)),
    "bytes of images": lambda f, t: f(t(2, 3, 2, 2), torch.zeros(2, 2, 2, dtype=torch.uint8)),
    "weights": lambda f, t: f(t(4, 3), torch.zeros(4, dtype=torch.int64), t(4)),
    "weights of images": lambda f, t: f(t(2, 3, 2, 2), torch.zeros(2, 2, 2, dtype=torch.int64), t(4)),
    "weights of probabilities": lambda f, t: f(t(4, 3), t(4, 3), t(1, 3)),
    "half weights": lambda f, t: f(t(4, 3), torch.zeros(4, dtype=torch.int64), t(3).half()),
    "weights to learn": lambda f, t: f(t(4, 3), torch.zeros(4, dtype=torch.int64), t(3).requires_grad_()),
    "smoothing": lambda f, t: f(t(4, 3), torch.zeros(4, dtype=torch.int64), label_smoothing=1.5),
    "smoothing of probabilities": lambda f, t: f(t(4, 3), t(4, 3), label_smoothing=1.5),
    "ignored probabilities": lambda f, t: f(t(4, 3), t(4, 3), ignore_index=1),
    "reduction": lambda f, t: f(t(4, 3), t(4, 3), reduction="median"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_torchs(name):
    with pytest.raises(Exception) as theirs:
        ERRORS[name](T.cross_entropy, torch.randn)
    with pytest.raises(theirs.type) as ours:
        ERRORS[name](F.cross_entropy, torch.randn)
    assert str(ours.value) == str(theirs.value)


def test_arguments_of_another_type_and_the_old_ones(where):
    x, target = torch.randn(4, 3, device=where), torch.zeros(4, dtype=torch.int64, device=where)
    for arguments, options in (
        (([1.0], target), {}),
        ((x, None), {}),
        ((x, target), {"ignore_index": 0.5}),
        ((x, target), {"label_smoothing": "a"}),
    ):
        with pytest.raises(TypeError):
            F.cross_entropy(*arguments, **options)
    with pytest.raises(NotImplementedError):
        F.cross_entropy(x.long(), target)
    for options in ({"size_average": False}, {"reduce": False}, {"reduction": "elementwise_mean"}):
        with pytest.warns(UserWarning, match="deprecated"):
            found = F.cross_entropy(x, target, **options)
        with pytest.warns(UserWarning, match="deprecated"):
            torch.testing.assert_close(found.cpu(), T.cross_entropy(x.cpu(), target.cpu(), **options))


def test_derivatives_of_every_order_and_operand(where):
    """By logits, probabilities and their weights, twice; and through a graph that was differentiated before."""
    logits, target, weight = torch.randn(3, 4), torch.rand(3, 4), torch.rand(4)

    def derivatives(entropy, tensors):
        loss = entropy(*tensors, label_smoothing=0.1)
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(3).sum() for g in first), tensors, retain_graph=True)
        return [loss, *first, *second, *torch.autograd.grad(loss, tensors)]

    found = derivatives(F.cross_entropy, [t.to(where).requires_grad_() for t in (logits, target, weight)])
    right = derivatives(T.cross_entropy, [t.double().requires_grad_() for t in (logits, target, weight)])
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-4, atol=1e-5)
    labels = torch.tensor([1, 0, 3])
    x, truth = logits.to(where).requires_grad_(), logits.double().requires_grad_()
    loss, reference = (
        F.cross_entropy(x, labels.to(where), ignore_index=0),
        T.cross_entropy(truth, labels, ignore_index=0),
    )
    (first,), (right,) = (torch.autograd.grad(y, t, retain_graph=True) for y, t in ((loss, x), (reference, truth)))
    first.mul_(7)  # its owner may: nobody else has it
    for scale in (1.0, -2.0):  # a second time, and a third one
        (again,) = torch.autograd.grad(loss, x, torch.tensor(scale, device=where), retain_graph=True)
        torch.testing.assert_close(again.cpu().double(), scale * right, rtol=1e-5, atol=1e-6)
    (through,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(through.pow(2).sum(), x)
    (through,) = torch.autograd.grad(reference, truth, create_graph=True)
    torch.testing.assert_close(
        second.cpu().double(), torch.autograd.grad(through.pow(2).sum(), truth)[0], rtol=1e-4, atol=1e-6
    )


def test_a_loss_scale_comes_before_the_rounding_of_halves(where):
    """As torch.amp.GradScaler's: what is tiny without it is not lost."""
    logits, labels = torch.randn(64, 4).half(), torch.zeros(64, dtype=torch.int64)
    logits[:, 1] -= 10
    x, truth = logits.to(where).requires_grad_(), logits.double().requires_grad_()
    scale = torch.tensor(2.0**15)
    (found,) = torch.autograd.grad(F.cross_entropy(x, labels.to(where)), x, scale.half().to(where))
    (right,) = torch.autograd.grad(T.cross_entropy(truth, labels), truth, scale.double())
    assert_within("gradient", found, right, 2 * rounding_bound(right, torch.float16))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_forward_derivatives_by_logits_probabilities_and_weights(reduction, where):
    operands, changes = ([torch.rand(3, 4), torch.rand(3, 4), torch.rand(4)] for _ in range(2))

    def derivative(entropy, *convert):
        primals, tangents = (tuple(t.to(*convert) for t in each) for each in (operands, changes))
        options = {"reduction": reduction, "label_smoothing": 0.1}
        return torch.func.jvp(lambda *tensors: entropy(*tensors, **options), primals, tangents)[1]

    right = derivative(T.cross_entropy, torch.float64)
    torch.testing.assert_close(derivative(F.cross_entropy, where).cpu().double(), right, rtol=1e-5, atol=1e-5)


def test_gradients_of_many_directions_at_once(where):
    x, labels = torch.randn(3, 4), torch.tensor([1, 0, 3])
    g = torch.randn(5)
    leaf, truth = x.to(where).requires_grad_(), x.double().requires_grad_()
    (found,) = torch.autograd.grad(F.cross_entropy(leaf, labels.to(where)), leaf, g.to(where), is_grads_batched=True)
    (right,) = torch.autograd.grad(T.cross_entropy(truth, labels), truth, g.double(), is_grads_batched=True)
    torch.testing.assert_close(found.cpu().double(), right, rtol=1e-5, atol=1e-6)


def test_logits_stay_as_they_are_and_may_change_after(where):
    """Neither pass writes to them; and as torch's backward does not, that of a reduced loss does not read them."""
    x, labels = torch.randn(4, 3, device=where), torch.tensor([0, 1, 2, 0], device=where)
    logits = x.clone().requires_grad_() * 1
    loss = F.cross_entropy(logits, labels)
    if mode_of(x) is not Mode.REFERENCE:
        logits.detach().add_(1)
        torch.autograd.grad(loss, logits)
        logits.detach().sub_(1)
    torch.testing.assert_close(logits.detach(), x)


def test_a_compiled_loss(where):
    x, labels = torch.randn(4, 3, device=where), torch.tensor([0, 1, 2, 0], device=where)
    compiled = torch.compile(lambda a, b: F.cross_entropy(F.log_softmax(a, 1), b), backend="aot_eager", fullgraph=True)
    leaf, truth = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss, right = compiled(leaf, labels), F.cross_entropy(F.log_softmax(truth, 1), labels)
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf), torch.autograd.grad(right, truth))


@pytest.mark.skipif(not EMULATE, reason="counts what the interpreter does")
def test_logits_are_read_once_and_their_gradient_written_once():
    for shape, dtype, last in (
        ((96, 100), torch.float32, False),
        ((2048, 10), torch.float32, False),
        ((64, 256), torch.bfloat16, False),
        ((2, 21, 32, 32), torch.float32, False),
        ((2, 24, 16, 16), torch.bfloat16, True),
    ):
        x = torch.randn(shape).to(dtype)
        x = (x.to(memory_format=torch.channels_last) if last else x).requires_grad_()
        labels = torch.randint(shape[1], (shape[0], *shape[2:]))
        logits = x.numel() * x.itemsize
        floor = 2 * logits + labels.numel() * 8
        for reduction in ("mean", "sum"):
            with counted_traffic() as traffic:
                torch.autograd.grad(F.cross_entropy(x, labels, reduction=reduction), x)
            assert floor <= traffic.total <= 1.1 * floor, (shape, reduction)
        # What comes in is not 1: the gradient is read and written once more, in place.
        with counted_traffic() as traffic:
            torch.autograd.grad(2 * F.cross_entropy(x, labels), x)
        assert floor + 2 * logits <= traffic.total <= 1.1 * (floor + 2 * logits)
        # A number for each row, and halves whose loss scale is still to come: two passes.
        with counted_traffic() as traffic:
            torch.autograd.grad(F.cross_entropy(x, labels, reduction="none").sum(), x)
        assert traffic.total <= 1.1 * (floor + logits + 3 * labels.numel() * 8)


@pytest.mark.skipif(not EMULATE, reason="reference mode computes no gradient ahead")
def test_the_gradient_is_given_away_and_not_kept():
    x = torch.randn(4, 3, requires_grad=True)
    loss = F.cross_entropy(x * 1, torch.tensor([0, 1, 2, 0]))
    (kept,) = loss.grad_fn.gradient
    gone = weakref.ref(kept)
    del kept
    loss.backward(retain_graph=True)
    gc.collect()
    assert gone() is None and not loss.grad_fn.gradient


def test_samples_and_module(where):
    check_samples("nn.functional.cross_entropy", F.cross_entropy, device=where)
    # There are hundreds, for each combination of options, of which this file has more.
    check_module(gpukern.nn.CrossEntropyLoss, device=where, only=_thinned())


def _thinned():
    count = itertools.count()
    return lambda sample: next(count) % 12 == 0
