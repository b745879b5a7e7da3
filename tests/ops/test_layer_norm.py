"""Layer and RMS norm: the kernels against torch in float64 on the CPU, and what torch refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as T

import gpukern
import gpukern.functional as F
from gpukern.ops import layer_norm as operation
from gpukern.ops._activation.properties import PROPERTIES
from gpukern.ops._layer_norm import planner
from tests.numerics import FP32_EPS, assert_within, rounding_bound
from tests.opinfo import check_errors, check_module, check_samples

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NORMS = pytest.mark.parametrize("centered", [True, False], ids=["layer_norm", "rms_norm"])
# (shape, normalized dimensions)
SHAPES = {
    "rows": ((9, 7), 1),
    "one row, no other dimension": ((40,), 1),
    "tokens": ((2, 5, 130), 1),
    "planes": ((2, 3, 5, 7), 2),
    "one column": ((6, 1), 1),
    "one row, several dimensions": ((2, 3, 4), 3),
    "many rows": ((301, 16), 1),
}
#: Three chunks of statistics and, as the second is, shared by programs.
LONG = (3, 9001)


@dataclass
class Call:
    """One norm, its operands leaves of a graph."""

    x: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    dims: int
    centered: bool = True
    eps: float = 1e-3
    activation: str | None = None

    @property
    def leaves(self) -> dict[str, torch.Tensor]:
        named = {name: getattr(self, name) for name in ("x", "weight", "bias", "residual")}
        return {name: t for name, t in named.items() if t is not None and t.requires_grad}

    def __call__(self) -> torch.Tensor:
        shape, epilogue = self.x.shape[-self.dims :], {"residual": self.residual, "activation": self.activation}
        if self.centered:
            return F.layer_norm(self.x, shape, self.weight, self.bias, self.eps, **epilogue)
        return F.rms_norm(self.x, shape, self.weight, self.eps, **epilogue)

    def exact(self) -> Call:
        """The same operands in float64 on the CPU."""
        names = ("x", "weight", "bias", "residual")
        given = {name: getattr(self, name) for name in names}
        made = {
            name: None if t is None else t.detach().cpu().double().clone().requires_grad_(t.requires_grad)
            for name, t in given.items()
        }
        return replace(self, **made)

    def normal(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(x̂, 1 / deviation)."""
        columns = tuple(range(-self.dims, 0))
        apart = self.x - self.x.mean(columns, keepdim=True) if self.centered else self.x
        inverse = (apart.square().mean(columns, keepdim=True) + self.eps).rsqrt()
        return apart * inverse, inverse

    def torchs(self) -> torch.Tensor:
        # Not torch's own: in float64 too it loses digits to a large mean.
        z, _ = self.normal()
        z = z if self.weight is None else z * self.weight
        z = z if self.bias is None else z + self.bias
        z = z if self.residual is None else z + self.residual
        if self.activation == "gelu_tanh":
            return T.gelu(z, approximate="tanh")
        return z if self.activation is None else getattr(T, self.activation)(z)


def make(shape, dtype: torch.dtype, device, layout: str = "contiguous", offset: float = 0.0) -> torch.Tensor:
    def random(*sizes):
        return (torch.randn(sizes) + offset).to(dtype).to(device)

    if layout == "permuted":  # images as [N, H, W, C]
        return random(shape[0], shape[-1], *shape[1:-1]).movedim(1, -1)
    if layout == "strided":
        return random(*reversed(shape), 2)[..., 1].permute(*reversed(range(len(shape))))
    if layout == "expanded":
        return random(shape[0], *(1,) * (len(shape) - 2), shape[-1]).expand(shape)
    return random(*shape)


def call(
    shape, dims, device, centered=True, *, dtype=torch.float32, parameters=torch.float32, layout="contiguous",
    offset=0.0, residual=False, **options,
) -> Call:  # fmt: skip
    columns = shape[len(shape) - dims :]
    weight = (0.5 + torch.rand(columns)) * (-1) ** torch.arange(columns[-1])
    return Call(
        make(shape, dtype, device, layout, offset).requires_grad_(),
        weight.to(parameters).to(device).requires_grad_(),
        torch.randn(columns).to(parameters).to(device).requires_grad_() if centered else None,
        make(shape, dtype, device).requires_grad_() if residual else None,
        dims,
        centered,
        **options,
    )


