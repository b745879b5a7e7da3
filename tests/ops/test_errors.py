"""Bad arguments raise what torch raises, before anything is launched, on the kernels and in reference mode."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as torch_F

import gpukern
import gpukern.functional as F
from gpukern.runtime.mode import Mode, force_mode
from tests.device import DEVICE

x, w, b, m, v, scalar = (torch.randn(s, device=DEVICE) for s in ((2, 4, 8, 8), (6, 4, 3, 3), (6,), (5, 8), (7, 8), ()))

CONV = {
    "rank 2 input": lambda f: f(x[0, 0], w),
    "rank 5 input": lambda f: f(x[None], w),
    "rank 3 weight": lambda f: f(x, w[0]),
    "channels": lambda f: f(x[:, :3], w),
    "channels of an image": lambda f: f(x[0, :3], w),
    "groups do not divide": lambda f: f(x, w, groups=3),
    "groups 0": lambda f: f(x, w, groups=0),
    "groups negative": lambda f: f(x, w, groups=-1),
    "no output channel": lambda f: f(x, w[:0]),
    "bias length": lambda f: f(x, w, b[:5]),
    "bias rank": lambda f: f(x, w, b[None]),
    "kernel larger than input": lambda f: f(x[:, :, :2], w),
    "kernel wider than input": lambda f: f(x[:, :, :, :2], w),
    "dilated kernel larger": lambda f: f(x, w, dilation=4),
    "empty image": lambda f: f(x[:, :, :0], w, padding=1),
    "stride 0": lambda f: f(x, w, stride=0),
    "stride of three": lambda f: f(x, w, stride=(1, 1, 1)),
    "stride float": lambda f: f(x, w, stride=1.5),
    "stride bool": lambda f: f(x, w, stride=True),
    "stride text": lambda f: f(x, w, stride="2"),
    "padding negative": lambda f: f(x, w, padding=-1),
    "padding of three": lambda f: f(x, w, padding=(1, 2, 3)),
    "padding word": lambda f: f(x, w, padding="full"),
    "same with stride": lambda f: f(x, w, padding="same", stride=2),
    "dilation 0": lambda f: f(x, w, dilation=0),
    "input is an array": lambda f: f(x.cpu().numpy(), w),
    "weight is a list": lambda f: f(x, w.tolist()),
    "bias is a list": lambda f: f(x, w, [0.0] * 6),
    "mixed dtypes": lambda f: f(x, w.half()),
    "mixed bias dtype": lambda f: f(x, w, b.double()),
}
s, t = torch.randn(2, 4, 8, device=DEVICE), torch.randn(6, 4, 3, device=DEVICE)
CONV1D = {
    "rank 1 input": lambda f: f(s[0, 0], t),
    "rank 4 input": lambda f: f(s[None], t),
    "rank 2 weight": lambda f: f(s, t[0]),
    "channels": lambda f: f(s[:, :3], t),
    "channels of a sequence": lambda f: f(s[0, :3], t),
    "groups do not divide": lambda f: f(s, t, groups=3),
    "groups 0": lambda f: f(s, t, groups=0),
    "no output channel": lambda f: f(s, t[:0]),
    "bias length": lambda f: f(s, t, b[:5]),
    "kernel larger than input": lambda f: f(s[:, :, :2], t),
    "dilated kernel larger": lambda f: f(s, t, dilation=4),
    "empty sequence": lambda f: f(s[:, :, :0], t, padding=1),
    "stride 0": lambda f: f(s, t, stride=0),
    "stride of two": lambda f: f(s, t, stride=(1, 1)),
    "stride text": lambda f: f(s, t, stride="2"),
    "padding negative": lambda f: f(s, t, padding=-1),
    "padding of two": lambda f: f(s, t, padding=(1, 2)),
    "padding word": lambda f: f(s, t, padding="full"),
    "same with stride": lambda f: f(s, t, padding="same", stride=2),
    "same of a matrix": lambda f: f(s, t[0], padding="same"),
    "mixed dtypes": lambda f: f(s, t.half()),
    "mixed bias dtype": lambda f: f(s, t, b.double()),
}
LINEAR = {
    "features": lambda f: f(m, v[:, :7]),
    "rank 0 input": lambda f: f(scalar, v),
    "rank 3 weight": lambda f: f(m, v[None]),
    "bias length": lambda f: f(m, v, b),
    "mixed dtypes": lambda f: f(m, v.half()),
    "input is a list": lambda f: f(m.tolist(), v),
    "bias is a number": lambda f: f(m, v, 1.0),
}
CALLS = [
    (getattr(F, function), getattr(torch_F, function), name, call)
    for function, table in (("conv2d", CONV), ("conv1d", CONV1D), ("linear", LINEAR))
    for name, call in table.items()
]
IDS = [f"{theirs.__name__}: {name}" for _, theirs, name, _ in CALLS]


@pytest.fixture
def no_launch(monkeypatch):
    """Fails on the first launch of a Triton kernel."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def refuse(self, *arguments, **options):
        raise AssertionError("a kernel was launched")

    for function in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(function, "run", refuse)


