"""Multiply-adds by operator: torch's own counter says the same of every model, whichever way it multiplies."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize
from torch.utils.flop_counter import FlopCounterMode

import gpukern
from gpukern.summary import summary

pytestmark = pytest.mark.usefixtures("reference_mode")


class Called(nn.Module):
    """``function(x, **layers)``, the layers being children."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.names = tuple(layers)

    def forward(self, *inputs):
        return self.function(*inputs, **{name: getattr(self, name) for name in self.names})


class OwnWeight(nn.Module):
    def __init__(self, compute, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))
        self.compute = compute

    def forward(self, x):
        return self.compute(x, self.weight)


def attention(x, qkv):
    q, k, v = qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
    return (q @ k.transpose(1, 2)).softmax(-1) @ v


def fused_attention(x, qkv):
    q, k, v = qkv(x.flatten(2).transpose(1, 2)).unflatten(2, (3, 4, 4)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v)


def looped(x, conv):
    for _ in range(3):
        x = conv(x)
    return x


class ConvNormAct(nn.Conv2d):
    """As detection libraries wrap it."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.norm, self.act = nn.BatchNorm2d(self.out_channels), nn.ReLU()

    def forward(self, x):
        return self.act(self.norm(super().forward(x)))


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def parametrized():
    layer = nn.Conv2d(16, 8, 3)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def encoder():
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)


#: name: what makes a model for an image of [16, 4, 4].
MODELS = {
    "own weight": lambda: OwnWeight(F.conv2d, 8, 16, 3, 3),
    "own weight, transposed": lambda: OwnWeight(F.conv_transpose2d, 16, 8, 3, 3),
    "own weight, linear": lambda: OwnWeight(lambda x, w: F.linear(x.flatten(1), w), 8, 256),
    "einsum": lambda: OwnWeight(functools.partial(torch.einsum, "nchw,dc->ndhw"), 8, 16),
    "tensordot": lambda: OwnWeight(lambda x, w: torch.tensordot(x, w, ([1], [0])), 16, 8),
    "matmul": lambda: OwnWeight(lambda x, w: x @ w, 4, 7),
    "baddbmm": lambda: OwnWeight(lambda x, w: torch.baddbmm(w, x[:, 0], x[:, 1]), 4, 4),
    "unfold": lambda: OwnWeight(lambda x, w: w @ F.unfold(x, 3), 8, 144),
    "attention": lambda: Called(attention, qkv=nn.Linear(16, 48)),
    "fused attention": lambda: Called(fused_attention, qkv=nn.Linear(16, 48)),
    "multi-head": lambda: Called(
        lambda x, a: a(*[x.flatten(2).mT] * 3)[0], a=nn.MultiheadAttention(16, 2, batch_first=True)
    ),
    "encoder layer": lambda: Called(lambda x, e: e(x.flatten(2).mT), e=encoder()),
    "frames in the batch": lambda: Called(lambda x, c: c(x.reshape(-1, 4, 4, 4)), c=nn.Conv2d(4, 8, 3)),
    "tokens in the batch": lambda: Called(lambda x, f: f(x.permute(0, 2, 3, 1).reshape(-1, 16)), f=nn.Linear(16, 4)),
    "crops in the batch": lambda: Called(lambda x, c: c(torch.cat([x, x.flip(3)])), c=nn.Conv2d(16, 8, 3)),
    "tied": lambda: nn.Sequential(*[nn.Conv2d(16, 16, 1)] * 2),
    "looped": lambda: Called(looped, conv=nn.Conv2d(16, 16, 3, padding=1)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(16, 8, 3)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv2d(16, 8, 3)),
    "older spectral_norm": lambda: nn.utils.spectral_norm(nn.Conv2d(16, 8, 3)),
    "orthogonal": lambda: Called(lambda x, f: f(x.flatten(2).mT), f=parametrizations.orthogonal(nn.Linear(16, 16))),
    "parametrization": parametrized,
    "layers inside": lambda: nn.Sequential(ConvNormAct(16, 8, 3)),
    "forward called": lambda: Called(lambda x, c: c.forward(x), c=nn.Conv2d(16, 8, 3)),
    "keyword": lambda: Called(lambda x, c: c(input=x), c=nn.Conv2d(16, 8, 3)),
    "grouped": lambda: nn.Conv2d(16, 32, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(16, 8, 3, stride=2),
    "gru": lambda: Called(lambda x, g: g(x.flatten(2).mT)[0], g=nn.GRU(16, 8, batch_first=True)),
}  # fmt: skip


def counted(model: nn.Module, *inputs: torch.Tensor) -> int:
    """By torch, which takes fused attention for nothing on a CPU."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.eval()(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", MODELS)
def test_the_total_is_that_of_torchs_counter(name):
    model = MODELS[name]()
    told = summary(model, (16, 4, 4))
    assert (
        told.multiply_adds
        == sum(row.multiply_adds for row in told.rows)
        == counted(model, torch.zeros(1, 16, 4, 4))
        > 0
    )
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    "name", ["own weight", "fused attention", "frames in the batch", "multi-head", "crops in the batch"]
)
def test_of_one_sample_whatever_the_batch(name):
    model = MODELS[name]()
    assert summary(model, (3, 16, 4, 4)).multiply_adds == summary(model, (16, 4, 4)).multiply_adds


