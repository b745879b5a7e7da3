"""Convolutions and pools of sequences, which run as images of height 1: results, gradients, strides, derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as TF

import gpukern
import gpukern.functional as F
from gpukern.conv import observe
from gpukern.ops._activation.reference import activation as reference_activation
from gpukern.runtime.mode import Mode, force_mode
from tests.numerics import assert_within, sum_bound, uses_tf32

pytestmark = pytest.mark.usefixtures("poisoned")

#: function, input, weight, arguments
CASES = {
    "dense": ("conv1d", (2, 16, 19), (24, 16, 5), {"padding": 2}),
    "stride, dilation, groups": ("conv1d", (2, 12, 23), (18, 4, 3), {"stride": 2, "dilation": 3, "groups": 3}),
    "same": ("conv1d", (1, 8, 9), (8, 8, 4), {"padding": "same"}),
    "depthwise": ("conv1d", (2, 6, 32), (6, 1, 4), {"padding": 3, "groups": 6}),
    "depthwise, stride 2": ("conv1d", (2, 6, 13), (12, 1, 3), {"stride": 2, "groups": 6}),
    "transposed": ("conv_transpose1d", (2, 16, 7), (16, 12, 4), {"stride": 2, "padding": 1, "output_padding": 1}),
    "transposed, dilated": ("conv_transpose1d", (1, 8, 5), (8, 4, 2), {"dilation": 3, "output_padding": 2}),
    "transposed, depthwise": ("conv_transpose1d", (2, 6, 16), (6, 1, 4), {"groups": 6}),
}  # fmt: skip


def in_runs(tensor: torch.Tensor) -> torch.Tensor:
    """Of the same values, with adjacent channels."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def tensors(name: str, dtype: torch.dtype, device, last: bool = False) -> list[torch.Tensor]:
    """x, w, b and dy; x and dy in runs of channels if ``last``."""
    function, shape, weight, arguments = CASES[name]
    x, w = (torch.randn(size).to(device, dtype) for size in (shape, weight))
    y = getattr(TF, function)(x.cpu().double(), w.cpu().double(), **arguments)
    b, dy = torch.randn(y.shape[1]).to(x), torch.randn_like(y).to(x)
    return [in_runs(x) if last else x, w, b, in_runs(dy) if last else dy]


@pytest.mark.parametrize(
    "dtype, last", [(torch.float32, False), (torch.float16, False), (torch.bfloat16, True)], ids=str
)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")
def test_against_float64(name, dtype, last, device):
    function, _, _, arguments = CASES[name]
    made = tensors(name, dtype, device, last)
    leaves = [t.detach().requires_grad_() for t in made[:3]]
    y = getattr(F, function)(*leaves, **arguments)
    y.backward(made[3])

    def truth(x, w, b, dy):
        operands = [t.double().cpu().requires_grad_() for t in (x, w, b)]
        y = getattr(TF, function)(*operands, **arguments)
        y.backward(dy.double().cpu())
        return [y.detach(), *(t.grad for t in operands)]

    values, absolutes = truth(*made), truth(*(t.abs() for t in made))
    terms = made[1].numel() + made[3].numel()  # more than any sum has
    tf32 = uses_tf32(dtype, "tf32")
    found = [y.detach(), *(leaf.grad for leaf in leaves)]
    for what, actual, value, absolute in zip(("y", "dx", "dw", "db"), found, values, absolutes, strict=True):
        assert_within(f"{name}, {what}", actual, value, sum_bound(value, absolute, terms, dtype, tf32=tf32))


@pytest.mark.parametrize("weight_last", [False, True])
@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("name", ["dense", "depthwise", "transposed"])
def test_strides_are_torchs(name, x_last, weight_last, where):
    """The result and its gradients are in the layout of the weight, whatever that of the input."""
    function, _, _, arguments = CASES[name]
    x, w, _, dy = tensors(name, torch.float32, where, x_last)
    w = in_runs(w) if weight_last else w
    ours, theirs = (
        (y := getattr(module, function)(x.requires_grad_(), w.requires_grad_(), **arguments),
         *torch.autograd.grad(y, (x, w), dy.contiguous()))
        for module in (F, TF)
    )  # fmt: skip
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
        assert a.stride() == b.stride()