@pytest.mark.parametrize("ours, theirs, name, call", CALLS, ids=IDS)
def test_error_is_torchs(ours, theirs, name, call, no_launch):
    with pytest.raises(Exception) as expected:
        call(theirs)
    with pytest.raises(expected.type) as actual:
        call(ours)
    assert actual.type is expected.type
    assert len(str(actual.value)) > 20, "an error says what was expected and what came"
    with force_mode(Mode.REFERENCE), pytest.raises(expected.type):
        call(ours)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64], ids=str)
def test_kernels_refuse_other_dtypes(dtype, no_launch):
    for call in (
        lambda: F.conv2d(x.to(dtype), w.to(dtype)),
        lambda: F.linear(m.to(dtype), v.to(dtype)),
        lambda: F.tanh(x.to(dtype)),
    ):
        with pytest.raises(RuntimeError, match=r"float32|floating"):
            call()


def test_mixed_devices(no_launch):
    for call in (lambda: F.conv2d(x, w.to("meta")), lambda: F.linear(m, v.to("meta"))):
        with pytest.raises(RuntimeError, match="same device"):
            call()


def test_nested_tensors(no_launch):
    nested = torch.nested.nested_tensor([x[0], x[0, :, :4]], device=DEVICE)
    weight = torch.nested.nested_tensor([v[0], v[1]], device=DEVICE)
    for call in (
        lambda: F.conv2d(nested, square),
        lambda: F.linear(m, weight),
        lambda: F.max_pool2d(nested, 2),
        lambda: F.batch_norm(nested, None, None, training=True),
        lambda: F.relu(nested),
    ):
        with pytest.raises(NotImplementedError, match="nested"):
            call()


def test_unknown_activation(no_launch):
    for call in (
        lambda a, s: F.conv2d(x, w, activation=a, negative_slope=s),
        lambda a, s: F.linear(m, v, activation=a, negative_slope=s),
    ):
        with pytest.raises(ValueError, match="expected one of none, relu"):
            call("selu", 0.0)
        with pytest.raises(ValueError, match="negative_slope"):
            call("leaky_relu", -0.5)


# ---- every option of every function --------------------------------------------------------------------------------

_NO_OPTION = (
    None, "x", 1.5, True, -1, 0, (1, 2, 3), (1, 1.5), (None, 1), (True, 2), torch.tensor(1.5), object(),
    float("nan"), float("inf"), 1j, {}, torch.tensor([1, 1]),
)  # fmt: skip
square = torch.randn(4, 4, 3, 3, device=DEVICE)
four = torch.rand(4, device=DEVICE)
#: What the other arguments are, and the names of the options.
OPTIONS = {
    "conv2d": ({"input": x, "weight": square}, "input weight bias stride padding dilation groups"),
    "conv_transpose2d": (
        {"input": x, "weight": square},
        "input weight bias stride padding dilation groups output_padding",
    ),
    "conv1d": ({"input": s, "weight": t[:4]}, "input weight bias stride padding dilation groups"),
    "conv_transpose1d": (
        {"input": s, "weight": t[:4]},
        "input weight bias stride padding dilation groups output_padding",
    ),
    "linear": ({"input": m, "weight": v[:, :8]}, "input weight bias"),
    "max_pool2d": ({"input": x, "kernel_size": 3}, "input kernel_size stride padding dilation ceil_mode"),
    "avg_pool2d": (
        {"input": x, "kernel_size": 3},
        "input kernel_size stride padding ceil_mode count_include_pad divisor_override",
    ),
    "adaptive_avg_pool2d": ({"input": x}, "output_size"),
    "max_pool1d": ({"input": s, "kernel_size": 3}, "input kernel_size stride padding dilation ceil_mode"),
    "avg_pool1d": (
        {"input": s, "kernel_size": 3},
        "input kernel_size stride padding ceil_mode count_include_pad",
    ),
    "adaptive_avg_pool1d": ({"input": s}, "output_size"),
    "adaptive_max_pool1d": ({"input": s}, "output_size"),
    "batch_norm": (
        {"input": x, "running_mean": four, "running_var": four},
        "input weight bias running_mean running_var training momentum eps",
    ),
    "batch_norm, training": (
        {"input": x, "running_mean": four, "running_var": four, "training": True},
        "weight bias running_mean running_var momentum eps",
    ),
    "leaky_relu": ({"input": x}, "input negative_slope"),
    "gelu": ({"input": x}, "input approximate"),
    **{name: ({"input": x}, "input inplace") for name in ("relu", "relu6", "hardsigmoid", "silu", "hardswish")},
}
#: What torch says of these comes from the middle of its own code.
ACCIDENTS = (
    ("adaptive_avg_pool2d", "output_size", {}),
    ("adaptive_avg_pool2d", "output_size", "x"),
    ("leaky_relu", "negative_slope", 1j),
)


