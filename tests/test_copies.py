"""What a model refers to is the copy's in a copy, and nothing of the original changes through it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

import gpukern

pytestmark = pytest.mark.usefixtures("reference_mode")


class Net(nn.Module):
    """A convolution, and a batch norm that ``keep`` makes ``call`` from: in every case the network's own."""

    def __init__(self, keep: Callable[[Net], Callable]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.call = keep(self)

    def forward(self, x):
        return self.call(self.conv(x))


@dataclasses.dataclass(frozen=True)
class Holder:
    layer: nn.Module

    def __call__(self, x):
        return self.layer(x)


class Slotted:
    __slots__ = ("function",)

    def __init__(self, function):
        self.function = function

    def __call__(self, x):
        return self.function(x)


def closure(net):
    return lambda x: net.bn(x)


def closure_over_the_layer(net):
    norm = net.bn

    def call(x):
        return norm(x)

    return call


def default_argument(net):
    return lambda x, norm=net.bn: norm(x)


def keyword_default(net):
    def call(x, *, norm=net.bn):
        return norm(x)

    return call


def decorated(net):
    @functools.wraps(net.bn.forward)
    def call(x):
        return inner(x)

    inner = closure(net)
    return call


def recursive(net):
    def call(x, again=True):
        return call(x, again=False) if again else net.bn(x)

    return call


def closure_over_a_partial(net):
    norm = functools.partial(nn.Module.__call__, net.bn)
    return lambda x: norm(x)


def closure_over_a_tuple(net):
    norms = (net.bn, net.conv)
    return lambda x: norms[0](x)


def closure_over_a_weak_reference(net):
    norm = weakref.ref(net.bn)
    return lambda x: norm()(x)


WAYS = [
    *(closure, closure_over_the_layer, default_argument, keyword_default, decorated, recursive),
    *(closure_over_a_partial, closure_over_a_tuple, closure_over_a_weak_reference),
    lambda net: net.bn.__call__,
    lambda net: functools.partial(closure(net)),
    lambda net: functools.partial(nn.Module.__call__, net.bn),
    lambda net: functools.partial(lambda norms, x: norms["norm"](x), {"norm": net.bn}),
    lambda net: Holder(net.bn),
    lambda net: Holder(closure(net)),
    lambda net: Slotted(closure(net)),
    lambda net: Slotted(weakref.ref(net)().bn.__call__),
]


def images() -> torch.Tensor:
    return 3 + 2 * torch.randn(4, 3, 6, 6)


@pytest.mark.parametrize("keep", WAYS, ids=lambda keep: keep.__name__)
def test_what_the_model_calls_is_the_copys(keep):
    model = Net(keep).eval()
    converted, report = gpukern.convert(model, return_report=True)
    assert [layer.name for layer in report.replaced] == ["conv", "bn"]
    called = []
    for net in (model, converted):
        net.bn.register_forward_hook(lambda module, *_: called.append(module))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = images()
    torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
    assert called == [converted.bn, model.bn]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    converted.train()
    y = converted(x)
    assert called[2:] == [converted.bn] and not model.bn.training
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(4), rtol=1e-3, atol=0)


def keeps_in_a_list(net):
    norms = [net.bn]
    return lambda x: norms[0](x)


def keeps_in_a_weak_dictionary(net):
    norms = weakref.WeakValueDictionary(norm=net.bn)
    return lambda x: norms["norm"](x)


def keeps_in_a_global(net):
    global the_norm
    the_norm = net.bn
    return lambda x: the_norm(x)


def keeps_in_a_global_of_another_function(net):
    call = keeps_in_a_global(net)
    return lambda x: call(x)


def keeps_behind_an_object(net):
    trainer = Slotted(None)
    trainer.function = {"model": net}
    return lambda x: trainer.function["model"].bn(x)


@pytest.mark.parametrize(
    "keep",
    [
        *(keeps_in_a_list, keeps_in_a_weak_dictionary, keeps_in_a_global, keeps_in_a_global_of_another_function),
        keeps_behind_an_object,
    ],
)
def test_what_cannot_be_the_copys_is_refused(keep):
    model = Net(keep).eval()
    with pytest.raises(RuntimeError, match=r"still have the original's '(bn|model)': .* in call.*inplace=True"):
        gpukern.convert(model)
    with pytest.raises(RuntimeError, match=r"the model cannot be copied: .* still have the original's"):
        gpukern.fuse(model, images())
    x = images()
    expected = model(x)
    converted = gpukern.convert(model, inplace=True)
    torch.testing.assert_close(converted(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "of the model"])
