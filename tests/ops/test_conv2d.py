"""conv2d and its gradients, on the kernels (on a GPU or emulated), against float64."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as torch_F

import gpukern.functional as F
from gpukern.runtime.mode import Mode, force_mode
from gpukern.runtime.precision import TF32_ROUNDED, conv_precision
from tests.numerics import assert_within, sum_bound, uses_tf32
from tests.ops.conv_cases import CASES, Case, truth

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def make(case: Case, dtype: torch.dtype, device, memory_format=torch.contiguous_format) -> list[torch.Tensor]:
    """input, weight, bias: random, in ``dtype``, requiring gradients."""
    input = torch.randn(case.input).to(device, dtype).contiguous(memory_format=memory_format)
    weight = (torch.randn(case.weight) * 0.3).to(device, dtype).contiguous(memory_format=memory_format)
    return [t.requires_grad_() for t in (input, weight, torch.randn(case.outputs).to(device, dtype))]


def check(case: Case, input, weight, bias, grad, results: dict[str, torch.Tensor]) -> None:
    expected = truth(case, input, weight, bias, grad)
    tf32 = uses_tf32(input.dtype, conv_precision(input.dtype))
    for name, actual in results.items():
        value = expected.values[name]
        bound = sum_bound(value, expected.absolutes[name], expected.terms[name] + 1, input.dtype, tf32=tf32)
        assert actual.dtype == input.dtype
        assert_within(f"{case.name}: {name}", actual, value, bound)


def run_and_check(case: Case, input, weight, bias, grad=None) -> torch.Tensor:
    output = F.conv2d(input, weight, bias, **case.arguments)
    grad = torch.randn(output.shape).to(output) if grad is None else grad
    output.backward(grad)
    results = {
        "output": output,
        "input gradient": input.grad,
        "weight gradient": weight.grad,
        "bias gradient": bias.grad,
    }
    check(case, input, weight, bias, grad, results)
    return output


# Which products, and so which plans, follow the dtype; which loads follow the layout. Every pair of the two would only
# repeat these.
KINDS = (
    (torch.float32, "NCHW"),
    (torch.float32, "channels_last"),
    (torch.float16, "channels_last"),
    (torch.bfloat16, "NCHW"),
)


@pytest.mark.parametrize("dtype, layout", KINDS, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_and_gradients(case, dtype, layout, device):
    input, weight, bias = make(case, dtype, device, FORMATS[layout])
    output = run_and_check(case, input, weight, bias)
    # Layouts are torch's: the output's from input and weight, each gradient's from its tensor.
    if output.numel():
        assert output.stride() == strides_of_torchs(case, input, weight)
        assert (input.grad.stride(), weight.grad.stride()) == (input.stride(), weight.stride())


def strides_of_torchs(case: Case, input: torch.Tensor, weight: torch.Tensor) -> tuple[int, ...]:
    """Of what torch makes of tensors that lie like these, asked on the CPU: the rule is the same on a GPU, where every
    process that asks would load cuDNN. The meta device has another, and gives NCHW."""
    with torch.no_grad():
        return torch_F.conv2d(input.cpu(), weight.cpu(), **case.arguments).stride()


SMALL = Case("small", (2, 8, 6, 5), 12, (3, 3), padding=1)


def views(device) -> dict[str, torch.Tensor]:
    """Inputs of SMALL's shape that are laid out oddly."""
    return {
        "every second column": torch.randn(2, 8, 6, 10, device=device)[:, :, :, ::2],
        "cropped channels_last": torch.randn(2, 9, 8, 12, device=device).permute(0, 3, 1, 2)[:, 2:10, 1:7, :5],
        "expanded batch": torch.randn(1, 8, 6, 5, device=device).expand(2, 8, 6, 5),
        "expanded channels": torch.randn(2, 1, 6, 5, device=device).expand(2, 8, 6, 5),
        "expanded scalar": torch.randn(1, device=device).expand(2, 8, 6, 5),
        "transposed": torch.randn(5, 6, 8, 2, device=device).permute(3, 2, 1, 0),
        "batch innermost": torch.randn(8, 6, 5, 2, device=device).permute(3, 0, 1, 2),
    }


