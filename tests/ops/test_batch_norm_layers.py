"""Batch norm's running statistics, layers, traced graphs and errors, which are torch's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as T
from torch import nn

import gpukern
import gpukern.functional as F
from gpukern.runtime.mode import Mode, force_mode
from tests.numerics import FP32_EPS
from tests.ops.batch_norm_calls import activate, call, check

pytestmark = pytest.mark.usefixtures("poisoned")


# ---- running statistics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_residual_of_another_dtype_under_autocast(dtypes, training, device):
    """The result's dtype is that of torch's ``+``; every gradient's that of its tensor."""
    one = call((3, 6, 5, 7), device, dtype=dtypes[0], residual=True, activation="silu", training=training)
    one.residual = one.residual.detach().to(dtypes[1]).requires_grad_()
    exact = one.exact()
    with torch.autocast(device.type, torch.float16):
        output = one()
    assert output.dtype is one.torchs().dtype is torch.float32
    expected = exact.torchs()
    grad = torch.randn_like(output)
    actual = torch.autograd.grad(output, one.leaves, grad)
    wanted = torch.autograd.grad(expected, exact.leaves, grad.cpu().double())
    assert (output.double().cpu() - expected).norm() <= 6 * FP32_EPS * 105**0.5 * expected.norm()
    for leaf, a, b in zip(one.leaves, actual, wanted, strict=True):
        assert a.dtype is leaf.dtype
        bound = 4 * 6 * FP32_EPS * 105**0.5 + torch.finfo(leaf.dtype).eps
        assert (a.double().cpu() - b).norm() <= bound * b.norm()


def test_running_statistics_of_other_dtypes_and_strides(device):
    one = call((19, 3, 4, 5), device, dtype=torch.float16, parameters=torch.float16)
    check(one)
    pairs = torch.rand(3, 2, device=device)
    one.mean, one.var = pairs[:, 0], pairs[:, 1]
    check(one)


def test_a_frozen_backward_notices_that_its_statistics_changed(device):
    one = call((3, 6, 5, 7), device, training=False)
    output = one()
    one.training = True
    one()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_inference_mode(where):
    with torch.inference_mode():
        layers = [kind(3).to(where) for kind in (gpukern.nn.BatchNorm2d, nn.BatchNorm2d)]
        x = torch.randn(2, 3, 4, 5, device=where)
        for training in (True, False):
            torch.testing.assert_close(*(layer.train(training)(x) for layer in layers))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 0.01, "eps": 0.1},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False, "momentum": None},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("kind", "shape"), [("BatchNorm1d", (6, 3)), ("BatchNorm1d", (2, 3, 5)), ("BatchNorm2d", (2, 3, 4, 5))]
)
def test_layers_train_and_infer_as_torchs(kind, shape, options, where):
    theirs = getattr(nn, kind)(3, **options).to(where)
    ours = getattr(gpukern.nn, kind)(3, **options).to(where)
    if theirs.affine:
        nn.init.normal_(theirs.weight)
        nn.init.normal_(theirs.bias)
    assert list(ours.state_dict()) == list(theirs.state_dict()) and repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict())
    for training in (True, True, True, False):
        x = torch.randn(shape, device=where) * 2 + 1
        outputs = [layer.train(training)(x) for layer in (ours, theirs)]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="expected"):
        ours(x[None, None])


def test_batch_norm_act(where):
    layer = gpukern.nn.BatchNormAct2d(3, activation="leaky_relu", negative_slope=0.2).to(where)
    plain = nn.BatchNorm2d(3).to(where)
    plain.load_state_dict(layer.state_dict())
    x, residual = (torch.randn(2, 3, 4, 5, device=where) for _ in range(2))
    torch.testing.assert_close(layer(x, residual), T.leaky_relu(plain(x) + residual, 0.2))
    torch.testing.assert_close(layer.eval()(x), T.leaky_relu(plain.eval()(x), 0.2))
    assert "activation=leaky_relu, negative_slope=0.2" in repr(layer)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), layer(x))
    with pytest.raises(ValueError, match="expected one of"):
        gpukern.nn.BatchNormAct2d(3, activation="selu")


