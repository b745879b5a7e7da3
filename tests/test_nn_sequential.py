"""``gpukern.nn.Sequential``: what runs together, and that it computes what ``torch.nn.Sequential`` does."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import gpukern
import gpukern.nn as ours
from gpukern.runtime.mode import Mode, force_mode
from gpukern.runtime.precision import TF32_ROUNDED, conv_precision
from tests.numerics import FP32_EPS, uses_tf32

pytestmark = pytest.mark.usefixtures("poisoned")


def untracked() -> nn.Module:
    norm = ours.BatchNorm2d(6)
    norm.track_running_stats = False
    return norm


IMAGES, ROWS = (3, 4, 7, 6), (9, 6)
#: Layers, the shape of their input, and the places of those that a call in training, and in evaluation, calls alone.
CASES: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...], list[int], list[int]]] = {
    "conv, norm, act": (
        lambda: [ours.Conv2d(4, 6, 3, bias=False), ours.BatchNorm2d(6), ours.ReLU(inplace=True)],
        IMAGES, [], [0],
    ),
    "conv, norm": (lambda: [ours.Conv2d(4, 6, 3, padding=1, groups=2), ours.BatchNorm2d(6)], IMAGES, [], [0, 1]),
    "conv, norm with act": (
        lambda: [ours.Conv2d(4, 6, 3), ours.BatchNormAct2d(6, activation="leaky_relu", negative_slope=0.3)],
        IMAGES, [], [0, 1],
    ),
    "conv, norm with act, act": (
        lambda: [ours.Conv2d(4, 6, 1), ours.BatchNormAct2d(6, activation="silu"), ours.Tanh()], IMAGES, [2], [0, 1, 2],
    ),
    "conv, act": (lambda: [ours.Conv2d(4, 6, 3, stride=2), ours.LeakyReLU(0.2)], IMAGES, [], []),
    "conv with a mirrored border, norm, act": (
        lambda: [ours.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), ours.BatchNorm2d(6), ours.Sigmoid()],
        IMAGES, [], [0],
    ),
    "transposed conv, act": (lambda: [ours.ConvTranspose2d(4, 3, 2, 2), ours.Hardswish()], IMAGES, [], []),
    "linear, act, norm, act": (
        lambda: [ours.Linear(6, 8), ours.GELU("tanh"), ours.BatchNorm1d(8), ours.SiLU(inplace=True)], ROWS, [], [],
    ),
    "norm, act, conv": (
        lambda: [ours.BatchNorm2d(4), ours.GELU(), ours.Conv2d(4, 2, 3)], IMAGES, [2], [2],
    ),
    "group norm, act, instance norm, act": (
        lambda: [ours.GroupNorm(2, 4), ours.SiLU(), ours.InstanceNorm2d(4, affine=True), ours.LeakyReLU(0.3)],
        IMAGES, [], [],
    ),
    "two runs around a pool": (
        lambda: [
            ours.Conv2d(4, 6, 3), ours.BatchNorm2d(6), ours.Tanh(), ours.AvgPool2d(2), nn.Flatten(),
            ours.Linear(24, 5), ours.Sigmoid(),
        ],
        IMAGES, [3, 4], [0, 3, 4],
    ),
    "norm without running statistics": (
        lambda: [ours.Conv2d(4, 6, 3), ours.BatchNorm2d(6, track_running_stats=False), ours.Tanh()], IMAGES, [], [0],
    ),
    "norm whose running statistics are no longer tracked": (
        lambda: [ours.Conv2d(4, 6, 3), untracked(), ours.Tanh()], IMAGES, [], [0],
    ),
    "norm that averages over all batches": (
        lambda: [ours.Conv2d(4, 6, 3), ours.BatchNorm2d(6, momentum=None, affine=False), ours.Hardsigmoid()],
        IMAGES, [], [0],
    ),
    "frozen norm": (lambda: [ours.Conv2d(4, 6, 3), ours.BatchNorm2d(6).eval(), ours.ReLU6()], IMAGES, [0], [0]),
    "other order": (lambda: [ours.ReLU(), ours.BatchNorm2d(4), ours.Conv2d(4, 6, 3)], IMAGES, [0, 1, 2], [0, 1, 2]),
    "norm that is too far": (
        lambda: [ours.Conv2d(4, 6, 3, bias=False), nn.Identity(), ours.BatchNorm2d(6)], IMAGES, [0, 1, 2], [0, 1, 2],
    ),
    "nothing": (lambda: [], IMAGES, [], []),
}  # fmt: skip
#: The longest sum of products, and of values of a channel, above.
TERMS, PIXELS = 4 * 9, 3 * 7 * 6


def make(case: str, where, dtype=torch.float32) -> tuple[ours.Sequential, nn.Sequential, torch.Tensor]:
    """gpukern's, torch's in float64 on the CPU with the same numbers, and an input."""
    layers, shape, _, _ = CASES[case]
    model = ours.Sequential(*layers())
    for module in model:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 1.5)
        else:
            module.to(dtype)
    for layer, norm in itertools.pairwise(model):
        if isinstance(norm, nn.BatchNorm2d) and isinstance(layer, nn.Conv2d) and layer.bias is not None:
            layer.bias.requires_grad_(False)  # in training its gradient is zero, and what is computed is noise
    model.to(where)
    return model, exact(model), torch.randn(shape).to(dtype).to(where)


def exact(model: ours.Sequential) -> nn.Sequential:
    def plain(layer: nn.Module) -> nn.Module:
        if isinstance(layer, ours.BatchNormAct2d):
            act = {"leaky_relu": nn.LeakyReLU(0.3), "silu": nn.SiLU()}[layer.activation]
            layer.__class__ = nn.BatchNorm2d
            return nn.Sequential(layer, act)
        layer.__class__ = getattr(nn, type(layer).__name__)
        return layer

    copied = copy.deepcopy(model).cpu().double()
    return nn.Sequential(*(plain(layer) for layer in copied))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def assert_close(actual, expected, eps: float) -> None:
    """In the Frobenius norm, of sums of random walks: see tests/numerics.py."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        b = b.double()
        error = (a.detach().double().cpu() - b).norm()
        assert error <= eps * b.norm(), f"{i}: relative error {error / b.norm():.3g} of {eps:.3g}"