def test_hooks_that_keep_the_model_keep_the_copy(kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model.seen = 0

    def note(*_):
        model.seen += 1

    if kind == "forward":
        model[0].register_forward_hook(note)
    elif kind == "pre":
        model[1].register_forward_pre_hook(note)
    elif kind == "backward":
        model[1].register_full_backward_hook(note)
    else:
        model.register_forward_hook(note)
    original = model
    converted = gpukern.convert(original)
    converted(images()).sum().backward()
    assert (original.seen, converted.seen) == (0, 1)
    original(images()).sum().backward()
    assert (original.seen, converted.seen) == (1, 1)


def test_what_a_function_keeps_beside_the_model_stays_common():
    model, counted, names = nn.Sequential(nn.Linear(2, 2)), 0, []

    def count(module, *_):
        nonlocal counted
        counted += 1
        names.append(module is model[0])

    model[0].register_forward_hook(count)
    converted = gpukern.convert(model)
    for each in (model, converted, converted):
        each(torch.randn(1, 2))
    assert counted == 3 and names == [True] * 3


def test_layers_that_torch_does_not_see_are_the_copys_with_the_same_tensors():
    model = nn.Module()
    layers = [nn.Linear(2, 2) for _ in range(4)]
    model.one, model.many, model.held = [layers[0]], {"a": (layers[1],)}, Holder(layers[2])
    model.call = functools.partial(layers[3])
    converted = gpukern.convert(model)
    theirs = converted.one[0], converted.many["a"][0], converted.held.layer, converted.call.func
    for ours, layer in zip(theirs, layers, strict=True):
        assert ours is not layer and ours.weight is layer.weight


# ---- torch.fx and torch.export ---------------------------------------------------------------------------------------


class TwoGraphs(torch.fx.GraphModule):
    """Like torchvision's feature extractors: a graph for each mode, and a ``__deepcopy__`` that begins in training."""

    def __init__(self, root: nn.Module, graph: torch.fx.Graph) -> None:
        super().__init__(root, graph)
        self.graphs = {True: graph, False: copy.deepcopy(graph)}

    def train(self, mode: bool = True) -> TwoGraphs:
        if mode != self.training:
            self.graph = self.graphs[mode]
        return super().train(mode)

    def _deepcopy_init(self):
        return lambda new, fake, graph: TwoGraphs.__init__(new, fake, graph)


def traced() -> torch.fx.GraphModule:
    return torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))


def two_graphs() -> TwoGraphs:
    model = traced()
    return TwoGraphs(model, model.graph)


def with_frozen_norm() -> torch.fx.GraphModule:
    model = traced().train()
    model.get_submodule("1").eval()
    return model


@pytest.mark.parametrize(
    "model",
    [traced().eval(), two_graphs().eval(), two_graphs(), with_frozen_norm(), nn.Sequential(two_graphs().eval())],
    ids=["traced", "two graphs, evaluation", "two graphs, training", "frozen norm", "inside"],
)
def test_graph_modules_keep_mode_hooks_and_statistics(model):
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    model.note = {"mine": True}
    converted = gpukern.convert(model)
    assert [m.training for m in converted.modules()] == [m.training for m in model.modules()]
    assert converted.note == {"mine": True} and type(converted).__name__ == type(model).__name__
    x = images()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.testing.assert_close(converted(x), copy_of(model, state)(x), rtol=1e-4, atol=1e-5)
    assert len(seen) == 2
    if not any(isinstance(m, nn.BatchNorm2d) and m.training for m in model.modules()):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        converted.train(), converted.eval()
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)
    # The generated code belongs to one of them alone.
    assert type(converted) is not type(model) or not isinstance(model, torch.fx.GraphModule)


def copy_of(model: nn.Module, state: dict[str, torch.Tensor]) -> Callable:
    """A call of ``model`` that leaves its statistics as they are."""

    def call(x):
        y = model(x)
        model.load_state_dict(state)
        return y

    return call


def test_fuse_of_a_graph_for_each_mode():
    model = two_graphs().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = images()
    fused = gpukern.fuse(model, x)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training