def _raised(function, arguments) -> type[Exception] | None:
    try:
        function(**arguments)
    except Exception as problem:
        return type(problem)
    return None


@pytest.mark.parametrize("name", OPTIONS)
def test_what_torch_refuses_is_refused(name, no_launch):
    """Every option with things that it is not: where torch raises, the same error, and nothing is launched."""
    given, options = OPTIONS[name]
    ours, theirs = (getattr(module, name.partition(",")[0]) for module in (F, torch_F))
    refused = 0
    for option in options.split():
        for value in _NO_OPTION:
            if any((name, option, repr(value)) == (*accident[:2], repr(accident[2])) for accident in ACCIDENTS):
                continue
            if isinstance(value, torch.Tensor) and option in ("input", "eps", "training", "inplace", "output_size"):
                continue  # an input of another rank; or torch asks whether it is true, or takes it
            # Fresh statistics: torch's call may update them.
            arguments = {key: t.clone() if isinstance(t, torch.Tensor) else t for key, t in given.items()}
            expected = _raised(theirs, {**arguments, option: value})
            if expected is None:
                continue
            refused += 1
            for mode in (None, Mode.REFERENCE):
                kept = {key: t.clone() if isinstance(t, torch.Tensor) else t for key, t in arguments.items()}
                if mode is None:
                    found = _raised(ours, {**arguments, option: value})
                else:
                    with force_mode(mode):
                        found = _raised(ours, {**arguments, option: value})
                assert found is expected, f"{option}={value!r}"
                assert all(torch.equal(kept[key], t) for key, t in arguments.items() if isinstance(t, torch.Tensor))
    assert refused > 5


