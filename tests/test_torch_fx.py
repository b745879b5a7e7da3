"""``torch.fx`` takes gpukern's layers for single nodes, as it takes torch's; TorchScript is refused in plain words."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import gpukern
import gpukern.functional as F
from gpukern.runtime.mode import Mode, force_mode

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.usefixtures("reference_mode"),
]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.head = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.SiLU())

    def forward(self, x):
        return self.head(self.act(self.norm(self.conv(x)) + x))


MODELS = {
    "residual": Residual(),
    "in a row": nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
    "classifier": nn.Sequential(
        *(nn.ConvTranspose2d(3, 4, 2), nn.GELU(), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        *(nn.Linear(16, 5), nn.BatchNorm1d(5), nn.Tanh()),
    ),
    "parametrized": nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Hardswish()),
}


class Functions(nn.Module):
    """gpukern's functions called in a user's forward."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.register_buffer("ones", torch.ones(4))

    def forward(self, x):
        y = F.conv2d(x, self.weight, padding=1, activation="silu")
        y = F.batch_norm(y, self.ones, self.ones, residual=F.gelu(y))
        y = F.leaky_relu(F.adaptive_avg_pool2d(F.max_pool2d(y, 2), 1))
        return F.linear(y.flatten(1), self.weight[:, :, 0, 0].t())


def nodes(graph: torch.fx.Graph) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in graph.nodes]


def traced(model: nn.Module) -> torch.fx.GraphModule:
    return torch.fx.symbolic_trace(model)


def traced_by_a_subclass(model: nn.Module) -> torch.fx.GraphModule:
    """As torchvision's feature extractors trace: what else is a leaf is asked of torch.fx."""

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, nn.Flatten) or super().is_leaf_module(module, name)

    return torch.fx.GraphModule(model, Tracer().trace(model))


def traced_by_name(model: nn.Module) -> torch.fx.GraphModule:
    """As torch.ao's tracer, which asks for the name itself."""

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return module.__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)

    return torch.fx.GraphModule(model, Tracer().trace(model))


@pytest.mark.parametrize("trace", [traced, traced_by_a_subclass, traced_by_name])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", MODELS)
def test_graph_is_the_originals(name, training, trace):
    model = MODELS[name].train(training)
    converted = gpukern.convert(copy.deepcopy(model))
    graph = trace(converted)
    assert nodes(graph.graph) == nodes(trace(model).graph)
    x = torch.randn(2, 3, 8, 8)
    theirs = copy.deepcopy(model)
    torch.testing.assert_close(graph(x), theirs(x), rtol=1e-4, atol=1e-5)
    for ours, buffer in zip(converted.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(ours, buffer)
    layers = [module for module in graph.modules() if isinstance(module, nn.Conv2d)]
    assert all(isinstance(layer, gpukern.nn.Conv2d) for layer in layers)


@pytest.mark.parametrize("how", ["made", "converted in place", "deepcopy", "pickle"])
def test_layers_are_leaves_however_they_came(how):
    model = gpukern.nn.Sequential(gpukern.nn.Conv2d(3, 4, 3), gpukern.nn.BatchNormAct2d(4))
    if how == "converted in place":
        model = gpukern.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), inplace=True)
    elif how == "deepcopy":
        model = copy.deepcopy(model)
    elif how == "pickle":
        model = pickle.loads(pickle.dumps(model))
    assert [target for _, target in nodes(traced(model).graph)] == ["input", "0", "1", "output"]
    assert type(model[0]).__module__ == "gpukern.nn.conv"


def test_hooks_of_a_leaf_run_once():
    model = gpukern.convert(nn.Sequential(nn.Linear(3, 3)))
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.randn(2, 3)
    torch.testing.assert_close(traced(model)(x), model(x))


def test_a_users_subclass_is_looked_into():
    class Doubled(gpukern.nn.ReLU):
        def forward(self, input):
            return 2 * torch.relu(input)

    assert ("call_function", "<built-in function mul>") in nodes(traced(nn.Sequential(Doubled())).graph)


@pytest.mark.parametrize("trace", [traced, traced_by_a_subclass, traced_by_name])
@pytest.mark.parametrize("copied", [lambda graph: graph, lambda graph: pickle.loads(pickle.dumps(graph))])
def test_functions_are_nodes(trace, copied):
    model, x = Functions(), torch.randn(2, 3, 8, 8)
    graph = copied(trace(model))
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert {F.conv2d, F.batch_norm, F.gelu, F.max_pool2d, F.adaptive_avg_pool2d, F.leaky_relu, F.linear} <= set(called)
    assert torch.equal(graph(x), model(x))


def test_a_function_in_a_users_subclass_is_a_node():
    class Twice(gpukern.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = Twice(3, 4)
    graph, x = traced(nn.Sequential(model)), torch.randn(2, 3)
    assert F.linear in [node.target for node in graph.graph.nodes]
    assert torch.equal(graph(x), model(x))


@pytest.mark.parametrize("mode", [Mode.REFERENCE, Mode.EMULATED], ids=lambda mode: mode.value)
@pytest.mark.parametrize("name", MODELS)
def test_torchscripts_tracer_is_refused(name, mode):
    with force_mode(mode), pytest.raises(RuntimeError, match=r"not traced by torch.jit.trace: use torch.export.export"):
        torch.jit.trace(gpukern.convert(MODELS[name]), torch.randn(2, 3, 8, 8))


def test_torchscripts_tracer_is_refused_by_a_fused_model_and_by_functions():
    x = torch.randn(2, 3, 8, 8)
    fused = gpukern.fuse(MODELS["in a row"].eval(), x)
    for traced_by_script in (fused.module, lambda x: gpukern.functional.relu(x)):
        with pytest.raises(RuntimeError, match=r"use torch.export.export or torch.compile"):
            torch.jit.trace(traced_by_script, x)


@pytest.mark.parametrize(
    "model",
    [
        gpukern.convert(MODELS["in a row"]),
        gpukern.convert(MODELS["residual"]),
        gpukern.nn.ReLU(),
        nn.Sequential(nn.Dropout(), gpukern.nn.Linear(2, 2)),
    ],
    ids=["converted", "inner", "layer", "inside"],
)
def test_torchscripts_compiler_is_refused(model):
    with pytest.raises(RuntimeError, match=r"gpukern's \w+ is not compiled by torch.jit.script: use torch.export"):
        torch.jit.script(model)