def check(actual: Call, grad_layout: str = "contiguous") -> None:
    """Output and gradients of ``actual`` against float64.

    With ``n`` columns, the sums over a row are random walks of fp32 roundings: 6 ε √n of what is summed (see
    tests/numerics.py), of the same size as σ, whatever the mean is, by the corrected two-pass algorithm. A few more
    roundings, 16 ε, are made on the way to one element. What an activation makes of an error is at most 1.5 times as
    large; gradients go through ∂L/∂z, or y, rounded to the dtype, and act″ is at most 1. Parameters' gradients are
    sums over rows.
    """
    exact = actual.exact()
    output, expected = actual(), exact.torchs()
    assert output.dtype is actual.x.dtype and output.is_contiguous()
    normal, inverse = (t.detach() for t in exact.normal())
    n = actual.x[0].numel() if actual.x.dim() > actual.dims else actual.x.numel()
    slack = FP32_EPS * (16 + 6 * n**0.5)
    weight = 1 if exact.weight is None else exact.weight.detach().abs()
    size = weight * (normal.abs() + 1)
    size = size + (0 if exact.bias is None else exact.bias.detach().abs())
    size = size + (0 if exact.residual is None else exact.residual.detach().abs())
    assert_within("output", output, expected, 1.5 * slack * size + rounding_bound(expected, output.dtype))

    grad = make(output.shape, output.dtype, output.device, grad_layout)
    ours, theirs = actual.leaves, exact.leaves
    results = torch.autograd.grad(output, [*ours.values()], grad)
    g = grad.cpu().double()
    wanted = torch.autograd.grad(expected, [*theirs.values()], g)
    rows, columns = tuple(range(output.dim() - actual.dims)), tuple(range(-actual.dims, 0))
    slack = 1.5 * slack * (size + 1)
    if actual.activation:
        slack = slack + 2 * torch.finfo(output.dtype).eps
    g = 1.5 * g.abs()
    count = max(1, output.numel() // n)
    over_rows = 6 * FP32_EPS * count**0.5
    mean_g, mean_gx = (
        (slack * g * weight * each).mean(columns, keepdim=True) for each in (torch.ones(()), normal.abs() + 1)
    )
    bounds = {
        "x": inverse * (slack * g * weight + mean_g + (normal.abs() + 1) * mean_gx),
        "weight": ((slack + over_rows) * g * (normal.abs() + 1)).sum(rows),
        "bias": ((slack + over_rows) * g).sum(rows),
        "residual": slack * g,
    }
    for (name, leaf), result, reference in zip(ours.items(), results, wanted, strict=True):
        assert result.dtype is leaf.dtype and result.is_contiguous()
        bound = bounds[name] + rounding_bound(reference, result.dtype)
        assert_within(f"gradient of {name}", result, reference, bound)


@NORMS
@pytest.mark.parametrize(("shape", "dims"), SHAPES.values(), ids=SHAPES)
def test_shapes_match_float64(shape, dims, centered, device):
    check(call(shape, dims, device, centered))


@NORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "strided", "expanded"])
def test_layouts_and_dtypes_match_float64(layout, dtype, centered, device):
    for parameters, grad_layout in ((torch.float32, "contiguous"), (dtype, layout)):
        options = {"dtype": dtype, "parameters": parameters, "layout": layout}
        check(call((2, 5, 8, 24), 1, device, centered, **options), grad_layout)
    check(call((2, 3, 5, 11), 1, device, centered, **options, residual=True, activation="silu"), "expanded")


@pytest.mark.parametrize("activation", PROPERTIES)
def test_epilogues_match_float64(activation, device):
    for residual in (True, False):
        check(call((5, 24), 1, device, activation=activation, residual=residual))