@pytest.mark.parametrize("name", views("cpu"))
def test_any_strides(name, device):
    view = views(device)[name]
    _, weight, bias = make(SMALL, torch.float32, device)
    base = view.detach()
    output = F.conv2d(base, weight, bias, **SMALL.arguments)
    grad = torch.randn_like(output)
    output.backward(grad)
    results = {"output": output, "weight gradient": weight.grad}
    check(SMALL, base, weight, bias, grad, results)


@pytest.mark.parametrize("layout", ["every second", "transposed", "expanded"])
def test_any_weight_strides(layout, device):
    input, weight, bias = make(SMALL, torch.float32, device)
    weight = {
        "every second": lambda: torch.randn(24, 8, 3, 6, device=device)[::2, :, :, ::2],
        "transposed": lambda: torch.randn(3, 3, 8, 12, device=device).permute(3, 2, 1, 0),
        "expanded": lambda: torch.randn(12, 1, 1, 3, device=device).expand(12, 8, 3, 3),
    }[layout]()
    output = F.conv2d(input, weight, bias, **SMALL.arguments)
    grad = torch.randn_like(output)
    output.backward(grad)
    check(SMALL, input, weight, bias, grad, {"output": output, "input gradient": input.grad})


@pytest.mark.parametrize("layout", ["every second", "expanded"])
def test_any_bias_strides(layout, device):
    input, weight, _ = make(SMALL, torch.float32, device)
    bias = torch.randn(24, device=device)[::2] if layout == "every second" else torch.randn(1, device=device).expand(12)
    leaf = bias.detach().requires_grad_()
    output = F.conv2d(input, weight, leaf, **SMALL.arguments)
    grad = torch.randn_like(output)
    output.backward(grad)
    check(SMALL, input, weight, bias, grad, {"output": output, "bias gradient": leaf.grad})


@pytest.mark.parametrize("kind", ["expanded", "transposed"])
def test_any_gradient_strides(kind, device):
    input, weight, bias = make(SMALL, torch.float32, device)
    grad = {
        "expanded": lambda: torch.ones(1, device=device).expand(2, 12, 6, 5),
        "transposed": lambda: torch.randn(5, 6, 12, 2, device=device).permute(3, 2, 1, 0),
    }[kind]()
    run_and_check(SMALL, input, weight, bias, grad)


def test_unbatched(device):
    input, weight, bias = make(SMALL, torch.float32, device)
    one = F.conv2d(input[0], weight, bias, **SMALL.arguments)
    assert one.shape == (12, 6, 5)
    # The same sums in another tile: equal to rounding, and the shape's own test covers the value.
    torch.testing.assert_close(one, F.conv2d(input, weight, bias, **SMALL.arguments)[0], rtol=1e-4, atol=1e-5)


def test_no_bias_and_only_what_is_asked(device):
    for needs in ((True, False, False), (False, True, False), (False, False, True), (True, True, True)):
        tensors = [t.detach().requires_grad_(n) for t, n in zip(make(SMALL, torch.float32, device), needs, strict=True)]
        F.conv2d(*tensors, **SMALL.arguments).sum().backward()
        assert [t.grad is not None for t in tensors] == list(needs)
    input, weight, _ = make(SMALL, torch.float32, device)
    assert F.conv2d(input, weight).grad_fn is not None
    with torch.no_grad():
        assert F.conv2d(input, weight).grad_fn is None


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_epilogue(activation, dtype, device):
    """The activation is applied to the fp32 sum: one rounding, and a slope of at most 1 does not grow the error."""
    input, weight, bias = make(SMALL, dtype, device, torch.channels_last)
    output = F.conv2d(input, weight, bias, **SMALL.arguments, activation=activation, negative_slope=0.1)
    grad = torch.randn_like(output)
    output.backward(grad)
    expected = truth(SMALL, input, weight, bias, grad)
    act = {
        "relu": torch.relu,
        "leaky_relu": lambda x: torch_F.leaky_relu(x, 0.1),
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
    }[activation]
    value = act(expected.values["output"])
    tf32 = uses_tf32(dtype, conv_precision(dtype))
    bound = sum_bound(value, expected.absolutes["output"], 73, dtype, tf32=tf32)
    assert_within(activation, output, value, bound)
    # The gradients are those of the plain convolution for ∂L/∂y · act′(y), as activation_grad makes it (tested alone).
    from gpukern.ops.activation import activation_grad

    inner = activation_grad(grad, output.detach(), activation, 0.1)
    results = {"input gradient": input.grad, "weight gradient": weight.grad, "bias gradient": bias.grad}
    check(SMALL, input, weight, bias, inner, results)