def called_alone(model: nn.Sequential, x: torch.Tensor, monkeypatch) -> list[int]:
    """The places of the children that a call of ``model`` calls."""
    called = []
    call = nn.Module.__call__
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "__call__", lambda self, *inputs: (called.append(self), call(self, *inputs))[1])
        call(model, x)
    places = {id(child): place for place, child in enumerate(model)}
    return [places[id(module)] for module in called if id(module) in places]


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_gradients_and_statistics(case, dtype, device):
    model, reference, x = make(case, device, dtype)
    # Two layers with sums of each kind, through which errors grow by their condition, and roundings of what is between.
    eps = 4 * 6 * FP32_EPS * (TERMS**0.5 + PIXELS**0.5) + 8 * torch.finfo(dtype).eps
    if uses_tf32(dtype, conv_precision(dtype)):
        eps += 4 * TF32_ROUNDED
    for _ in range(2):
        x.requires_grad_()
        leaf = x.detach().cpu().double().requires_grad_()
        output, expected = model(x), reference(leaf)
        assert output.dtype is dtype
        assert_close([output], [expected], eps)
        grad = torch.randn_like(output)
        wanted = torch.autograd.grad(expected, [leaf, *trained(reference)], grad.cpu().double())
        assert_close(torch.autograd.grad(output, [x, *trained(model)], grad), wanted, 4 * eps)
        assert_close(model.buffers(), reference.buffers(), eps)
        x = torch.randn_like(x)
    assert_close([model.eval()(x)], [reference.eval()(x.cpu().double())], eps)


