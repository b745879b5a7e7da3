"""Models in eight bits go through pickle, torch.save and copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import gpukern

pytestmark = pytest.mark.usefixtures("reference_mode")


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("again", [lambda model: pickle.loads(pickle.dumps(model)), _saved, copy.deepcopy])
def test_weights_in_eight_bits_come_back(dtype, again):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)
    x = torch.randn(4, 3, 9, 9)
    fused = gpukern.fuse(nn.Sequential(*layers), x, dtype=dtype, calibrate=[x, x], verify=False)
    held = {name: each.dtype for name, each in fused.named_buffers()}
    assert {torch.int8, torch.float8_e4m3fn} & set(held.values())
    back = again(fused)
    assert {name: each.dtype for name, each in back.named_buffers()} == held
    assert torch.equal(back(x), fused(x))
    # The original still has its own.
    assert {name: each.dtype for name, each in fused.named_buffers()} == held


def test_a_model_that_holds_float8_can_be_fused():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.register_buffer("table", torch.randn(4, 1, 1).to(torch.float8_e4m3fn))

        def forward(self, x):
            return self.conv(x) + self.table.float()

    model, x = Held().eval(), torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(gpukern.fuse(model, x)(x), model(x))
