"""Layers whose forward calls torch's functions: converted, they call gpukern's, and compute the same."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import linear as imported_linear

import gpukern
from gpukern.checking import check
from gpukern.nn import foreign
from gpukern.nn.rebinding import with_ours
from gpukern.runtime.mode import Mode, force_mode

pytestmark = pytest.mark.usefixtures("reference_mode")


def helper(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return imported_linear(x, weight).softmax(-1)


class Standardized(nn.Conv2d):
    """Built as timm's ``ScaledStdConv2d``: the weight is normalized by a batch norm over a reshaped view of it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Windows(nn.Module):
    """Built as torchvision's ``ShiftedWindowAttention``: a function computes with the weights of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, *, scale: float = 2.0) -> torch.Tensor:
        return F.dropout(helper(x, self.qkv.weight) * scale, p=0.0, training=self.training)


@pytest.fixture
def stand_in(monkeypatch):
    """Have a class treated as the library's class ``like``, while the test runs."""

    def put(kind: type, like: str) -> None:
        name = f"{kind.__module__}.{kind.__qualname__}"
        for known in (foreign._OURS, foreign._PARTS):
            if like in known:
                monkeypatch.setitem(known, name, known[like])

    return put


def assert_same(model: nn.Module, converted: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Outputs and every gradient, the parameters' and the inputs', in the mode of the models."""
    found = []
    for each in (model, converted):
        leaves = [arg.detach().clone().requires_grad_() for arg in args]
        outputs = each(*leaves, **kwargs)
        outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None]
        wanted = [*leaves, *(p for p in each.parameters() if p.requires_grad)]
        grads = torch.autograd.grad(sum(y.square().sum() for y in outputs), wanted, allow_unused=True)
        found.append([*outputs, *grads])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_weight_that_is_normalized_first(stand_in):
    stand_in(Standardized, "timm.layers.std_conv.ScaledStdConv2d")
    model = Standardized(4, 6, 3, stride=2, padding=1, groups=2)
    converted, report = gpukern.convert(model, return_report=True)
    assert report.replaced == (("", "Standardized"),) and not report.left and not report.partly
    assert converted.forward.__globals__["F"].conv2d is gpukern.functional.conv2d
    assert list(converted.state_dict()) == list(model.state_dict()) and isinstance(converted, Standardized)
    x = torch.randn(2, 4, 7, 6)
    torch.testing.assert_close(converted(x), model(x))
    assert check(model, x).passed  # its gradients cancel: within derived bounds
    assert gpukern.convert(converted, return_report=True)[1].already == (("", "Standardized"),)


def test_functions_of_the_same_file_are_exchanged_too(stand_in):
    stand_in(Windows, "torchvision.models.swin_transformer.ShiftedWindowAttention")
    model = nn.Sequential(Windows(), nn.Linear(6, 6))
    converted, report = gpukern.convert(model, return_report=True)
    assert report.replaced == (("0", "Windows"), ("1", "Linear"))
    assert report.partly == (("0", "Windows", "the products of queries, keys and values"),)
    assert "replaced in part: 1 layer (1 Windows): torch computes the products" in str(report)
    space = converted[0].forward.__globals__
    assert space["helper"].__globals__["imported_linear"] is gpukern.functional.linear
    assert helper.__globals__["imported_linear"] is imported_linear  # nothing here has changed
    assert_same(model, converted, torch.randn(3, 6))
    assert check(converted, torch.randn(3, 6)).passed


OPTIONS = {
    "plain": ({}, {}),
    "batch first": ({"batch_first": True}, {"need_weights": False}),
    "sizes": ({"kdim": 5, "vdim": 3}, {"average_attn_weights": False}),
    "biases": ({"add_bias_kv": True, "add_zero_attn": True, "bias": False}, {}),
    "mask": ({}, {"attn_mask": torch.ones(4, 3, dtype=torch.bool).tril(), "need_weights": False}),
    "padding": ({"batch_first": True}, {"key_padding_mask": torch.tensor([[False, False, True]] * 2)}),
}


@pytest.mark.parametrize("made, called", OPTIONS.values(), ids=list(OPTIONS))
def test_attention_is_torchs_with_other_projections(made, called):
    model = nn.MultiheadAttention(8, 2, **made)
    converted, report = gpukern.convert(model, return_report=True)
    assert not report.left and list(converted.state_dict()) == list(model.state_dict())
    first = made.get("batch_first")
    query, key, value = (
        torch.randn(4, 2, 8),
        torch.randn(3, 2, made.get("kdim", 8)),
        torch.randn(3, 2, made.get("vdim", 8)),
    )
    given = [each.transpose(0, 1) for each in (query, key, value)] if first else [query, key, value]
    for training in (True, False):
        assert_same(model.train(training), converted.train(training), *given, **called)
    with torch.no_grad():  # where torch has an operator for all of it
        for ours, theirs in zip(converted(*given, **called), model(*given, **called), strict=True):
            torch.testing.assert_close(ours, theirs)
    if not made and not called:
        assert_same(model, converted, *(each[:, 0] for each in given))


def test_projections_of_attention_are_gpukerns(monkeypatch):
    function = with_ours(F.multi_head_attention_forward)
    assert function.__globals__["linear"] is gpukern.functional.linear
    assert function.__globals__["_in_projection_packed"].__globals__["linear"] is gpukern.functional.linear
    monkeypatch.setattr(torch, "_native_multi_head_attention", None)
    attention = gpukern.convert(nn.MultiheadAttention(8, 2, batch_first=True).eval())
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        attention(x, x, x)
    with pytest.raises(AssertionError, match="was expecting embedding dimension of 8, but got 6"):
        attention(x[..., :6], x[..., :6], x[..., :6])


class Plain(nn.Linear):
    """A subclass that computes nothing else."""

    @staticmethod
    def name() -> str:
        return "plain"


class Changed(nn.BatchNorm2d):
    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Accepts anything."""


@pytest.mark.parametrize("layer", [Plain(3, 2), nn.MultiheadAttention(4, 2), Plain(3, 2, bias=False)], ids=type)
def test_converted_subclasses_can_be_copied_and_pickled(layer):
    converted, report = gpukern.convert(layer, return_report=True)
    assert report.replaced == (("", type(layer).__name__),) and isinstance(converted, type(layer))
    for again in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert type(again) is type(converted)
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in layer.state_dict().items())


