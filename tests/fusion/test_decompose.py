"""gpukern's own operators in a model that is fused: as good as torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gpukern
from gpukern import functional as F
from gpukern.fusion.calls import Signature
from gpukern.fusion.capture import capture_program, private_copy
from gpukern.fusion.eager_calls import call_directly
from gpukern.ops._operators import OPERATORS
from tests.fusion.networks import lively, net

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("reference_mode"),
]


def network() -> nn.Module:
    return lively(
        nn.Sequential(
            *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.ConvTranspose2d(4, 4, 2), nn.Hardswish()),
            *(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2, 1), nn.AdaptiveAvgPool2d(1)),
            *(nn.Flatten(), nn.Linear(6, 4), nn.Tanh()),
        )
    )


def test_a_fused_model_that_is_fused_again_has_the_same_groups():
    model, x = network(), torch.randn(2, 3, 12, 12)
    fused = gpukern.fuse(model, x)
    again = gpukern.fuse(fused, x, verify=False)
    assert [group.operator for group in again.report.fused] == [
        *("gpukern::conv2d", "gpukern::conv_transpose2d", "gpukern::conv2d_max_pool2d", "gpukern::linear")
    ]
    assert torch.equal(again(x), fused(x))


def test_no_operator_of_gpukern_is_left_for_matching():
    def function(m, x):
        y = F.conv2d(x, m.a.weight, padding="same", activation="leaky_relu", negative_slope=0.2)  # pads one side more
        y = F.conv_transpose2d(y, m.a.weight, residual=None, activation="gelu_tanh")
        y = F.batch_norm(y, m.b.running_mean, m.b.running_var, residual=y)
        y = F.rms_norm(F.layer_norm(y, y.shape[-1:], residual=y, activation="relu"), y.shape[-2:])
        return F.adaptive_avg_pool2d(F.avg_pool2d(F.max_pool2d(F.silu(y), 2), 2), 2)

    model, (x,) = net(function, a=nn.Conv2d(4, 4, (2, 3)), b=nn.BatchNorm2d(4))
    given = private_copy(model), copy.deepcopy(model), (x,), Signature.of(model)
    with torch.no_grad():
        program = capture_program(*given, dynamic_batch=True)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called and not [target for target in called if str(target).startswith("gpukern.")]
    fused = gpukern.fuse(model, x)
    assert [group.pattern for group in fused.report.fused][:1] == ["pad + conv2d + leaky_relu"]
    assert torch.allclose(fused(x), model(x), atol=1e-5)


def test_a_fused_graph_calls_every_operator_directly():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for overload in OPERATORS:
        graph.call_function(overload, (x,))
    graph.output(x)
    called = call_directly(torch.fx.GraphModule(torch.nn.Module(), graph)).graph.nodes
    assert not [node for node in called if node.target in OPERATORS] and len(called) == len(OPERATORS) + 2