def test_exported_module():
    model = torch.export.export(nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval(), (torch.randn(2, 3),)).module()
    converted = gpukern.convert(model)
    x = torch.randn(2, 3)
    assert torch.equal(converted(x), model(x))
    assert all(a is b for a, b in zip(converted.parameters(), model.parameters(), strict=True))


# ---- classes with a __deepcopy__ of their own ------------------------------------------------------------------------


class Anew(nn.Module):
    """Made anew and filled, as many do: weights are drawn, the mode is forgotten, and tensors are others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))

    def __deepcopy__(self, memo):
        new = type(self)()
        new.load_state_dict(self.state_dict())
        return new


class Itself(nn.Linear):
    def __deepcopy__(self, memo):
        return self


class WithoutHooks(nn.Linear):
    def __deepcopy__(self, memo):
        new = type(self)(2, 2)
        new.load_state_dict(self.state_dict())
        return new


class Less(nn.Sequential):
    def __deepcopy__(self, memo):
        return Less(*(copy.deepcopy(layer, memo) for layer in list(self)[1:]))


def test_what_is_made_anew_gets_the_mode_and_the_tensors():
    model = nn.Sequential(Anew()).eval()
    state, x = torch.get_rng_state(), images()
    drawn = torch.get_rng_state()
    converted = gpukern.convert(model)
    assert torch.equal(torch.get_rng_state(), drawn) and not torch.equal(state, drawn)
    assert not any(module.training for module in converted.modules())
    assert all(a is b for a, b in zip(converted.parameters(), model.parameters(), strict=True))
    assert all(a is b for a, b in zip(converted.buffers(), model.buffers(), strict=True))
    torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Itself(2, 2), "copy.deepcopy of '0' gives the very same module"),
        (WithoutHooks(2, 2), "copy.deepcopy of '0' does not keep its forward hooks"),
        (Less(nn.Linear(2, 2), nn.Linear(2, 2)), "copy.deepcopy gives a model without '0.1'"),
    ],
    ids=["itself", "without hooks", "less"],
)
def test_a_copy_that_is_none_is_refused(layer, why):
    if "hooks" in why:
        layer.register_forward_hook(lambda *_: None)
    model = nn.Sequential(layer)
    with pytest.raises(RuntimeError, match=f"{why}.*inplace=True"):
        gpukern.convert(model)
    with pytest.raises(RuntimeError, match="the model cannot be copied"):
        gpukern.fuse(model, torch.randn(1, 2))
    gpukern.convert(model, inplace=True)


def test_fuse_leaves_the_norm_that_a_function_keeps():
    """In training mode its first call would move the statistics."""
    model = Net(closure).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused, x = gpukern.fuse(model, images()), images()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(fused(x), model.eval()(x), rtol=1e-4, atol=1e-5)


# ---- bound methods of replaced layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_methods_of_replaced_layers_are_gpukerns(inplace, monkeypatch):
    model = nn.Module()
    model.linear, model.bn = nn.Linear(3, 4), nn.BatchNorm1d(4)
    model.first, model.rest = model.linear.forward, [functools.partial(model.bn.forward)]
    x = torch.randn(5, 3)
    expected = model.rest[0](model.first(x))
    converted = gpukern.convert(model, inplace=inplace)
    called = []
    for name in ("Linear", "BatchNorm1d"):
        kind = getattr(gpukern.nn, name)
        monkeypatch.setattr(kind, "_compute", note(called, name, kind._compute))
    torch.testing.assert_close(converted.rest[0](converted.first(x)), expected, rtol=1e-4, atol=1e-5)
    assert called == ["Linear", "BatchNorm1d"]


def note(called: list, name: str, function: Callable) -> Callable:
    def noting(*args, **kwargs):
        called.append(name)
        return function(*args, **kwargs)

    return noting


# ---- TorchScript -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_layers_inside_torchscript_are_the_copys_with_the_same_tensors(how):
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    inner = torch.jit.script(layers) if how == "script" else torch.jit.trace(layers, images())
    model = nn.Sequential(inner, nn.ReLU()).eval()
    converted = gpukern.convert(model)
    pointers = [[t.data_ptr() for t in (*m.parameters(), *m.buffers())] for m in (model, converted)]
    assert pointers[0] == pointers[1]
    converted.train()
    assert all(m.training for m in converted.modules()) and not any(m.training for m in model.modules())