IMAGES = {
    "spatial size 0": lambda f: f.conv2d(x[:, :, :0], square, padding=2),
    "spatial size 0, width": lambda f: f.conv2d(x[..., :0], square, padding=2),
    "one image of size 0": lambda f: f.conv2d(x[0, :, :0], square, padding=2),
    "transposed, size 0": lambda f: f.conv_transpose2d(x[:, :, :0], square),
    "max pool of size 0": lambda f: f.max_pool2d(x[:, :, :0], 2, padding=1),
    "average of size 0": lambda f: f.avg_pool2d(x[:, :, :0], 2, padding=1),
    "adaptive of size 0": lambda f: f.adaptive_avg_pool2d(x[:, :, :0], 2),
    "average of rank 2": lambda f: f.avg_pool2d(x[0, 0], 2),
    "average of rank 1": lambda f: f.avg_pool2d(four, 2),
    "average of rank 5": lambda f: f.avg_pool2d(x[None], 2),
    "adaptive of rank 2": lambda f: f.adaptive_avg_pool2d(x[0, 0], 2),
    "adaptive of rank 2, a pair": lambda f: f.adaptive_avg_pool2d(x[0, 0], (2, None)),
    "max pool of rank 2": lambda f: f.max_pool2d(x[0, 0], 2),
    "1-D, transposed, size 0": lambda f: f.conv_transpose1d(s[:, :, :0], t[:4]),
    "1-D, transposed, channels": lambda f: f.conv_transpose1d(s, t),
    "1-D, transposed, output padding": lambda f: f.conv_transpose1d(s, t[:4], output_padding=1),
    "1-D, max pool of size 0": lambda f: f.max_pool1d(s[:, :, :0], 2, padding=1),
    "1-D, max pool, too small": lambda f: f.max_pool1d(s, 9),
    "1-D, max pool, padding": lambda f: f.max_pool1d(s, 2, padding=2),
    "1-D, average of size 0": lambda f: f.avg_pool1d(s[:, :, :0], 2, padding=1),
    "1-D, adaptive of size 0": lambda f: f.adaptive_avg_pool1d(s[:, :, :0], 2),
    "1-D, average of rank 1": lambda f: f.avg_pool1d(four, 2),
    "1-D, average of rank 4": lambda f: f.avg_pool1d(x, 2),
    "1-D, adaptive of rank 1": lambda f: f.adaptive_avg_pool1d(four, 2),
    "1-D, adaptive of rank 4": lambda f: f.adaptive_avg_pool1d(x, 2),
    "1-D, adaptive maximum of size 0": lambda f: f.adaptive_max_pool1d(s[:, :, :0], 2),
    "1-D, adaptive maximum without channels": lambda f: f.adaptive_max_pool1d(s[:, :0], 2),
    "1-D, adaptive maximum of rank 1": lambda f: f.adaptive_max_pool1d(four, 2),
    "1-D, adaptive maximum of rank 4": lambda f: f.adaptive_max_pool1d(x, 2),
    "1-D, adaptive maximum, negative": lambda f: f.adaptive_max_pool1d(s, -2),
    "1-D, max pool of rank 1": lambda f: f.max_pool1d(four, 2),
    "1-D, max pool of rank 4": lambda f: f.max_pool1d(x, 2),
    "1-D, max pool of rank 1, indices": lambda f: f.max_pool1d(four, 2, return_indices=True),
    "integers, conv1d": lambda f: f.conv1d(s.int(), t),
    "integers, max_pool1d": lambda f: f.max_pool1d(s.int(), 2),
    "integers, average 1-D": lambda f: f.avg_pool1d(s.int(), 2),
    "batch norm of rank 1": lambda f: f.batch_norm(four[:3], None, None, training=True),
    "batch norm of rank 1, statistics": lambda f: f.batch_norm(four, four, four),
    "batch norm of one number": lambda f: f.batch_norm(four[0], four[:1], four[:1]),
    "integers, conv": lambda f: f.conv2d(x.int(), square),
    "integers, average": lambda f: f.avg_pool2d(x.int(), 2),
    "integers, gelu": lambda f: f.gelu(x.int()),
    "integers, batch_norm": lambda f: f.batch_norm(x.int(), four, four),
    "sparse, max_pool2d": lambda f: f.max_pool2d(x.to_sparse(), 2),
    "sparse, silu": lambda f: f.silu(x.to_sparse()),
    "sparse, batch_norm": lambda f: f.batch_norm(x.to_sparse(), four, four),
    "one value a channel": lambda f: f.batch_norm(x[:1, :, :1, :1], None, None, training=True),
    "statistics of another length": lambda f: f.batch_norm(x, four[:3], four[:3]),
    "one statistic": lambda f: f.batch_norm(x, four, None),
    "eps below 0": lambda f: f.batch_norm(x, four, four, eps=-1e-5),
    "eps below 0 in training": lambda f: f.batch_norm(x, four.clone(), four.clone(), training=True, eps=-1e-5),
    "eps 0 in training": lambda f: f.batch_norm(x, None, None, training=True, eps=0.0),
    "gelu's other form": lambda f: f.gelu(x, approximate="erf"),
}
MODULES = {
    "batch norm, eps below 0": lambda nn: nn.BatchNorm2d(4, eps=-1.0).to(DEVICE).eval()(x),
    "batch norm, eps below 0 in training": lambda nn: nn.BatchNorm2d(4, eps=-1.0).to(DEVICE)(x),
    "batch norm of rank 3": lambda nn: nn.BatchNorm2d(4).to(DEVICE)(x[0]),
    "rows of rank 4": lambda nn: nn.BatchNorm1d(4).to(DEVICE)(x),
    "channels": lambda nn: nn.BatchNorm2d(3).to(DEVICE)(x),
    "convolution of size 0": lambda nn: nn.Conv2d(4, 2, 3, padding=2).to(DEVICE)(x[:, :, :0]),
    "convolution, channels": lambda nn: nn.Conv2d(3, 2, 3).to(DEVICE)(x),
    "transposed, output size": lambda nn: nn.ConvTranspose2d(4, 2, 3).to(DEVICE)(x, [50, 50]),
    "convolution 1-D, channels": lambda nn: nn.Conv1d(3, 2, 3).to(DEVICE)(s),
    "transposed 1-D, output size": lambda nn: nn.ConvTranspose1d(4, 2, 3).to(DEVICE)(s, [50]),
    "linear, features": lambda nn: nn.Linear(3, 2).to(DEVICE)(x),
    "linear of None": lambda nn: nn.Linear(3, 2).to(DEVICE)(None),
    "pool": lambda nn: nn.MaxPool2d(9)(x),
    "gelu": lambda nn: nn.GELU("erf")(x),
}