@pytest.mark.parametrize("case", CASES)
def test_what_runs_together(case, where, monkeypatch):
    model, _, x = make(case, where)
    _, _, training, evaluation = CASES[case]
    assert called_alone(model, x, monkeypatch) == training
    assert called_alone(model.eval(), x, monkeypatch) == evaluation


@pytest.mark.parametrize("act", [ours.SiLU, ours.ReLU, ours.Hardswish])
def test_depthwise_layouts_and_empty_batches(where, act):
    """As one by one: also the layout, and that an empty batch is counted but changes no statistics."""
    model = ours.Sequential(ours.Conv2d(8, 8, 3, groups=8, bias=False), ours.BatchNorm2d(8), act()).to(where)
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        for batch in (3, 0):
            alone = nn.Sequential(*copy.deepcopy(model))
            x = torch.randn(batch, 8, 7, 6, device=where).contiguous(memory_format=layout)
            output, expected = model(x), alone(x)
            assert output.stride() == expected.stride()
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model.state_dict(), alone.state_dict(), rtol=1e-5, atol=1e-5)
    assert model[1].num_batches_tracked == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype, where):
    for case in ("conv, norm, act", "linear, act, norm, act"):
        model, _, x = make(case, where)
        alone = nn.Sequential(*copy.deepcopy(model))
        results = []
        with torch.autocast(where.type, dtype):
            for net in (model, alone):
                leaf = x.clone().requires_grad_()
                output = net(leaf)
                assert output.dtype is dtype
                grads = torch.autograd.grad(output.float().pow(3).sum(), [leaf, *net.parameters()])
                assert all(grad.dtype is torch.float32 for grad in grads)
                results.append([output, *grads, *net.buffers()])
        eps = 16 * torch.finfo(dtype).eps
        assert_close(results[0], [t.detach().double().cpu() for t in results[1]], eps)


def test_activation_in_place_at_the_front_overwrites_the_input(where):
    x = torch.randn(2, 6, device=where)
    before = x.clone()
    model = ours.Sequential(ours.ReLU(inplace=True), ours.Linear(6, 2), ours.ReLU(inplace=True)).to(where)
    model(x)
    assert torch.equal(x, before.clamp(min=0))


# ---- what speaks against it ----------------------------------------------------------------------------------------


def hook_on(register: str, place: int = 0):
    """What registers a hook on a child that adds it to ``seen``; returns the handle and the children to be seen."""

    def add(model, seen):
        return getattr(model[place], register)(lambda module, *_: seen.append(module)), [model[place]]

    return add


def hook_for_all(register: str):
    def add(model, seen):
        return getattr(nn.modules.module, register)(lambda module, *_: seen.append(module)), [*model]

    return add


HOOKS = {
    **{
        f"{register} of {place}": hook_on(register, place)
        for register in (
            *("register_forward_hook", "register_forward_pre_hook"),
            *("register_full_backward_hook", "register_full_backward_pre_hook"),
        )
        for place in range(3)
    },
    **{
        register: hook_for_all(register)
        for register in (
            *("register_module_forward_hook", "register_module_forward_pre_hook"),
            *("register_module_full_backward_hook", "register_module_full_backward_pre_hook"),
        )
    },
}


@pytest.mark.parametrize("add", HOOKS.values(), ids=HOOKS)
def test_hooks_are_called(add, monkeypatch):
    with force_mode(Mode.REFERENCE):
        model, reference, x = make("conv, norm, act", "cpu")
        model[2].inplace = False  # torch's backward hooks refuse it
        seen = []
        handle, hooked = add(model, seen)
        try:
            output = model(x.requires_grad_())
            output.sum().backward()
        finally:
            handle.remove()
        assert set(hooked) <= set(seen)
        assert called_alone(model, x, monkeypatch) == []
        assert_close([output], [reference(x.detach().double())], 1e-5)