def rows(model, size=(16, 4, 4)):
    return [(row.layer, row.multiply_adds) for row in summary(model, size).rows[1:]]


def test_what_no_layer_owns_has_a_row_where_it_happens():
    assert rows(MODELS["attention"]()) == [("Linear (16 -> 48)", 12288), ("(functional)", 8192)]
    model = Called(lambda x, c, w: F.conv2d(c(x) @ x[:, :1], w.weight), c=nn.Conv2d(16, 16, 1), w=nn.Conv2d(16, 8, 1))
    assert rows(model) == [("Conv (C_out=16, K=1, P=0, S=1)", 4096), ("(functional)", 1024 + 2048)]
    model = Called(lambda x, c: c(x @ x) @ x, c=nn.Conv2d(16, 16, 1))
    assert [layer for layer, _ in rows(model)] == ["(functional)", "Conv (C_out=16, K=1, P=0, S=1)", "(functional)"]


def test_layers_with_something_inside_have_their_own_row():
    conv = "Conv (C_out=8, K=3, P=0, S=1)"
    for name in ("weight_norm", "spectral_norm", "parametrization"):
        told = summary(MODELS[name](), (16, 4, 4))
        (row,) = told.rows[1:]
        assert (row.layer, row.multiply_adds, row.weight_size) == (conv, 4 * 8 * 144, (8, 16, 3, 3))
        assert row.parameters == told.parameters and not told.notes
    first, *others = summary(MODELS["layers inside"](), (16, 4, 4)).rows[1:]
    assert (first.layer, first.multiply_adds, first.output_size) == (f"ConvNormAct{conv[4:]}", 4 * 8 * 144, (8, 2, 2))
    assert first.parameters == 8 * 144 + 8 and [row.layer for row in others] == ["BatchNorm2d", "ReLU"]
    assert first.receptive_field == (3, 3)


def test_a_shared_layer_has_a_row_for_each_call_and_its_parameters_once():
    told = summary(MODELS["looped"](), (16, 4, 4))
    assert [row.parameters for row in told.rows] == [0, 16 * 144 + 16, 0, 0]
    assert [row.multiply_adds for row in told.rows] == [0, *[16 * 16 * 144] * 3]


@pytest.mark.parametrize("directions", [1, 2])
def test_what_torchs_counter_leaves_out(directions):
    layer = nn.LSTM(4, 8, batch_first=True, bidirectional=directions == 2)
    assert summary(layer, torch.zeros(2, 5, 4)).multiply_adds == directions * 5 * 32 * 12
    bilinear = Called(lambda x, b: b(x, x), b=nn.Bilinear(4, 4, 3))
    assert summary(bilinear, (4,)).multiply_adds == 48


def test_parameters_that_attention_reads_are_its_own():
    told = summary(MODELS["multi-head"](), (16, 4, 4))
    assert told.parameters == told.rows[-1].parameters == 4 * 16 * 17 and not told.notes


def test_of_two_branches_the_one_that_is_taken():
    def either(x, f, g):
        return torch.cond(x.sum() > 0, lambda x: f(x), lambda x: g(x), (x,))

    model = Called(either, f=nn.Conv2d(16, 4, 3), g=nn.Conv2d(16, 4, 1))
    assert summary(model, (16, 4, 4)).multiply_adds == 16 * 4 * 16


def test_operators_without_a_formula_are_noted():
    @torch.library.custom_op("gpukern_tests::product", mutates_args=())
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b

    told = summary(Called(lambda x: product(product(x, x), x)), (16, 4, 4))
    (note,) = told.notes
    assert note.startswith("There is no formula for gpukern_tests::product") and told.multiply_adds == 0


def test_inference_mode_inside_the_model():
    model = Called(torch.inference_mode()(lambda x, f, c: f(c(x).flatten(2))), f=nn.Linear(4, 3), c=nn.Conv2d(16, 8, 3))
    assert summary(model, (16, 4, 4)).multiply_adds == 4 * 8 * 144 + 8 * 4 * 3


def test_a_hidden_exception_does_not_confuse_the_rows():
    def tried(x, wrong, right):
        try:
            return wrong(x)
        except RuntimeError:
            return right(x) @ x[:, :8]

    model = Called(tried, wrong=nn.Conv2d(3, 8, 3), right=nn.Conv2d(16, 8, 1))
    assert [layer for layer, _ in rows(model)] == ["Conv (C_out=8, K=1, P=0, S=1)", "(functional)"]


def network():
    return nn.Sequential(
        nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def test_a_converted_and_a_fused_model_count_the_same():
    model = network().eval()
    right = summary(model, (16, 4, 4)).multiply_adds
    assert right == 16 * 8 * 144 + 16 * 8 * 4 * 4 + 80
    assert summary(gpukern.convert(model), (16, 4, 4)).multiply_adds == right
    fused = gpukern.fuse(model, (torch.randn(2, 16, 4, 4),))
    assert summary(fused, (16, 4, 4)).multiply_adds == right