@pytest.mark.parametrize("name", [*IMAGES, *MODULES])
def test_images_and_modules(name, no_launch):
    call, ours, theirs = (IMAGES[name], F, torch_F) if name in IMAGES else (MODULES[name], gpukern.nn, torch.nn)
    expected = _raised(call, {"f" if name in IMAGES else "nn": theirs})
    assert expected is not None
    for mode in (contextlib.nullcontext(), force_mode(Mode.REFERENCE)):
        with mode, pytest.raises(expected) as raised:
            call(ours)
        assert raised.type is expected
        assert len(str(raised.value)) > 20


def test_a_batch_norm_of_size_0_is_given_back(where):
    empty, numbers = torch.randn(0, device=where, requires_grad=True), torch.ones(0, device=where)
    for statistics, training in ((numbers, False), (numbers, True), (None, False)):
        y = F.batch_norm(empty, statistics, statistics, training=training)
        assert y.shape == (0,) and torch.autograd.grad(y.sum(), empty)[0].shape == (0,)


# ---- sums of nothing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sums_of_nothing_are_what_is_added_to_them(dtype, where):
    """A layer without input features gives its bias, through its activation; so do their gradients."""

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(where, dtype).requires_grad_()

    bias, residual = made(4), made(2, 4, 3, 3)
    plain = bias.expand(2, 3, 3, 4).movedim(-1, 1)
    cases = (
        ((made(3, 0), made(4, 0), bias), F.linear, bias.expand(3, 4)),
        ((made(2, 3, 0), made(4, 0), bias), F.linear, bias.expand(2, 3, 4)),
        ((made(0), made(4, 0), bias), F.linear, bias),
        ((made(3, 0), made(4, 0), bias), lambda *t: F.linear(*t, activation="sigmoid"), bias.sigmoid().expand(3, 4)),
        ((made(3, 0), made(4, 0)), lambda *t: F.linear(*t, activation="sigmoid"), torch.full((3, 4), 0.5)),
        ((made(2, 0, 5, 5), made(4, 0, 3, 3), bias), F.conv2d, plain),
        (
            (made(2, 0, 5, 5), made(4, 0, 3, 3), bias, residual),
            lambda x, w, b, r: F.conv2d(x, w, b, residual=r, activation="tanh"),
            (plain.float() + residual.float()).tanh(),
        ),
    )
    for operands, function, expected in cases:
        y = function(*operands)
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(y.float().cpu(), expected.float().cpu(), rtol=tolerance, atol=tolerance)
        grads = torch.autograd.grad(y, operands, torch.ones_like(y))
        assert [g.shape for g in grads] == [t.shape for t in operands]
        if function in (F.linear, F.conv2d):
            assert torch.equal(grads[2], torch.full_like(bias, y.numel() / 4))
    for gone in ((made(0, 3), made(4, 3), bias), (made(3, 5), made(0, 5), made(0))):
        y = F.linear(*gone)
        assert all(not g.any() for g in torch.autograd.grad(y, gone, torch.ones_like(y)))
    z, total, squares = torch.ops.gpukern.conv2d_statistics(
        *(t.detach() for t in (made(2, 0, 5, 5), made(4, 0, 3, 3), bias)), [1, 1], [0] * 4, [1, 1], 1
    )
    assert torch.allclose(total, z.float().sum((0, 2, 3)), rtol=1e-3) and squares.abs().max() < 1e-3
    y = F.conv2d_batch_norm(made(2, 0, 5, 5), made(4, 0, 3, 3), bias, None, None, None, bias)
    torch.testing.assert_close(y.float(), plain.float(), rtol=1e-2, atol=5e-2)
    assert F.adaptive_avg_pool2d(made(2, 3, 0, 4), 1).isnan().all()
