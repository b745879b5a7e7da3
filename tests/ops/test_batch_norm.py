"""Batch norm: the kernels against torch in float64 on the CPU, and torch's own semantics."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as T
from torch import nn

import gpukern
import gpukern.functional as F
from gpukern.ops._activation.properties import PROPERTIES
from gpukern.ops._batch_norm.plan import plan
from gpukern.ops._batch_norm.problem import walk
from gpukern.runtime.device import EMULATED, H100
from gpukern.runtime.mode import Mode, force_mode
from tests.numerics import FP32_EPS, assert_within, rounding_bound

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last", "strided", "expanded")
# (shape, what it is a case of); with the emulated device's plan.
SHAPES = {
    "vectors": (9, 7),
    "two vectors, many channels": (2, 130),
    "sequences": (3, 5, 11),
    "odd": (2, 3, 7, 5),
    "one channel": (4, 1, 3, 3),
    "one pixel": (6, 40, 1, 1),
    "two values": (1, 3, 1, 2),
    "40 channels": (3, 40, 6, 9),
    "several splits": (19, 3, 4, 5),
    "several splits, 64 channels": (3, 64, 10, 10),
    "three dimensions of pixels": (2, 3, 2, 3, 4),
}
SLOPE = 0.1


def make(shape, layout: str, dtype: torch.dtype, device, offset: float = 0.0) -> torch.Tensor:
    """Random [N, C, ...] in a layout; all but 4-D ones are contiguous or strided."""

    def random(*sizes):
        return (torch.randn(sizes) + offset).to(dtype).to(device)

    if layout == "channels_last" and len(shape) == 4:
        return random(*shape).contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return random(*reversed(shape), 2)[..., 1].permute(*reversed(range(len(shape))))
    if layout == "expanded":
        return random(*shape[:-1], 1).expand(shape) if len(shape) > 2 else random(1, 1).expand(shape)
    return random(*shape)


def activate(z: torch.Tensor, name: str | None) -> torch.Tensor:
    if name == "leaky_relu":
        return T.leaky_relu(z, SLOPE)
    if name == "gelu_tanh":
        return T.gelu(z, approximate="tanh")
    return z if name is None else getattr(T, name)(z)


@dataclass
class Call:
    """One batch norm, its operands leaves of a graph."""

    x: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    mean: torch.Tensor | None
    var: torch.Tensor | None
    training: bool = True
    momentum: float = 0.3
    eps: float = 1e-3
    activation: str | None = None

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [t for t in (self.x, self.weight, self.bias, self.residual) if t is not None and t.requires_grad]

    def __call__(self) -> torch.Tensor:
        return F.batch_norm(
            self.x, self.mean, self.var, self.weight, self.bias, self.training, self.momentum, self.eps,
            residual=self.residual, activation=self.activation, negative_slope=SLOPE,
        )  # fmt: skip

    def exact(self) -> Call:
        """The same operands in float64 on the CPU."""

        def double(t):
            return None if t is None else t.detach().cpu().double().clone().requires_grad_(t.requires_grad)

        tensors = {name: double(getattr(self, name)) for name in ("x", "weight", "bias", "residual", "mean", "var")}
        return Call(**tensors, training=self.training, momentum=self.momentum, eps=self.eps, activation=self.activation)

    def torchs(self) -> torch.Tensor:
        z = T.batch_norm(
            self.x, self.mean, self.var, self.weight, self.bias, self.training, self.momentum, self.eps
        )  # fmt: skip
        return activate(z if self.residual is None else z + self.residual, self.activation)


def call(
    shape, device, *, layout="contiguous", dtype=torch.float32, parameters=torch.float32, residual=False, offset=0.0,
    **options,
) -> Call:  # fmt: skip
    C = shape[1]

    def numbers(low, high):
        return (low + (high - low) * torch.rand(C)).to(parameters).to(device)

    return Call(
        make(shape, layout, dtype, device, offset).requires_grad_(),
        (numbers(0.5, 1.5) * (-1) ** torch.arange(C, device=device)).to(parameters).requires_grad_(),
        numbers(-1, 1).requires_grad_(),
        make(shape, layout, dtype, device).requires_grad_() if residual else None,
        numbers(offset - 1, offset + 1),
        numbers(0.5, 2),
        **options,
    )


def check(actual: Call, grad_layout: str = "contiguous") -> torch.Tensor:
    """Output, running statistics and gradients of ``actual`` against torch in float64. Returns the output.

    With ``n`` values to a channel, the batch's statistics and every sum over a channel are random walks of fp32
    roundings: 6 ε √n of what is summed (see tests/numerics.py). The mean errs by a few ε of its own size, which counts
    in units of σ. A few more roundings, 16 ε, are made on the way to one element. What an activation makes of an error
    is at most 1.5 times as large (hardswish); gradients go through ∂L/∂z, or y, rounded to the input's dtype, and act″
    is at most 1.
    """
    exact = actual.exact()
    pixels = (0, *range(2, actual.x.dim()))
    n = actual.x.numel() // actual.x.shape[1]
    old = exact.mean, exact.var
    if exact.mean is not None:
        exact.mean, exact.var = (t.clone() for t in old)
    output, expected = actual(), exact.torchs()
    layout = actual.x.is_contiguous(memory_format=torch.channels_last) and not actual.x.is_contiguous()
    assert output.is_contiguous(memory_format=torch.channels_last if layout else torch.contiguous_format)
    assert output.dtype is actual.x.dtype

    def channels(t):
        return t.view(1, -1, *(1,) * (actual.x.dim() - 2))

    x = exact.x.detach()
    var, mean = torch.var_mean(x, pixels, correction=0) if actual.training else (old[1], old[0])
    inverse = channels((var + actual.eps).rsqrt())
    normal = (x - channels(mean)) * inverse
    weight = 1 if exact.weight is None else channels(exact.weight.detach()).abs()
    slack = FP32_EPS * (16 + 6 * n**0.5 + 4 * channels(mean).abs() * inverse)
    size = weight * (normal.abs() + 1)
    size = size + (0 if exact.bias is None else channels(exact.bias.detach()).abs())
    size = size + (0 if exact.residual is None else exact.residual.detach().abs())
    assert_within("output", output, expected, 1.5 * slack * size + rounding_bound(expected, output.dtype))
    if exact.mean is not None and actual.training:
        new = torch.var(x, pixels, correction=1)
        for name, sizes in (("mean", mean.abs() + new.sqrt()), ("var", new)):
            running, wanted = getattr(actual, name), getattr(exact, name)
            bound = slack.view(-1) * (sizes + old[name == "var"].abs()) + rounding_bound(wanted, running.dtype)
            assert_within(f"running {name}", running, wanted, bound)

    grad = make(output.shape, grad_layout, output.dtype, output.device)
    results = torch.autograd.grad(output, actual.leaves, grad, retain_graph=True)
    exact_grad = grad.cpu().double()
    wanted = torch.autograd.grad(expected, exact.leaves, exact_grad, retain_graph=True)
    slack = 1.5 * slack * (size + 1) + 2 * torch.finfo(output.dtype).eps
    g = 1.5 * exact_grad.abs()
    bounds = {"x": slack * g, "weight": (slack * g * (normal.abs() + 1)).sum(pixels), "bias": (slack * g).sum(pixels)}
    bounds["residual"] = bounds["x"]
    mean_g, mean_gx = (t.mean(pixels, keepdim=True) for t in (slack * g, slack * g * (normal.abs() + 1)))
    bounds["x"] = weight * inverse * (slack * g + mean_g + (normal.abs() + 1) * mean_gx)
    names = [name for name, t in vars(actual).items() if isinstance(t, torch.Tensor) and t.requires_grad]
    for name, result, reference in zip(names, results, wanted, strict=True):
        assert result.dtype is getattr(actual, name).dtype
        bound = bounds[name] + rounding_bound(reference, result.dtype)
        assert_within(f"gradient of {name}", result, reference, bound)
    return output


# ---- values and gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_shapes(shape, training, device):
    check(call(shape, device, training=training))
    check(call(shape, device, training=training, residual=True, activation="relu", layout="channels_last"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_dtypes_and_layouts(layout, dtype, training, device):
    """Input, residual and gradient in any strides: sliced, permuted, stride 0; parameters of both dtypes."""
    for parameters, other in ((torch.float32, "contiguous"), (dtype, layout)):
        options = dict(layout=layout, dtype=dtype, parameters=parameters, training=training)
        check(call((3, 20, 6, 7), device, residual=True, activation="tanh", **options), grad_layout=other)
        check(call((3, 20, 6, 7), device, **options), grad_layout="expanded")


def test_operands_of_different_layouts(device):
    one = call((3, 20, 6, 7), device, residual=True, activation="silu", layout="channels_last")
    one.residual = make((3, 20, 6, 7), "contiguous", torch.float32, device).requires_grad_()
    check(one, grad_layout="strided")


@pytest.mark.parametrize("activation", PROPERTIES)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_activations(activation, residual, training, device):
    check(call((3, 6, 5, 7), device, training=training, residual=residual, activation=activation))
    # Several launches, where what the first makes of the residual is read by the last.
    check(call((19, 3, 4, 5), device, training=training, residual=residual, activation=activation))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual", "x, residual", "weight, bias"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_some_gradients(wanted, activation, training, device):
    for shape in ((3, 6, 5, 7), (19, 3, 4, 5)):
        one = call(shape, device, training=training, residual=True, activation=activation)
        for name in ("x", "weight", "bias", "residual"):
            getattr(one, name).requires_grad_(name in wanted.split(", "))
        check(one)


@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_without_parameters(missing, training, device):
    for shape in ((3, 6, 5, 7), (19, 3, 4, 5)):
        one = call(shape, device, training=training, activation="relu")
        for name in missing:
            setattr(one, name, None)
        check(one)


@pytest.mark.parametrize("shape", [(7, 5), (2, 40, 6, 9), (3, 64, 10, 10)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_mean(shape, dtype, device):
    """A thousand standard deviations from zero; and a first value that is far from all others."""
    check(call(shape, device, offset=1000.0, dtype=dtype))
    one = call(shape, device, offset=1000.0, dtype=dtype, layout="channels_last")
    with torch.no_grad():
        one.x[0, :, ...].view(shape[1], -1)[:, :1] = 0
    check(one)


def test_constant_channels(device):
    """No deviation at all: nothing is left but the bias, and no NaN."""
    one = call((19, 3, 4, 5), device)
    with torch.no_grad():
        one.x[:] = torch.tensor([1000.3, 0.0, -1e-3], device=device)[:, None, None]
    output = one()
    assert torch.equal(output, one.bias.detach()[:, None, None].expand_as(output))


def test_nan_and_infinity_stay_in_their_channel(device):
    for value in (float("nan"), float("inf")):
        for shape in ((3, 6, 5, 7), (19, 3, 4, 5)):
            one = call(shape, device, activation="relu")
            with torch.no_grad():
                one.x[1, 1, 2, 3] = value
            output = one()
            assert output[:, 1].isnan().all() and one.var[1].isnan()
            others = torch.arange(shape[1]) != 1
            assert not output[:, others].isnan().any() and not one.var[others].isnan().any()
            (grad,) = torch.autograd.grad(output.sum(), one.x)
            assert grad[:, 1].isnan().all() and not grad[:, others].isnan().any()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5), (0, 3)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_empty(shape, training, where):
    one = call(shape, where, training=training, activation="relu")
    before = one.mean.clone(), one.var.clone()
    output = one()
    assert output.shape == shape
    grads = torch.autograd.grad(output.sum(), one.leaves)
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(grads, one.leaves, strict=True))
    assert torch.equal(one.mean, before[0]) and torch.equal(one.var, before[1])


@pytest.mark.parametrize(
    ("shape", "layout"), [((19, 3, 4, 5), "contiguous"), ((3, 64, 10, 10), "channels_last")], ids=["planes", "last"]
)
def test_same_bits_every_run(shape, layout, device):
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        one = call(shape, device, layout=layout, residual=True, activation="silu", dtype=torch.float16)
        output = one()
        results.append([output, one.mean, one.var, *torch.autograd.grad(output.square().sum(), one.leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_offsets_beyond_32_bits(device):
    """Images that reach past 2³¹ elements, each stride below it, in a buffer whose untouched pages cost no memory."""
    torch.use_deterministic_algorithms(False)  # filling 4 GiB with NaN would touch them all
    apart = 2**30 + 4096
    buffer = torch.empty(2 * apart + 16 * 36, dtype=torch.float16, device=device)
    far = buffer.as_strided((3, 16, 6, 6), (apart, 1, 96, 16))
    near = torch.randn(3, 16, 6, 6).half().to(device)
    far.copy_(near)
    for training in (True, False):
        one = call((3, 16, 6, 6), device, dtype=torch.float16, training=training, residual=True, activation="silu")
        results = []
        for x, grad in ((far, near), (near, far)):
            leaf = x.detach().requires_grad_()
            one.x, mean, var = leaf, one.mean, one.var
            one.mean, one.var = mean.clone(), var.clone()
            output = one()
            results.append([output, one.mean, one.var, *torch.autograd.grad(output, one.leaves, grad)])
            one.mean, one.var = mean, var
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# ---- running statistics --------------------------------------------------------------------------------------------


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
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.BatchNorm1d(12), nn.SyncBatchNorm(12)).to(where)
    act = gpukern.nn.BatchNormAct2d(3).to(where)
    model.insert(1, act)
    converted, report = gpukern.convert(model, return_report=True)
    assert [layer.type for layer in report.replaced] == ["BatchNorm2d", "BatchNorm1d"]
    assert [layer.type for layer in report.already] == ["BatchNormAct2d"]
    assert [layer.reason for layer in report.left] == ["it communicates between processes, which is left to torch"]
    assert converted[0].running_mean is model[0].running_mean
    x = torch.randn(4, 3, 2, 2, device=where)
    converted[:4](x)
    assert model[0].num_batches_tracked == model[3].num_batches_tracked == 1


# ---- derivatives of derivatives, traced graphs ---------------------------------------------------------------------


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


# ---- errors --------------------------------------------------------------------------------------------------------

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


# ---- plans ---------------------------------------------------------------------------------------------------------


def strides(shape, layout: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").contiguous(memory_format=layout).stride()


def test_walks_join_what_lies_together():
    shape = (32, 40, 28, 28)
    last, planes = (strides(shape, layout) for layout in (torch.channels_last, torch.contiguous_format))
    path = walk(shape, (last, last))
    assert (path.rows, path.height, path.inner, path.channels_run, path.channel_align) == (1, 1, 32 * 784, True, 8)
    path = walk(shape, (planes,))
    assert (path.rows, path.height, path.inner, path.channels_run, path.pixel_align) == (1, 32, 784, False, 16)
    path = walk(shape, (planes, last))  # no dimension is dense in both
    assert (path.inner, path.channel_align, path.pixel_align) == (784, 1, 1)
    path = walk(shape, (last, (0, 0, 0, 0)))  # the gradient of a sum
    assert (path.inner, path.channel_align) == (32 * 784, 8)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_few_channels_keep_a_gpu_busy(layout):
    for shape in ((32, 64, 56, 56), (128, 3, 224, 224), (32, 2048, 7, 7)):
        chosen = plan(walk(shape, (strides(shape, layout),)), 2, H100, True)
        assert chosen.splits * chosen.channel_tiles >= 2 * H100.sm_count
        assert (chosen.splits - 1) * chosen.steps_per_split < chosen.steps <= chosen.splits * chosen.steps_per_split
    small = plan(walk((128, 4096), ((4096, 1),)), 2, H100, True)
    assert small.splits == 1  # one launch


def test_emulated_shapes_take_both_ways():
    """The shapes above reach what they are there for."""

    def splits(name, layout):
        return plan(walk(SHAPES[name], (strides(SHAPES[name], layout),)), 4, EMULATED, True).splits

    assert splits("odd", torch.contiguous_format) == splits("odd", torch.channels_last) == 1
    assert splits("several splits", torch.contiguous_format) > 1
    assert splits("several splits, 64 channels", torch.channels_last) > 1
