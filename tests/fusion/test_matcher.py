"""What the matcher declines, and what it says of it then."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gpukern.fusion.calls import Signature
from gpukern.fusion.capture import capture_program, private_copy
from gpukern.fusion.constants import evaluate_constants
from gpukern.fusion.matcher import Declined, find
from gpukern.fusion.settling import settle
from tests.fusion.networks import conv, net, norm

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("reference_mode"),
]


def forward(m, x):
    y = m.b(F.relu(m.a(m.b(x))))
    return F.relu(y) + m.c(y)


@pytest.fixture(scope="module")
def program():
    model, inputs = net(forward, a=conv(), b=norm(), c=conv())
    with torch.no_grad():
        captured = capture_program(private_copy(model), model, inputs, Signature.of(model), dynamic_batch=False)
    return evaluate_constants(captured)


def declined(program, *skip: str) -> list[Declined]:
    return find(settle(program, skip), skip).declined


def test_what_stays_is_declined_once_in_the_order_of_the_computation(program):
    first, second, relu = declined(program)
    assert first.reason == "follows the model's input; a (conv2d) after it pads it with zeros, which are not shifted"
    assert not first.follows and not first.asked
    assert second.reason == "relu, relu, comes between it and the conv2d; relu, relu_1, follows"
    assert second.follows and not second.asked
    # A batch norm that is alone is no layer that an activation could be put into.
    assert relu.reason == "follows batch_norm, b (batch_norm_default_1): no convolution or linear layer"
    assert not relu.follows


def test_what_was_skipped_is_told_from_what_could_not_be(program):
    asked = {each.node.name: (each.reason, each.follows) for each in declined(program, "c", "a") if each.asked}
    assert asked == {
        "conv2d": ("skipped, by 'a'", False),
        "relu": ("skipped, by 'a'", True),
        "conv2d_1": ("skipped, by 'c'", False),
        "add": ("skipped, by 'c'", True),
    }