def test_a_transpose_is_read_as_it_is(device):
    """No copy: the engine gets the strides of [N, L, C]."""
    x, w, _, _ = tensors("depthwise", torch.float16, device, last=True)
    seen = []
    with observe(lambda call, _: seen.append(call)):
        F.conv1d(x, w, padding=3, groups=6)
    assert [call.first[1] for call in seen] == [1]


@pytest.mark.parametrize("name", ["dense", "transposed"])
def test_a_result_may_be_changed_in_place(name, where):
    function, _, _, arguments = CASES[name]
    x, w, b, dy = tensors(name, torch.float32, where)
    leaf = w.detach().requires_grad_()
    y = getattr(F, function)(x, leaf, b, **arguments)
    torch.relu_(y).backward(dy)
    (expected,) = torch.autograd.grad(torch.relu(getattr(F, function)(x, leaf, b, **arguments)), leaf, dy)
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("act", ["silu", "relu"])
def test_causal_padding_and_epilogue(act, where):
    """Outputs depend on nothing later; bias, residual and activation in the same pass, in training too."""
    x, w, b, residual = (torch.randn(s, device=where, requires_grad=True) for s in ((2, 4, 9), (4, 1, 3), 4, (2, 4, 9)))
    arguments = {"padding": "causal", "dilation": 2, "groups": 4, "activation": act}
    y = F.conv1d(x, w, b, residual=residual, **arguments)
    inner = TF.conv1d(TF.pad(x, (4, 0)), w, b, dilation=2, groups=4) + residual
    expected = reference_activation(inner, act, 0.0)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(each.square().sum(), (x, w, b, residual)) for each in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(F.conv1d(x, w, b, residual=residual, **arguments), y, rtol=1e-6, atol=1e-6)
        cut = F.conv1d(x[:, :, :5], w, b, residual=residual[:, :, :5], **arguments)
        torch.testing.assert_close(cut, y[:, :, :5])
    with pytest.raises(RuntimeError, match=r"output's shape \[2, 4, 9\]"):
        F.conv1d(x, w, residual=residual[:1], **arguments)


def test_derivatives_of_any_order():
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 4, 7), (6, 2, 3), (6,)))
    back = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    functions = (
        (lambda x, w, b: F.conv1d(x, w, b, 2, 1, groups=2, activation="tanh"), (x, w, b)),
        (lambda x, w, b: F.conv1d(x, w, b, padding="causal", groups=2, activation="silu"), (x, w, b)),
        (lambda x, w: F.conv_transpose1d(x, w, None, 2, 1, 1, 2), (x, back)),
        (lambda x: F.max_pool1d(x, 3, 2, 1), (x,)),
        (lambda x: F.avg_pool1d(x, 3, 2, 1), (x,)),
        (lambda x: F.adaptive_avg_pool1d(x, 3), (x,)),
        (lambda x: F.adaptive_max_pool1d(x, 3), (x,)),
    )
    with force_mode(Mode.REFERENCE):
        for function, operands in functions:
            assert torch.autograd.gradcheck(function, operands, check_forward_ad=True, fast_mode=True)
            assert torch.autograd.gradgradcheck(function, operands, fast_mode=True)