def test_a_subclass_is_replaced_if_it_computes_what_its_base_does():
    model = nn.Sequential(Plain(4, 4), Changed(4))
    converted, report = gpukern.convert(model, return_report=True)
    assert isinstance(converted[0], gpukern.nn.Linear) and converted[0].name() == "plain"
    assert [(name, reason) for name, _, reason in report.left] == [
        ("1", "subclass of BatchNorm2d: it redefines _check_input_dim")
    ]
    assert_same(model[0], converted[0], torch.randn(2, 4))


def test_what_only_moves_values_is_reported_as_such():
    model = nn.Sequential(nn.ZeroPad2d(1), nn.PixelShuffle(2), nn.ReflectionPad2d(1), nn.ReLU())
    _, report = gpukern.convert(model, return_report=True)
    assert [name for name, _ in report.moving] == ["0", "1", "2"] and not report.left
    assert "nothing to compute: 3 layers" in str(report)


def test_compiled():
    """Dynamo reads the exchanged functions, not those of the file by their names."""
    attention = gpukern.convert(nn.MultiheadAttention(8, 2))
    calls: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        calls.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x = torch.randn(3, 2, 8)
    found = torch.compile(attention, backend=backend, fullgraph=True)(x, x, x)[0]
    torch.testing.assert_close(found, attention(x, x, x)[0])
    assert sum("gpukern" in call and "linear" in call for call in calls) == 2


def test_kernels_compute_the_projections(device):
    """On the GPU, or emulated."""
    with force_mode(Mode.EMULATED if device.type == "cpu" else Mode.KERNELS):
        model = nn.MultiheadAttention(8, 2).to(device)
        x = torch.randn(3, 2, 8, device=device)
        assert_same(model, gpukern.convert(model), x, x, x)