def test_hook_of_the_sequential_itself_changes_nothing_inside(monkeypatch):
    with force_mode(Mode.REFERENCE):
        model, _, x = make("conv, norm, act", "cpu")
        model.register_forward_hook(lambda module, inputs, output: output + 1)
        assert called_alone(model, x, monkeypatch) == []
        assert model(x).min() == 1


def patch_forward(model):
    model[0].forward = lambda input: 2 * type(model[0]).forward(model[0], input)


def patch_inner_forward(model):
    model[0]._conv_forward = lambda *operands: 2 * type(model[0])._conv_forward(model[0], *operands)


def compile_child(model):
    model[2].compile(backend="eager")


def parametrize_weight(model):
    parametrizations.weight_norm(model[0])


def pruned(model):
    prune.l1_unstructured(model[0], "weight", 0.5)


class Doubling(ours.ReLU):
    def forward(self, input):
        return 2 * super().forward(input)


def subclass(model):
    model[2] = Doubling()


@pytest.mark.parametrize(
    ("change", "training"),
    [
        *((change, [0, 1, 2]) for change in (patch_forward, patch_inner_forward, compile_child, pruned)),
        (parametrize_weight, [0]),
        (subclass, [2]),
    ],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_children_that_compute_otherwise_are_called(change, training, monkeypatch):
    with force_mode(Mode.REFERENCE), torch.no_grad():  # nobody copies the pruned weight while it has a graph
        model, _, x = make("conv, norm, act", "cpu")
        change(model)
        alone = copy.deepcopy(model)
        alone.__class__ = nn.Sequential
        if change in (patch_forward, patch_inner_forward):
            change(alone)
        torch.testing.assert_close(model(x), alone(x))
        torch.testing.assert_close(model.state_dict(), alone.state_dict())
        assert called_alone(model, x, monkeypatch) == training


def test_inputs_that_are_no_tensors():
    class Pair(nn.Module):
        def forward(self, pair):
            return pair[0] + pair[1]

    with force_mode(Mode.REFERENCE):
        model = ours.Sequential(Pair(), ours.Linear(2, 2), ours.ReLU())
        assert model((torch.ones(1, 2), torch.ones(1, 2))).shape == (1, 2)
        with pytest.raises(TypeError, match="expected a Tensor"):
            ours.Sequential(ours.Linear(2, 2), ours.ReLU())([1.0])
        with pytest.raises(TypeError):
            ours.Sequential(ours.Linear(2, 2), ours.ReLU())()


def test_errors_are_torchs_and_count_no_batch(where):
    model, _, x = make("conv, norm, act", where)
    alone = copy.deepcopy(model)
    alone.__class__ = nn.Sequential
    for bad in (x[0], x[:, :3], x[:1, :, :3, :3], x.int()):
        with pytest.raises(Exception) as expected:
            alone(bad)
        with pytest.raises(expected.type) as actual:
            model(bad)
        assert type(actual.value) is type(expected.value) and len(str(actual.value)) > 20
    torch.testing.assert_close(model.state_dict()["1.running_mean"], alone.state_dict()["1.running_mean"])
    assert model[1].num_batches_tracked == 0
    model[0] = ours.Linear(4, 6).to(where)
    model[1] = ours.GELU("other")
    with pytest.raises(RuntimeError, match="approximate argument"):
        model(torch.randn(2, 4, device=where))


# ---- a Sequential like torch's -------------------------------------------------------------------------------------


def test_edits_are_seen(monkeypatch):
    with force_mode(Mode.REFERENCE):
        model, _, x = make("conv, norm, act", "cpu")

        def agrees(net, alone):
            assert called_alone(net, x, monkeypatch) == alone
            torch.testing.assert_close(net.eval()(x), nn.Sequential(*net)(x))
            net.train()

        agrees(model, [])
        head = model[:2]
        assert type(head) is ours.Sequential and head[0] is model[0]
        agrees(head, [])
        agrees(model.append(ours.Tanh()), [3])
        agrees(model.insert(1, nn.Identity()), [0, 1, 4])
        del model[1]
        agrees(model, [3])
        model[2] = ours.SiLU()
        agrees(model, [3])
        agrees(model.extend([ours.Conv2d(6, 2, 1), ours.ReLU()]), [3])
        assert isinstance(model.pop(-1), ours.ReLU)
        agrees(model, [3, 4])
        both = model[:1] + model[1:]
        assert type(both) is type(nn.Sequential(*model)[:1] + nn.Sequential(*model)[1:])
        torch.testing.assert_close(both.eval()(x), model.eval()(x))
        assert list(model.state_dict()) == list(nn.Sequential(*model).state_dict())


def test_layers_that_are_used_twice():
    with force_mode(Mode.REFERENCE):
        conv, norm, act = ours.Conv2d(4, 4, 3, padding=1), ours.BatchNorm2d(4), ours.ReLU()
        model = ours.Sequential(conv, norm, act, conv, norm, act)
        theirs = exact(ours.Sequential(conv, norm, act))
        x = torch.randn(IMAGES)
        assert_close([model(x)], [theirs(theirs(x.double()))], 1e-5)
        assert norm.num_batches_tracked == 2
        assert_close(norm.buffers(), theirs[1].buffers(), 1e-5)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how, monkeypatch):
    with force_mode(Mode.REFERENCE):
        model, _, x = make("conv, norm, act", "cpu")
        model(x)
        if how == "deepcopy":
            copied = copy.deepcopy(model)
        elif how == "pickle":
            copied = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            copied = torch.load(file, weights_only=False)
        assert type(copied) is ours.Sequential and repr(copied) == repr(model)
        assert called_alone(copied, x, monkeypatch) == []
        assert copied[1].num_batches_tracked == 2 and model[1].num_batches_tracked == 1