@NORMS
def test_long_rows_match_float64(centered, device):
    check(call(LONG, 1, device, centered, residual=True, activation="silu"))
    check(call((2, planner.LONGEST_ROW + 3), 1, device, centered, dtype=torch.float16))


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_a_mean_far_from_zero_costs_no_digits(layout, device):
    """A million deviations: the bound does not know of it, neither for rows that fit nor for long ones."""
    check(call((2, 3, 4, 40), 1, device, offset=1e6, layout=layout))
    if layout == "contiguous":
        check(call(LONG, 1, device, offset=1e5))


@NORMS
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual", "x, residual"])
def test_only_wanted_gradients_are_made(wanted, centered, device):
    one = call((5, 12), 1, device, centered, residual=True, activation="relu")
    for name, leaf in one.leaves.items():
        leaf.requires_grad_(name in wanted)
    if one.leaves:
        check(one)


@NORMS
@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_parameters_may_be_missing(missing, centered, device):
    for shape in ((5, 12), LONG):
        one = call(shape, 1, device, centered, activation="tanh")
        for name in missing:
            setattr(one, name, None)
        check(one)


@NORMS
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 4), (0,)], ids=str)
def test_empty_tensors(shape, centered, where):
    one = call(shape, 1, where, centered, residual=True) if shape[-1] else call((*shape[:-1], 1), 1, where, centered)
    if not shape[-1]:
        one = Call(torch.zeros(shape, device=where, requires_grad=True), None, None, None, 1, centered)
    output = one()
    assert output.shape == shape
    for leaf, grad in zip(one.leaves.values(), torch.autograd.grad(output.sum(), [*one.leaves.values()]), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


@NORMS
def test_nan_and_infinity_stay_in_their_row(centered, device):
    for value in (float("nan"), float("inf")):
        for shape in ((5, 12), LONG):
            one = call(shape, 1, device, centered)
            with torch.no_grad():
                one.x[1, 2] = value
            output = one()
            others = torch.arange(shape[0]) != 1
            assert output[1].isnan().any() and not output[others].isnan().any()
            (grad,) = torch.autograd.grad(output.sum(), one.x)
            assert grad[1].isnan().any() and not grad[others].isnan().any()


def test_rows_without_deviation_leave_the_bias(device):
    one = call((4, 12), 1, device, eps=1e-5)
    with torch.no_grad():
        one.x[:] = torch.tensor([1000.3, 0.0, -1e-3, 1e30], device=device)[:, None]
    torch.testing.assert_close(one(), one.bias.detach().expand(4, 12), rtol=0, atol=0)


@NORMS
def test_without_eps_rows_beyond_the_last_leave_no_nan(centered, device):
    check(call((3, 12), 1, device, centered, eps=0.0))


def test_same_bits_every_run(device):
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        for shape in ((150, 24), LONG):
            one = call(shape, 1, device, residual=True, activation="silu", dtype=torch.float16)
            results.append([output := one(), *torch.autograd.grad(output.square().sum(), [*one.leaves.values()])])
    for first, second in zip(results[:2], results[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_offsets_beyond_32_bits(device):
    """Rows that reach past 2³¹ elements, in a buffer whose untouched pages cost no memory."""
    torch.use_deterministic_algorithms(False)  # filling 4 GiB with NaN would touch them all
    apart = 2**30 + 4096
    buffer = torch.empty(2 * apart + 64, dtype=torch.float16, device=device)
    far = buffer.as_strided((3, 2, 16), (apart, 16, 1))
    near = torch.randn(3, 2, 16).half().to(device)
    far.copy_(near)
    weight = torch.randn(16, device=device, requires_grad=True)
    results = []
    for x in (near, far):
        leaf = x.detach().requires_grad_()
        output = F.layer_norm(leaf, (16,), weight)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), (leaf, weight))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_result_may_have_the_dtype_of_autocast(where):
    """Autocast has these norms computed in float32, on GPUs only: then the input is read as it is, not copied first."""
    x, weight = torch.randn(4, 24, device=where).half().requires_grad_(), torch.randn(24, device=where).bfloat16()
    norm = (24,), 1e-5, "none", 0.0, torch.float32
    output = operation.layer_norm(x, weight, None, None, *norm)
    wanted = F.layer_norm(x.float(), (24,), weight.float())
    torch.testing.assert_close(output, wanted, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (output, wanted)]
    torch.testing.assert_close(*grads, rtol=2e-3, atol=1e-5)


def test_autocast_is_followed_where_torch_has_it(monkeypatch):
    seen = []
    monkeypatch.setattr(operation, "layer_norm", None)
    monkeypatch.setattr("gpukern.functional._row_norm.apply", lambda *arguments: seen.append(arguments[-1].dtype))
    with torch._subclasses.fake_tensor.FakeTensorMode():
        before = torch.is_autocast_enabled("cuda")
        torch.set_autocast_enabled("cuda", True)
        try:
            for device, dtype in (("cuda", torch.float16), ("cuda", torch.float64), ("cpu", torch.float16)):
                F.layer_norm(torch.empty(2, 3, device=device, dtype=dtype), (3,))
        finally:
            torch.set_autocast_enabled("cuda", before)
    assert seen == [torch.float32, None, None]


# ---- as torch's ----------------------------------------------------------------------------------------------------


def test_pytorchs_samples(where):
    check_samples("nn.functional.layer_norm", F.layer_norm, device=where)
    check_samples("nn.functional.rms_norm", F.rms_norm, device=where)
    check_errors("nn.functional.rms_norm", F.rms_norm, device=where)
    check_module(gpukern.nn.LayerNorm, device=where)
    check_module(gpukern.nn.RMSNorm, device=where)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_pytorchs_samples_in_halves(dtype, device):
    check_samples("nn.functional.layer_norm", F.layer_norm, dtype, device=device)


ROW = torch.ones(2, 3, 4)
REFUSED = {
    "a number for a shape": lambda m: m.layer_norm(ROW, 4),
    "a float in a shape": lambda m: m.layer_norm(ROW, (4.0,)),
    "no dimension": lambda m: m.layer_norm(ROW, ()),
    "another size": lambda m: m.layer_norm(ROW, (5,)),
    "too many dimensions": lambda m: m.layer_norm(ROW, (1, 2, 3, 4)),
    "too many dimensions, rms": lambda m: m.rms_norm(ROW, (1, 2, 3, 4)),
    "a weight of another size": lambda m: m.layer_norm(ROW, (4,), torch.ones(5)),
    "a flat weight": lambda m: m.layer_norm(ROW, (3, 4), torch.ones(12)),
    "a bias of another size": lambda m: m.layer_norm(ROW, (4,), torch.ones(4), torch.ones(5)),
    "integers": lambda m: m.layer_norm(ROW.int(), (4,)),
    "integers, rms": lambda m: m.rms_norm(ROW.int(), (4,)),
    "no tensor": lambda m: m.layer_norm([1.0], (1,)),
    "a list for a weight": lambda m: m.rms_norm(ROW, (4,), [1.0]),
    "a word for eps": lambda m: m.layer_norm(ROW, (4,), eps="small"),
    "a double weight": lambda m: m.layer_norm(ROW, (4,), torch.ones(4).double()),
    "a half weight": lambda m: m.layer_norm(ROW, (4,), torch.ones(4).half()),
    "two dtypes": lambda m: m.layer_norm(ROW.half(), (4,), torch.ones(4), torch.ones(4).half()),
    "another half": lambda m: m.layer_norm(ROW.half(), (4,), torch.ones(4).bfloat16()),
}


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_what_torch_refuses_is_refused_alike(refused):
    with pytest.raises(Exception) as theirs:
        refused(T)
    with pytest.raises(theirs.type) as ours:
        refused(F)
    assert type(ours.value) is theirs.type


def test_epilogues_that_do_not_fit_are_refused():
    for residual in (torch.ones(2, 4), ROW.half(), torch.ones(2, 3, 4, device="meta")):
        with pytest.raises(RuntimeError, match="residual"):
            F.layer_norm(ROW, (4,), residual=residual)
    with pytest.raises(ValueError, match="unknown activation"):
        F.rms_norm(ROW, (4,), activation="cube")


def test_dtypes_that_kernels_do_not_take_are_refused(device):
    x = torch.ones(2, 4, device=device)
    for operands in ((x.double(), None), (x.half(), torch.ones(4, device=device).double())):
        with pytest.raises(NotImplementedError, match="rms_norm: gpukern's kernels take float32"):
            F.rms_norm(operands[0], (4,), operands[1])


@NORMS
def test_double_backward_and_forward_mode_match_torchs(centered, where):
    """By torch.autograd.gradcheck's means, in the kernels' dtype against torch in float64."""
    one = call((3, 7), 1, where, centered, residual=True, activation="silu")
    exact = one.exact()
    results = []
    for each, output in ((one, one()), (exact, exact.torchs())):
        leaves = [*each.leaves.values()]
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())

    names, tangents = [*one.leaves], [torch.randn_like(leaf) for leaf in one.leaves.values()]

    def value(of: Call, result):
        return lambda *leaves: result(replace(of, **dict(zip(names, leaves, strict=True))))

    _, ours = torch.func.jvp(value(one, Call.__call__), tuple(one.leaves.values()), tuple(tangents))
    doubles = tuple(t.cpu().double() for t in tangents)
    _, theirs = torch.func.jvp(value(exact, Call.torchs), tuple(exact.leaves.values()), doubles)
    torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-4, atol=1e-4)


