"""Batch norms and activations that only moves part from their layer: folded all the same, or left with a reason."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gpukern
from gpukern.fusion import FusionError, pipeline
from gpukern.fusion.matcher import find
from gpukern.fusion.verify import distance, leaves
from tests.fusion.networks import NORM, Case, net

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("reference_mode"),
]

#: ‖y − ref‖ / ‖ref‖ of a few layers in fp32: a dozen roundings.
BOUND = 12 * torch.finfo(torch.float32).eps


def conv(out: int, of: int = 4, kernel: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(of, out, kernel, **options)


def made(function, norm: nn.Module | int, *shape: int, **layers):
    norm = nn.BatchNorm2d(norm) if isinstance(norm, int) else norm
    return lambda: net(function, *(shape or (2, 4, 6, 6)), n=norm, **layers)


def chunks(m, x):
    first, second = m.a(x).chunk(2, 1)
    return m.n(first) + m.o(second)


def one_of_two_chunks(m, x):
    first, second = m.a(x).chunk(2, 1)
    return m.n(first) * second


def overlapping(m, x):
    y = m.a(x)
    return m.n(y[:, :5]).exp().mean() * m.o(y[:, 3:])


def shuffled(m, x):
    n, c, h, w = (y := m.a(x)).shape
    return m.n(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)).relu()


def by_rows(m, x):
    y = m.a(x)
    return F.hardswish(m.n(y.flatten(0, 1)).reshape_as(y))


def nested(m, x):
    inner = torch.cat([m.a(x), m.b(x)], 1)
    return F.silu(m.n(torch.cat([inner, m.a(x.neg() * 2)], 1)))


def two_layers_after(m, x):
    y = m.n(x)
    return m.a(y).relu() * m.b(y)


ROWS = nn.BatchNorm1d
RELU, NORMED = f"{NORM} + relu", f"{NORM} + silu"

#: What is fused, and the reasons for what is not.
CASES = {
    "cat": Case(
        made(lambda m, x: m.n(torch.cat([m.a(x), m.b(x)], 1)).relu(), 8, a=conv(3), b=conv(5)), (RELU, RELU)
    ),
    "cat of cat": Case(
        made(nested, 11, a=conv(3), b=conv(5)),
        (NORMED, NORMED, f"scale + {NORMED}"),
    ),
    "cat of what has a norm of its own": Case(
        made(lambda m, x: m.n(torch.cat([m.o(m.a(x)), m.b(x)], 1)), 8, a=conv(3), b=conv(5), o=nn.BatchNorm2d(3)),
        (f"{NORM} + batch_norm", NORM),
    ),
    "cat of transposed": Case(
        made(
            lambda m, x: m.n(torch.cat([m.a(x), m.b(x)], 1)).relu(),
            8,
            a=nn.ConvTranspose2d(4, 6, 2, groups=2),
            b=nn.ConvTranspose2d(4, 2, 2),
        ),
        ("conv_transpose2d + batch_norm + relu",) * 2,
    ),
    "cat of images": Case(
        made(lambda m, x: m.n(torch.cat([m.a(x), m.b(x)], 2)).relu(), 3, a=conv(3), b=conv(3)), (RELU, RELU)
    ),
    "cat and addition": Case(
        made(lambda m, x: m.n(torch.cat([m.a(x), m.b(x)], 1)) * x, 4, a=conv(3), b=conv(1)), (NORM, NORM)
    ),
    "stack": Case(
        made(lambda m, x: m.n(torch.stack([m.a(x), m.b(x)], 2).flatten(1, 2)), 6, a=conv(3), b=conv(3)), (NORM, NORM)
    ),
    "no affine": Case(
        made(lambda m, x: m.n(torch.cat([m.a(x), m.b(x)], 1)), nn.BatchNorm2d(8, affine=False), a=conv(3), b=conv(5)),
        (NORM, NORM),
    ),
    "linear by rows": Case(made(by_rows, ROWS(6), 2, 5, 4, a=nn.Linear(4, 6)), ("linear + batch_norm + hardswish",)),
    "linear, transposed": Case(
        made(lambda m, x: m.n(m.a(x).transpose(1, 2)), ROWS(6), 2, 5, 4, a=nn.Linear(4, 6)), ("linear + batch_norm",)
    ),
    "linear over images": Case(
        made(lambda m, x: m.n(m.a(x).permute(0, 3, 1, 2)).relu(), 6, 2, 5, 5, 4, a=nn.Linear(4, 6)),
        ("linear + batch_norm + relu",),
    ),
    "layer scale": Case(
        made(lambda m, x: m.a(x).transpose(1, 2) * m.n.weight.view(1, -1, 1), ROWS(6), 2, 5, 4, a=nn.Linear(4, 6)),
        ("linear + scale",),
    ),
    "squeezed sequence": Case(
        made(lambda m, x: m.n(m.a(x).squeeze(-1)).relu(), ROWS(6), 2, 4, 7, 1, a=conv(6)), (RELU,)
    ),
    "dropout and flattened pixels": Case(
        made(lambda m, x: m.n(m.d(m.a(x)).flatten(2)).relu(), ROWS(5), a=conv(5), d=nn.Dropout(0.5)), (RELU,)
    ),
    "both chunks": Case(made(chunks, 4, a=conv(8), o=nn.BatchNorm2d(4)), (f"{NORM} + batch_norm",)),
    "one of two chunks": Case(made(one_of_two_chunks, nn.BatchNorm2d(4, affine=False), a=conv(8)), (NORM,)),
    "channel shuffle": Case(made(lambda m, x: m.n(F.channel_shuffle(m.a(x), 2)), 8, a=conv(8)), (NORM,)),
    "channel shuffle by hand": Case(made(shuffled, 8, a=conv(8)), (RELU,)),
    "pixel shuffle": Case(made(lambda m, x: m.n(F.pixel_shuffle(m.a(x), 2)).relu(), 2, a=conv(8)), (RELU,)),
    "mean": Case(made(lambda m, x: m.n(m.a(x).mean((2, 3))), ROWS(5), a=conv(5)), (NORM,)),
    "average pool": Case(
        made(lambda m, x: m.n(F.avg_pool2d(m.a(x), 3, 2, 1, count_include_pad=False)), 5, a=conv(5)), (NORM,)
    ),
    "upsampled": Case(
        made(lambda m, x: m.n(F.interpolate(m.a(x), size=(9, 7), mode="bilinear")), 5, a=conv(5)), (NORM,)
    ),
    "before a linear layer, flattened": Case(
        made(lambda m, x: m.b(m.n(x.relu()).flatten(1)), 4, 2, 4, 3, 3, b=nn.Linear(36, 5)),
        ("batch_norm + linear",),
        ("the model's input",),
    ),
    "before a linear layer, averaged": Case(
        made(lambda m, x: m.b(F.adaptive_avg_pool2d(m.n(x), 1).flatten(1)), 4, b=nn.Linear(4, 5)),
        ("batch_norm + linear",),
    ),
    "before a linear layer over images": Case(
        made(lambda m, x: m.b(m.n(x).permute(0, 2, 3, 1)), 4, b=nn.Linear(4, 5)), ("batch_norm + linear",)
    ),
    "before two layers": Case(
        made(two_layers_after, 4, a=conv(4), b=conv(4)), ("batch_norm + conv2d + relu", "batch_norm + conv2d")
    ),
    "before a layer that takes more": Case(
        made(lambda m, x: m.a(torch.cat([m.n(x), x], 1)), 4, a=conv(3, 8)), ("batch_norm + conv2d",)
    ),
    # ---- what stays ----
    "cat of what is no layer": Case(
        made(lambda m, x: m.n(torch.cat([m.a(x), x.sin()], 1)).exp(), 7, a=conv(3)),
        (),
        ("follows cat of sin, sin: no convolution or linear layer; exp, exp, follows",),
    ),
    "cat of what has other users": Case(
        made(lambda m, x: m.n(torch.cat([y := m.a(x), m.b(x)], 1)).exp().mean() * y, 8, a=conv(3), b=conv(5)),
        (),
        ("the result of a (conv2d), b (conv2d_1) has other users: mul",),
    ),
    "cat of the same twice": Case(
        made(lambda m, x: m.n(torch.cat([y := m.a(x), y], 1)), 6, a=conv(3)), (), ("each gets to more than one",)
    ),
    "overlapping slices": Case(
        made(overlapping, 5, a=conv(8), o=nn.BatchNorm2d(5)), (), ("has other users: o", "has other users: n")
    ),
    "unshuffled pixels": Case(
        made(lambda m, x: m.n(F.pixel_unshuffle(m.a(x), 2)), 20, a=conv(5)), (), ("each gets to more than one",)
    ),
    "zeros among the averaged": Case(
        made(lambda m, x: m.n(F.avg_pool2d(m.a(x), 3, 2, 1)), 5, a=conv(5)), (), ("follows avg_pool2d",)
    ),
    "max pool": Case(
        made(lambda m, x: m.n(F.max_pool2d(m.a(x), 3)), 5, a=conv(5)), (), ("follows max_pool2d, max_pool2d",)
    ),
    "before zeros": Case(
        made(lambda m, x: m.a(m.n(x)), 4, a=conv(4, kernel=3, padding=1)),
        (),
        ("follows the model's input; a (conv2d) after it pads it with zeros, which are not shifted",),
    ),
    "before a transposed layer": Case(
        made(lambda m, x: m.a(m.n(x)), 4, a=nn.ConvTranspose2d(4, 4, 2)), (), ("after it is transposed",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_is_right_and_fuses_what_can_be_fused(name):
    case = CASES[name]
    model, (x,) = case.make()
    report = (fused := gpukern.fuse(model, x)).report
    assert tuple(group.pattern for group in report.fused) == case.fused
    reasons = [reason for _, reason in report.not_fused]
    assert len(reasons) == len(case.left), reasons
    assert all(words in reason for words, reason in zip(case.left, reasons, strict=True)), reasons
    for batch in (1, 2, 5):
        given = torch.randn(batch, *x.shape[1:])
        expected = copy.deepcopy(model).double()(given.double())
        assert distance(leaves(fused(given)), leaves(expected)) <= BOUND


def test_what_is_skipped_is_not_moved_nor_moved_into():
    model, (x,) = CASES["cat"].make()
    for skipped, reason in (("n", "skipped, by 'n'"), ("a", "a (conv2d), which is skipped, by 'a'")):
        report = gpukern.fuse(model, x, skip=[skipped]).report
        norm = [each for each in report.not_fused if "batch_norm" in each.name]
        assert not any("conv2d + batch_norm" in group.pattern for group in report.fused)
        assert all(reason in each.reason for each in norm)


def test_the_picture_of_what_was_shows_it_where_it_was():
    model, (x,) = CASES["cat"].make()
    report = gpukern.fuse(model, x).report
    assert [node.label for node in report.graph_before] == [
        "input", "conv2d", "conv2d", "cat", "batch_norm", "relu", "output"
    ]  # fmt: skip
    assert all(node.group is not None for node in report.graph_before if node.label in ("batch_norm", "relu"))
    assert report.before.operators == 5 and report.after.operators == 3


# ---- each batch norm is accounted for --------------------------------------------------------------------------------


def returns_statistics(m, x):
    y, mean, _ = torch.native_batch_norm(m.a(x), m.n.weight, m.n.bias, None, None, True, 0.1, 1e-5)
    return y * mean.sum()


def by_the_input(m, x):
    return F.batch_norm(m.a(x), m.n.running_mean + x.mean(), m.n.running_var)


@pytest.mark.parametrize(
    "function, reason",
    [
        (returns_statistics, "returns its statistics too"),
        (by_the_input, "statistics depend on the input"),
        (lambda m, x: m.n(m.n(x)), "follows batch_norm"),
        (lambda m, x: m.n(m.a(x[0])[None]), "a (conv2d), which was left as it is"),
        (lambda m, x: m.n(x.sin()) + m.n(x.cos()), "follows sin, sin"),
    ],
)
def test_of_none_nothing_is_said(function, reason):
    model, (x,) = made(function, 4, a=conv(4))()
    not_fused = gpukern.fuse(model, x).report.not_fused
    assert any(reason in each.reason for each in not_fused if "batch_norm" in each.name)


def test_in_a_branch():
    def branches(m, x):
        return torch.cond(x.sum() > 0, lambda y: m.n(m.a(y)), lambda y: m.a(y) * 2, (x,))

    model, (x,) = made(branches, 4, a=conv(4))()
    not_fused = gpukern.fuse(model, x, verify=False, dynamic_batch=False).report.not_fused
    assert any("inside a branch of control flow" in each.reason for each in not_fused)


def test_silence_is_an_error(monkeypatch):
    model, (x,) = CASES["overlapping slices"].make()
    monkeypatch.setattr(pipeline, "find", lambda *given: dataclasses.replace(find(*given), declined=[]))
    with pytest.raises(FusionError, match="neither fused nor left"):
        gpukern.fuse(model, x)