def test_convert(where):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.BatchNorm1d(12)).to(where)
    act = gpukern.nn.BatchNormAct2d(3).to(where)
    model.insert(1, act)
    converted, report = gpukern.convert(model, return_report=True)
    assert [layer.type for layer in report.replaced] == ["BatchNorm2d", "BatchNorm1d"]
    assert [layer.type for layer in report.already] == ["BatchNormAct2d"]
    assert not report.left
    assert converted[0].running_mean is model[0].running_mean
    x = torch.randn(4, 3, 2, 2, device=where)
    converted[:4](x)
    assert model[0].num_batches_tracked == model[3].num_batches_tracked == 1


# ---- derivatives of derivatives, traced graphs ----------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "tanh", "silu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_gradients_of_gradients(activation, training, device):
    """The kernels' second derivatives against float64 autograd, for a scalar that needs them all."""

    def second(one, forward):
        first = torch.autograd.grad(forward().pow(3).sum(), one.leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), one.leaves)

    for residual in (False, True):
        one = call((3, 4, 3, 5), device, training=training, residual=residual, activation=activation)
        exact = one.exact()
        for got, want in zip(second(one, one), second(exact, exact.torchs), strict=True):
            # Four chained sums of at most 45 terms: a relative Frobenius error of 4 · 6 · ε · √45.
            assert (got.double().cpu() - want).norm() <= 4 * 6 * FP32_EPS * 45**0.5 * want.norm()


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_reference_gradcheck(training):
    with force_mode(Mode.REFERENCE):
        for activation in (None, "sigmoid", "gelu"):
            x, residual = (torch.randn(3, 2, 2, 2, dtype=torch.double, requires_grad=True) for _ in range(2))
            weight, bias = (torch.rand(2, dtype=torch.double, requires_grad=True) for _ in range(2))
            mean, var = torch.randn(2, dtype=torch.double), torch.rand(2, dtype=torch.double) + 0.5

            def norm(*tensors, activation=activation, statistics=(mean, var)):
                x, weight, bias, residual = tensors
                copies = [t.clone() for t in statistics]
                return F.batch_norm(x, *copies, weight, bias, training, residual=residual, activation=activation)

            assert torch.autograd.gradcheck(norm, (x, weight, bias, residual))
            assert torch.autograd.gradgradcheck(norm, (x, weight, bias, residual))


@pytest.mark.parametrize("activation", [None, "tanh", "silu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_third_derivatives(training, activation):
    """Against the formula, which autograd differentiates: torch's own batch norm gets them wrong in training."""

    def formula(one):
        channels = (slice(None), None, None)
        statistics = torch.var_mean(one.x, (0, 2, 3), correction=0) if training else (one.var, one.mean)
        variance, mean = (t[channels] for t in statistics)
        normal = (one.x - mean) * (variance + one.eps).rsqrt()
        return activate(normal * one.weight[channels] + one.bias[channels] + one.residual, activation)

    def third(one, y):
        for _ in range(2):
            first = torch.autograd.grad(y.pow(3).sum(), one.leaves, create_graph=True)
            y = sum(g.pow(2).sum() for g in first)
        return torch.autograd.grad(y, one.leaves)

    with force_mode(Mode.REFERENCE):
        one = call((3, 2, 3, 3), "cpu", training=training, residual=True, activation=activation).exact()
        wanted = third(one, formula(one))
        for actual, reference in zip(third(one, one()), wanted, strict=True):
            assert (actual - reference).norm() <= 1e-10 * reference.norm()


def network() -> nn.Sequential:
    # No bias before a batch norm: in training its gradient is zero, and what is computed is noise.
    return nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(24))


def test_compiled_training_is_one_graph_and_torchs():
    torch._dynamo.reset()
    with force_mode(Mode.REFERENCE):
        # In float64: a batch norm over three values may multiply the rounding errors of float32 by hundreds.
        theirs = network()
        ours = gpukern.convert(copy.deepcopy(theirs)).double()
        theirs.double()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        for batch in (3, 5, 4):
            x = torch.randn(batch, 2, 4, 5, dtype=torch.double)
            for model in (theirs, compiled):
                model(x).pow(3).sum().backward()  # the sum of squares is a constant in training
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_exported_inference_is_one_operator_for_each_layer():
    with force_mode(Mode.REFERENCE):
        model = network().eval()
        for layer in (model[1], model[4]):
            nn.init.uniform_(layer.running_var, 0.5, 2)
        batch = torch.export.Dim("batch", min=1, max=64)
        example = (torch.randn(3, 2, 4, 5),)
        program = torch.export.export(gpukern.convert(model), example, dynamic_shapes=({0: batch},))
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert targets.count("gpukern.batch_norm.default") == 2
        x = torch.randn(7, 2, 4, 5)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-6)


