"""``torch.compile`` and ``torch.export`` of gpukern's layers: one graph, and the results of eager torch.nn."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import jvp

import gpukern

# Traced graphs call the operators, and these the mode in force: what they compute is tested elsewhere.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.usefixtures("reference_mode")]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
        nn.AvgPool2d(3, 1, 1),
        nn.SiLU(inplace=True),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
        nn.Sigmoid(),
    )


def assert_same_step(ours, theirs: nn.Module, parameters, x: torch.Tensor) -> None:
    """The same outputs and gradients. The reference calls torch's kernels: only the order of sums may differ."""
    results = []
    for model in (ours, theirs):
        for parameter in theirs.parameters():
            parameter.grad = None
        input = x.clone().requires_grad_()
        output = model(input)
        output.square().sum().backward()
        results.append([output.detach(), input.grad, *(parameter.grad for parameter in parameters)])
    for ours_, theirs_ in zip(*results, strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_is_one_graph_and_trains_alike(dynamic):
    theirs = network()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    ours = torch.compile(gpukern.convert(theirs), fullgraph=True, backend=backend, dynamic=dynamic or None)
    parameters = list(theirs.parameters())
    # dynamic=True must foresee that the batch changes; otherwise PyTorch learns it from the second batch size.
    for number, batch in enumerate((4, 7, 9)):
        with torch._dynamo.config.patch(error_on_recompile=dynamic or number == 2):
            assert_same_step(ours, theirs, parameters, torch.randn(batch, 2, 9, 8))
    called = {str(node.target) for node in graphs[-1].graph.nodes if node.op == "call_function"}
    assert any("gpukern.conv2d" in target for target in called), called
    assert not called & {"<built-in method conv2d of type object>", "<function relu>"}


def test_compiled_inference_serves_both_layouts():
    theirs = network().eval()
    ours = torch.compile(gpukern.convert(theirs), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 2, 9, 8)
    with torch.no_grad():
        for input in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
            torch.testing.assert_close(ours(input), theirs(input), rtol=1e-5, atol=1e-6)


def test_inductor_trains_a_network():
    theirs = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 3))
    ours = torch.compile(gpukern.convert(theirs), fullgraph=True)
    assert_same_step(ours, theirs, list(theirs.parameters()), torch.randn(2, 1, 8, 8))


def test_functional_arguments_under_compile():
    def run(x, w, b):
        y = gpukern.functional.conv2d(x, w, b, stride=(2, 1), padding="valid", dilation=(1, 2), activation="relu")
        y, indices = gpukern.functional.max_pool2d(y, 2, ceil_mode=True, return_indices=True)
        return gpukern.functional.linear(y[0], y.new_ones(3, y.shape[2]), activation="tanh"), indices

    arguments = torch.randn(2, 9, 8), torch.randn(3, 2, 3, 2), torch.randn(3)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
    for ours, theirs in zip(compiled, run(*arguments), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def export(model: nn.Module) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(model, (torch.randn(3, 2, 9, 8),), dynamic_shapes=({0: batch},))


def test_export_with_dynamic_batch():
    model = network().eval()
    program = export(gpukern.convert(model))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"gpukern.conv2d.default", "gpukern.linear.default", "gpukern.avg_pool2d.default"} <= targets
    for batch in (1, 5):
        x = torch.randn(batch, 2, 9, 8)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-6)


def test_exported_program_runs_in_a_fresh_process(run_python, tmp_path):
    model = network().eval()
    program, x = tmp_path / "net.pt2", torch.randn(5, 2, 9, 8)
    torch.export.save(export(gpukern.convert(model)), program)
    torch.save((x, model(x).detach()), tmp_path / "expected.pt")
    code = """
import sys
import torch
import gpukern
x, expected = torch.load(sys.argv[2])
actual = torch.export.load(sys.argv[1]).module()(x)
torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
print("same")
"""
    run = run_python(code, str(program), str(tmp_path / "expected.pt"))
    assert run.stdout == "same\n", run.stderr


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_tensors_without_memory(memory_format):
    """On the meta device only shapes and strides are worked out: those of torch.nn on a CPU (its meta device forgets
    channels_last); a gradient's are those of its tensor, whatever torch.nn's are, which differ between versions.
    """
    theirs = network()
    expected = theirs[0](torch.randn(2, 2, 9, 9).contiguous(memory_format=memory_format))
    with torch.device("meta"):
        model = gpukern.convert(theirs).to("meta")
        x = torch.empty(2, 2, 9, 9).contiguous(memory_format=memory_format).requires_grad_()
        convolved = model[0](x)
        x_grad, *gradients = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
        assert {t.device.type for t in (convolved, x_grad, *gradients)} == {"meta"}
        assert [g.shape for g in gradients] == [p.shape for p in model.parameters()]
    assert (convolved.shape, convolved.stride()) == (expected.shape, expected.stride())
    assert (x_grad.shape, x_grad.stride()) == (x.shape, x.stride())
    assert [g.stride() for g in gradients] == [p.stride() for p in model.parameters()]


def test_tangents_of_a_fused_and_an_exported_network():
    """Their operators are called as registered, not through the functions."""
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2)).eval()
    x, along = torch.randn(2, 2, 6, 6), torch.randn(2, 2, 6, 6)
    expected = jvp(model, (x,), (along,))
    exported = torch.export.export(gpukern.convert(model), (x,)).module()
    for network in (gpukern.fuse(model, x), exported):
        torch.testing.assert_close(jvp(network, (x,), (along,)), expected)
        with forward_ad.dual_level():
            dual = network(forward_ad.make_dual(x, along))
            torch.testing.assert_close(tuple(forward_ad.unpack_dual(dual)), expected)


def test_a_compiled_tangent():
    layer, x, along = nn.Conv2d(2, 3, 3), torch.randn(2, 2, 5, 5), torch.randn(2, 2, 5, 5)
    ours = gpukern.convert(layer)
    compiled = torch.compile(lambda x, along: jvp(ours, (x,), (along,)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, along), jvp(layer, (x,), (along,)))
