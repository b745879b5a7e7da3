"""A model of gpukern's layers in torch's operators alone, and in ONNX's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gpukern

pytestmark = pytest.mark.usefixtures("reference_mode")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding="same", groups=3), nn.BatchNorm2d(3)
        self.head = nn.Sequential(nn.Conv2d(3, 4, 2, bias=False), nn.BatchNorm2d(4), nn.SiLU())
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)

    def forward(self, x):
        return self.head(self.pool(torch.relu(self.norm(self.conv(x)) + x)))


def activations() -> nn.Module:
    kinds = (nn.ReLU6, nn.LeakyReLU, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.GELU, nn.Hardswish)
    return nn.Sequential(*(layer for kind in kinds for layer in (nn.Conv2d(3, 3, 1), kind())))


def row_norms() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 2), gpukern.nn.LayerNorm2d(4), nn.ReLU(), nn.LayerNorm((8, 8)), nn.RMSNorm(8))


MODELS = {
    "row norms": row_norms(),
    "residual": Residual(),
    "transposed": nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), nn.ReLU(), nn.AvgPool2d(2)),
    "activations": activations(),
    "norms": nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.InstanceNorm2d(4, affine=True)),
    "classifier": nn.Sequential(
        *(
            nn.Conv2d(3, 4, (2, 3), stride=2, padding=1, dilation=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(1),
        ),
        *(nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU("tanh"), nn.Linear(6, 2), nn.LogSoftmax(1)),
    ),
}


def image() -> torch.Tensor:
    return torch.randn(2, 3, 9, 9)


def operators(program: torch.export.ExportedProgram) -> set[str]:
    nodes = (node for node in program.graph.nodes if node.op == "call_function")
    return {node.target.namespace for node in nodes if isinstance(node.target, torch._ops.OpOverload)}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", MODELS)
def test_decomposed_graph_has_torchs_operators_only(name, training):
    model = copy.deepcopy(MODELS[name]).train(training)
    x, batch = image(), torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(gpukern.convert(model), (x,), dynamic_shapes=({0: batch},))
    assert "gpukern" in operators(program)
    program = program.run_decompositions(gpukern.onnx.decompositions())
    assert operators(program) == {"aten"}
    other = torch.cat([x, x, x])[:5]
    state = copy.deepcopy(model.state_dict())
    expected = model(other)
    model.load_state_dict(state)
    torch.testing.assert_close(program.module()(other), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_fused_graph_has_torchs_operators_only(name):
    model, x = MODELS[name].eval(), image()
    fused = gpukern.fuse(model, x)
    program = torch.export.export(fused.module, (x,)).run_decompositions(gpukern.onnx.decompositions())
    assert operators(program) == {"aten"}
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_once(dtype):
    nn = gpukern.nn
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.RMSNorm(7, eps=1e-6), nn.LayerNorm(7)).to(dtype)
    x = 1000 * image().to(dtype)  # whose squares overflow
    program = torch.export.export(layer, (x,)).run_decompositions(gpukern.onnx.decompositions())
    torch.testing.assert_close(program.module()(x), layer(x))


class InEightBits(torch.nn.Module):
    """A few layers, in a graph that torch's exporter sees."""

    def __init__(self):
        super().__init__()
        for name, *shape in (("first", 8, 3, 3, 3), ("second", 8, 2, 2, 2), ("last", 5, 2)):
            self.register_buffer(name, torch.randint(-127, 128, shape, dtype=torch.int8))
        self.register_buffer("scale", torch.rand(8) * 1e-3)

    def forward(self, x):
        ops, int8, geometry = torch.ops.gpukern, torch.int8, ([1, 1], [1, 0, 1, 0], [1, 1], 1)
        q = ops.quantize(x, 0.02, int8)
        q = ops.conv2d_quantized(
            q, self.first, self.scale, self.scale, None, *geometry, "relu", 0.0, 1.0, 0.05, int8, True
        )
        q = ops.avg_pool2d_quantized(q, 0.05, [2, 2], [1, 1], [0, 0], False, True, None, 0.05, int8)
        up = [2, 2], [0, 0], [0, 0], [1, 1], 1
        q = ops.conv_transpose2d_quantized(q, self.second, None, None, None, *up, "none", 0.0, 1.0, 40.0, int8)
        y = ops.adaptive_avg_pool2d_quantized(q, 1.0, [1, 1], 1.0, int8).flatten(1)
        return ops.dequantize(
            ops.linear_quantized(y, self.last, None, None, "none", 0.0, 9.0, int8), 9.0, torch.float32
        )


def test_operators_in_8_bits_decompose_into_the_same_numbers():
    model, x = InEightBits(), image()
    program = torch.export.export(model, (x,)).run_decompositions(gpukern.onnx.decompositions())
    assert operators(program) == {"aten"}
    assert torch.equal(program.module()(x), model(x)) and model(x).abs().max() > 0


def test_every_operator_of_a_forward_has_one():
    forward = {
        overload
        for name in dir(torch.ops.gpukern)
        # Input pipelines augment, no model's forward does.
        if not any(word in name for word in ("grad", "backward", "_sum", "gather", "statistics", "augment"))
        for packet in (getattr(torch.ops.gpukern, name),)
        if isinstance(packet, torch._ops.OpOverloadPacket)
        for overload in (packet.default,)
    }
    assert forward <= gpukern.onnx.decompositions().keys()


def test_the_exporters_table_has_them(monkeypatch):
    """Without onnx, which the exporter itself needs."""
    decomp = pytest.importorskip("torch.onnx._internal.exporter._decomp")
    conv2d, linear = torch.ops.gpukern.conv2d.default, torch.ops.gpukern.linear.default
    table = decomp.create_onnx_friendly_decomposition_table({linear})
    assert conv2d in table and linear not in table
    from torch._decomp import decomposition_table

    assert conv2d not in decomposition_table


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("which", ["converted", "fused"])
@pytest.mark.filterwarnings("ignore")
def test_onnxruntime_computes_the_same(name, which):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = MODELS[name].eval(), image()
    ours = gpukern.convert(model) if which == "converted" else gpukern.fuse(model, x)
    program = torch.onnx.export(ours, (x,), dynamo=True, verbose=False)
    assert {node.domain for node in program.model_proto.graph.node} <= {"", "pkg.onnxscript.torch_lib.common"}
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-4)