def test_functional_call():
    with force_mode(Mode.REFERENCE):
        model, _, x = make("conv, norm, act", "cpu")
        state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
        replaced = torch.func.functional_call(model, state, (x,))
        alone = torch.func.functional_call(nn.Sequential(*copy.deepcopy(model)), copy.deepcopy(state), (x,))
        torch.testing.assert_close(replaced, alone)


# ---- traced --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["conv, norm, act", "two runs around a pool", "frozen norm"])
def test_compiled_training_is_one_graph(case):
    torch._dynamo.reset()
    with force_mode(Mode.REFERENCE):
        model, reference, x = make(case, "cpu")
        names: list[str] = []

        def backend(graph, inputs):
            names.extend(str(node.target) for node in graph.graph.nodes)
            return graph

        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for _ in range(2):
            assert_close([compiled(x)], [reference(x.double())], 1e-5)
            assert_close(model.buffers(), reference.buffers(), 1e-5)
        assert any("conv2d_batch_norm" in name for name in names) == (case != "frozen norm")
        assert not any("gpukern.activation" in name for name in names)
    torch._dynamo.reset()
    with force_mode(Mode.REFERENCE):
        model[0].register_forward_hook(lambda module, inputs, output: output * 0)
        output = torch.compile(model, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(output, model(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exported(strict):
    with force_mode(Mode.REFERENCE):
        model, reference, x = make("two runs around a pool", "cpu")
        shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
        program = torch.export.export(model.eval(), (x,), dynamic_shapes=shapes, strict=strict)
        names = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("gpukern")]
        assert "gpukern.activation.default" not in names
        x = torch.randn(5, *x.shape[1:])
        assert_close([program.module()(x)], [reference.eval()(x.double())], 1e-5)


def test_fused_as_the_single_layers_are():
    with force_mode(Mode.REFERENCE):
        model, _, x = make("two runs around a pool", "cpu")
        alone = nn.Sequential(*copy.deepcopy(model))
        groups = [[group.modules for group in gpukern.fuse(net.eval(), (x,)).report.fused] for net in (model, alone)]
        assert groups[0] == groups[1] == [("0", "1", "2"), ("5", "6")]