def test_nan_and_infinity_come_through(device):
    input = torch.zeros(1, 4, 5, 5, device=device)
    input[0, 0, 2, 2], input[0, 0, 0, 0] = float("nan"), float("inf")
    weight = torch.ones(2, 4, 3, 3, device=device)
    output = F.conv2d(input, weight, padding=1, activation="relu").cpu()
    expected = torch_F.conv2d(input.cpu(), weight.cpu(), padding=1).relu()
    assert torch.equal(output.isnan(), expected.isnan()) and torch.equal(output.isinf(), expected.isinf())


def test_offsets_beyond_32_bits(device):
    """Images that reach past 2³¹ elements, each stride below it, in a buffer whose untouched pages cost no memory."""
    torch.use_deterministic_algorithms(False)  # filling 4 GiB with NaN would touch them all
    apart = 2**30 + 4096
    buffer = torch.empty(2 * apart + 16 * 36, dtype=torch.float16, device=device)
    far = buffer.as_strided((3, 16, 6, 6), (apart, 1, 96, 16))
    near = torch.randn(3, 16, 6, 6).half().to(device)
    far.copy_(near)
    weight = torch.randn(16, 16, 3, 3).half().to(device).contiguous(memory_format=torch.channels_last)
    near = near.contiguous(memory_format=torch.channels_last)
    results = []
    for input in (far, near):
        leaf = weight.detach().requires_grad_()
        output = F.conv2d(input, leaf, padding=1)
        output.backward(torch.ones_like(output))
        results.append((output, leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_same_bits_every_run(device):
    case = Case("split sum", (4, 16, 12, 12), 16, (3, 3), padding=1)
    grads = []
    for _ in range(2):
        torch.manual_seed(0)
        input, weight, bias = make(case, torch.float16, device)
        F.conv2d(input, weight, bias, **case.arguments).sum().backward()
        grads.append((input.grad, weight.grad, bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_gradients_of_gradients(device):
    """The kernels' second derivatives against float64 autograd, for a scalar that needs them all."""

    def second(conv, tensors):
        output = conv(*tensors, stride=2, padding=1, groups=2)
        first = torch.autograd.grad((output**2).sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), tensors)

    case = Case("double", (2, 8, 7, 6), 6, (3, 3), groups=2)
    tensors = make(case, torch.float32, device)
    actual = second(F.conv2d, tensors)
    expected = second(torch_F.conv2d, [t.detach().double().cpu().requires_grad_() for t in tensors])
    for got, want in zip(actual, expected, strict=True):
        # Four chained sums of at most 72 terms: relative Frobenius error of 4 · 6 · ε · √72, or TF32's in place of ε.
        eps = TF32_ROUNDED if uses_tf32(torch.float32, conv_precision(torch.float32)) else 2.0**-23
        assert (got.double().cpu() - want).norm() <= 4 * 6 * eps * 72**0.5 * want.norm()


def test_reference_gradcheck():
    with force_mode(Mode.REFERENCE):
        for arguments in (
            {"stride": (2, 1), "padding": 1, "groups": 2, "activation": "tanh"},
            {"padding": "same", "dilation": 3, "groups": 2, "activation": "sigmoid"},
        ):
            tensors = [torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((2, 4, 5, 6), (6, 2, 2, 2), 6)]

            def conv(*tensors, arguments=arguments):
                return F.conv2d(*tensors, **arguments)

            assert torch.autograd.gradcheck(conv, tensors)
            assert torch.autograd.gradgradcheck(conv, tensors)


@st.composite
def geometries(draw) -> Case:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    extents = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [max(1, e - 2 * p) + draw(st.integers(0, 5)) for e, p in zip(extents, padding, strict=True)]
    channels = groups * draw(st.sampled_from([1, 2, 3, 8, 17]))
    return Case(
        "drawn",
        (draw(st.integers(1, 3)), channels, *size),
        groups * draw(st.sampled_from([1, 2, 5, 8, 20])),
        kernel,
        draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        padding,
        dilation,
        groups,
    )


@hypothesis.given(geometries(), st.sampled_from(DTYPES), st.sampled_from(sorted(FORMATS)))
@hypothesis.settings(suppress_health_check=list(hypothesis.HealthCheck))
def test_any_geometry(device, case, dtype, layout):
    run_and_check(case, *make(case, dtype, device, FORMATS[layout]))