# ---- errors ---------------------------------------------------------------------------------------------------------

X, M, V = torch.randn(2, 4, 3, 3), torch.zeros(4), torch.ones(4)
ERRORS = {
    "no statistics": lambda f: f(X, None, None),
    "no variance": lambda f: f(X, M, None),
    "one statistic in training": lambda f: f(X, M, None, training=True),
    "mean's length": lambda f: f(X, M[:3], V),
    "variance's length": lambda f: f(X, M, V[:3]),
    "weight's length": lambda f: f(X, M, V, V[:3]),
    "bias's length": lambda f: f(X, M, V, V, V[:3], training=True),
    "rank 1": lambda f: f(X[0, :, 0, 0], M, V),
    "mixed dtypes": lambda f: f(X, M, V, V.half(), V.half()),
    "half statistics": lambda f: f(X, M.half(), V.half(), training=True),
    "one value per channel": lambda f: f(X[:1, :, :1, :1], M, V, training=True),
    "one vector": lambda f: f(X[:1, :, 0, 0], None, None, training=True),
    "momentum None": lambda f: f(X, M, V, training=True, momentum=None),
    "eps 0 in training": lambda f: f(X, M, V, training=True, eps=0.0),
    "eps negative in training": lambda f: f(X, M, V, training=True, eps=-1.0),
    "input is a list": lambda f: f([1.0], M, V),
    "mean is a list": lambda f: f(X, [0.0] * 4, V),
    "mean on another device": lambda f: f(X, M.to("meta"), V),
    "statistics require gradients": lambda f: f(X.clone().requires_grad_(), M.clone().requires_grad_(), V.clone()),
}


@pytest.mark.parametrize("bad", ERRORS.values(), ids=ERRORS)
def test_error_is_torchs(bad, where):
    with pytest.raises(Exception) as expected:
        bad(T.batch_norm)
    with pytest.raises(expected.type) as actual:
        bad(F.batch_norm)
    assert actual.type is expected.type
    assert len(str(actual.value)) > 20


def test_errors_of_the_epilogue(where):
    with pytest.raises(ValueError, match="expected one of none, relu"):
        F.batch_norm(X, M, V, activation="selu")
    with pytest.raises(ValueError, match="negative_slope"):
        F.batch_norm(X, M, V, activation="leaky_relu", negative_slope=-1.0)
    with pytest.raises(RuntimeError, match="residual to have the input's shape"):
        F.batch_norm(X, M, V, residual=X[:1])
    with pytest.raises(RuntimeError, match="same dtype"):
        F.batch_norm(X, M, V, residual=X.half())
    with pytest.raises(RuntimeError, match="floating"):
        F.batch_norm(X.int(), M, V)
    with pytest.raises(ValueError, match=r"more than 1 value per channel when training, got input size \[1, 4\]"):
        F.batch_norm(X[:1, :, 0, 0], M, V, training=True)
