"""What ``gpukern.compile_report`` counts, in an interpreter that does not emulate."""

from __future__ import annotations

import json
from typing import Any

import pytest

_CODE = """
import json, torch, gpukern
from torch import nn
from torch.utils.checkpoint import checkpoint
from tests.compiler.nets import Block, conv, conv_norm, sequential

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = sequential(conv_norm(3, 8), nn.ReLU(), Block(8, 8)), conv(8, 8)

    def forward(self, x):
        return self.last(self.inner(x))

class Checkpointed(Net):
    def forward(self, x):
        return self.last(checkpoint(self.inner, x, use_reentrant=False))

class Bottleneck(nn.Module):
    def __init__(self, shortcut):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(32, 32)
        self.conv2, self.bn2 = conv_norm(32, 64, 1)
        self.shortcut = nn.Sequential(*conv_norm(32, 64, 1))
        self.last, self.first = conv(64, 32), shortcut

    def forward(self, x):
        shortcut = self.shortcut(x) if self.first else None
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return self.last(torch.relu(y + (shortcut if self.first else self.shortcut(x))))

x, made = torch.randn(2, 3, 8, 8), {}
for name, model in (
    ("plain", Net()),
    ("checkpointed", Checkpointed()),
    ("compiled", torch.compile(Net(), backend="gpukern")),
):
    made[name] = json.loads(gpukern.compile_report(model, x).to_json())
x = torch.randn(16, 32, 64, 64).half().to(memory_format=torch.channels_last)
for first in (False, True):
    model = Bottleneck(first).half().to(memory_format=torch.channels_last)
    made[f"pointwise, {first}"] = json.loads(gpukern.compile_report(model, x).to_json())
print(json.dumps(made))
"""


@pytest.fixture(scope="module")
def reports(run_python) -> dict[str, Any]:
    done = run_python(_CODE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_groups_inside_a_checkpoint_have_its_launches(reports):
    """The second time, in backward, as backward's: the three groups of a convolution and a norm have two each.

    But for the last norm's pass, perhaps: torch stops where it has all that was saved.
    """
    again = {"forward": 0, "backward": 3 * 2 - 1}
    for direction, more in again.items():
        made = reports["plain"], reports["checkpointed"]
        plain, checkpointed = (sum(group[direction]["launches"] for group in each["groups"]) for each in made)
        assert [plain, checkpointed] == [each[direction]["launches"] for each in made]
        assert checkpointed >= plain + more


def test_a_compiled_model_is_reported_as_the_model(reports):
    assert reports["compiled"] == reports["plain"]


@pytest.mark.parametrize("first", [False, True], ids=["shortcut last", "shortcut first"])
def test_a_convolution_between_two_norms_is_reported_as_such(reports, first):
    """Its row has the launches of both norms, in backward of the shortcut's too, as where two norms are added."""
    groups = {group["modules"][0]: group for group in reports[f"pointwise, {first}"]["groups"]}
    assert [name for name, group in groups.items() if group["between_norms"]] == ["conv2"]
    launches = {name: (group["forward"]["launches"], group["backward"]["launches"]) for name, group in groups.items()}
    # The Gram matrix, the statistics, the rest; in backward products, gradients, input gradient and the passes of two
    # norms. The shortcut's weight gradient is in its own row.
    assert launches == {"conv1": (1, 1), "conv2": (3, 5), "shortcut.0": (1, 1), "last": (1, 2)}