@NORMS
def test_vmap_of_rows_and_gradients(centered, where):
    one = call((3, 2, 7), 1, where, centered)
    weight = one.weight.detach()

    def norm(x):
        return F.layer_norm(x, x.shape, weight) if centered else F.rms_norm(x, x.shape, weight)

    rows = one.x.detach()[:, 0]
    torch.testing.assert_close(torch.func.vmap(norm)(rows), norm_of(rows, weight, centered), rtol=1e-5, atol=1e-5)
    each = torch.func.vmap(torch.func.grad(lambda x: norm(x).square().sum()))(rows)
    leaf = rows.clone().requires_grad_()
    (together,) = torch.autograd.grad(norm_of(leaf, weight, centered).square().sum(), leaf)
    torch.testing.assert_close(each, together, rtol=1e-4, atol=1e-4)


def norm_of(x, weight, centered):
    return F.layer_norm(x, x.shape[-1:], weight) if centered else F.rms_norm(x, x.shape[-1:], weight)


def test_compiled_whole_with_free_sizes_matches_eager(where):
    layer = gpukern.nn.LayerNorm(12).to(where)
    compiled = torch.compile(
        lambda x: torch.relu(layer(x)) + F.rms_norm(x, x.shape[-1:]), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for rows in (3, 5):
        x = torch.randn(rows, 12, device=where, requires_grad=True)
        expected = torch.relu(layer(x)) + F.rms_norm(x, (12,))
        results = compiled(x)
        torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (results, expected)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_negated_views_are_normalized_by_their_values(where):
    z = torch.randn(3, 8, dtype=torch.complex64, device=where)
    lazy = z.conj().imag
    assert lazy.is_neg()
    torch.testing.assert_close(F.layer_norm(lazy, (8,)), F.layer_norm(lazy.resolve_neg(), (8,)), rtol=0, atol=0)


def test_eps_of_rms_norm_is_of_what_torch_computes_in(where):
    for dtype in (torch.float32, torch.float16):
        x = torch.full((1, 8), 1e-4, device=where, dtype=dtype)
        torch.testing.assert_close(F.rms_norm(x, (8,)), T.rms_norm(x, (8,)), rtol=2e-3, atol=0)


def test_layer_norm_over_channels_is_torchvisions(where):
    """Of both layouts: results are channels_last, as torchvision's and timm's are."""
    layer = gpukern.nn.LayerNorm2d(6, eps=1e-6).to(where)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 6, 4, 5, device=where).contiguous(memory_format=layout).requires_grad_()
        parameters = layer.weight, layer.bias
        theirs = T.layer_norm(x.permute(0, 2, 3, 1), (6,), *parameters, 1e-6).permute(0, 3, 1, 2)
        ours = layer(x)
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        grad = torch.randn_like(ours)
        grads = [torch.autograd.grad(y, (x, *parameters), grad, retain_graph=True) for y in (ours, theirs)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