def test_transforms_and_lazy_tensors(where):
    x, w = torch.randn(3, 2, 4, 8, device=where), torch.randn(4, 1, 3, device=where)
    mapped = torch.func.vmap(lambda x: F.conv1d(x, w, groups=4))(x)
    torch.testing.assert_close(mapped.flatten(0, 1), F.conv1d(x.flatten(0, 1), w, groups=4))
    gradient = torch.func.grad(lambda w: F.conv1d(x[0], w, groups=4).square().sum())
    expected = torch.func.grad(lambda w: TF.conv1d(x[0], w, groups=4).square().sum())
    torch.testing.assert_close(gradient(w), expected(w), rtol=1e-4, atol=1e-4)
    negated = torch.conj(torch.randn(2, 4, 8, device=where) * 1j).imag
    assert negated.is_neg()
    for ours, theirs in ((F.conv1d, TF.conv1d),):
        torch.testing.assert_close(ours(negated, w, groups=4), theirs(negated, w, groups=4), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(F.max_pool1d(negated, 2), TF.max_pool1d(negated, 2))


def test_adaptive_pools_of_nothing(where):
    for shape in ((2, 3, 0), (3, 0)):
        assert F.adaptive_avg_pool1d(torch.ones(shape, device=where), 1).isnan().all()
    values, indices = F.adaptive_max_pool1d(torch.ones(0, 4, device=where), 2, return_indices=True)
    assert values.shape == indices.shape == (0, 2)


def test_pools_of_single_sequences_and_indices(where):
    x = in_runs(torch.randn(2, 3, 11)).to(where)
    x[0, 1, 4] = float("nan")
    for arguments in ({"stride": 2, "padding": 1}, {"dilation": 3, "ceil_mode": True}):
        for each in (x, x[1]):
            ours, theirs = (f(each, 3, **arguments, return_indices=True) for f in (F.max_pool1d, TF.max_pool1d))
            torch.testing.assert_close(ours, theirs, equal_nan=True)
    for size in (1, 4, 11, 13):
        ours, theirs = (f(x, size, return_indices=True) for f in (F.adaptive_max_pool1d, TF.adaptive_max_pool1d))
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        torch.testing.assert_close(F.adaptive_avg_pool1d(x[1], (size,)), TF.adaptive_avg_pool1d(x[1], size))
    assert F.avg_pool1d(x, 2).stride() == TF.avg_pool1d(x, 2).stride()
    assert F.conv1d(x[:0], torch.randn(2, 3, 3, device=where)).shape == (0, 2, 9)


def test_a_network_is_converted_fused_and_exported(device):
    """Every layer is gpukern's, batch norms fold, pools are lowered, and an exported graph has torch's names."""
    network = torch.nn.Sequential(
        torch.nn.Conv1d(3, 8, 5, stride=2, padding=2, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU(),
        torch.nn.MaxPool1d(3, 2, 1), torch.nn.Conv1d(8, 8, 3, padding="same", groups=8), torch.nn.SiLU(),
        torch.nn.AvgPool1d(2), torch.nn.ConvTranspose1d(8, 4, 3, stride=2), torch.nn.AdaptiveAvgPool1d(2),
    ).to(device)  # fmt: skip
    x = torch.randn(2, 3, 40, device=device)
    network(x)
    network.eval()
    expected = network(x)
    converted, report = gpukern.convert(network, return_report=True)
    assert not report.left and len(report.replaced) == 9
    torch.testing.assert_close(converted(x), expected, rtol=1e-2, atol=1e-2)
    fused = gpukern.fuse(converted, (x,))
    assert [group.pattern for group in fused.report.fused] == ["conv1d + batch_norm + relu", "conv1d + silu"]
    torch.testing.assert_close(fused(x), expected, rtol=1e-2, atol=1e-2)
    fused = gpukern.fuse(
        torch.nn.Sequential(network[3], network[6], network[8]).eval(), (torch.randn(2, 4, 40, device=device),)
    )
    left = [node.target for part in fused.modules() if hasattr(part, "graph") for node in part.graph.nodes]
    assert not [target for target in left if "pool" in str(target) and "aten" in str(target)]
    program = torch.export.export(converted, (x,))
    names = [str(node.target) for node in program.graph.nodes if "gpukern" in str(node.target)]
    assert names[0] == "gpukern.conv1d.default" and "gpukern.conv_transpose1d.default" in names


def test_one_compiled_graph_serves_sequences_of_any_length(where):
    w, back = torch.randn(4, 1, 3, device=where, requires_grad=True), torch.randn(4, 2, 2, device=where)

    def network(x):
        y = F.conv1d(x, w, padding="causal", groups=4, activation="silu")
        y = F.conv_transpose1d(F.avg_pool1d(F.max_pool1d(y, 3, 2, 1), 2, 1), back, stride=2)
        return F.adaptive_avg_pool1d(y, 5) + F.adaptive_max_pool1d(y, 5)

    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (16, 23):
        x = torch.randn(2, 4, length, device=where)
        results = [(y, *torch.autograd.grad(y.sum(), w)) for y in (compiled(x), network(x))]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
