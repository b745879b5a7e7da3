"""What a report says of the kernels on a GPU, asked on any machine."""

from __future__ import annotations

import pytest
from torch import nn

from gpukern.fusion import describe
from gpukern.fusion.calls import Signature
from gpukern.fusion.capture import capture_program, private_copy
from gpukern.fusion.lowering import lower
from gpukern.fusion.matcher import find
from gpukern.fusion.prediction import kernel
from gpukern.fusion.settling import Settled
from gpukern.runtime.device import H100
from tests.fusion.networks import conv, net, norm

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def test_plan_bytes_and_floor_of_a_group():
    model, (x,) = net(lambda m, x: m.c((m.b(m.a(x)) + x).flatten(1)).relu(), a=conv(), b=norm(), c=nn.Linear(196, 8))
    x = x.half()
    captured = capture_program(private_copy(model).half(), model, (x,), Signature.of(model), dynamic_batch=True)
    lowered = lower(captured, find(Settled(captured)).matches, channels_last=True)
    graph = describe.shaped(lowered.module.graph, dict(lowered.module.named_buffers()), {}, (x,))
    found = [each for node in graph.nodes if node.op == "call_function" and (each := kernel(node, H100, True))]
    convolution, linear = found
    # The image, the residual (the same, but the kernel reads it again) and the output; the weight.
    assert convolution.bytes == 2 * (3 * x.numel() + 4 * 4 * 9)
    assert linear.bytes == 2 * (x.numel() + 196 * 8 + 2 * 8)
    for each in found:
        assert each.plan
        assert each.floor == pytest.approx(each.bytes / H100.peaks.bandwidth)
        assert each.expected > each.floor
