"""``torch.utils.flop_counter`` counts for gpukern's layers what it counts for torch's, backward and fused too."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gpukern
from gpukern.runtime.mode import Mode, force_mode


def counted(model: nn.Module, x: torch.Tensor, backward: bool = True) -> int:
    x = x.clone().requires_grad_(backward)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        y = model(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


NETWORKS = {
    "strided, dilated": nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2)),
    "grouped, same": nn.Conv2d(4, 8, 3, padding="same", groups=2, bias=False),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4),
    "reflected": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "transposed": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed, grouped": nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False),
    "linear of rows": nn.Linear(9, 5),
    "with epilogues": nn.Sequential(nn.Conv2d(4, 4, 3), nn.GELU(), nn.ConvTranspose2d(4, 4, 3), nn.SiLU()),
    "normalized": nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
    "classifier": nn.Sequential(
        *(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3))
    ),
}


@pytest.mark.parametrize("mode", [Mode.REFERENCE, Mode.EMULATED], ids=lambda mode: mode.value)
@pytest.mark.parametrize("name", NETWORKS)
def test_layers_count_as_torchs(name, mode):
    model, x = NETWORKS[name], torch.randn(2, 4, 9, 9)
    converted = gpukern.convert(model)
    with force_mode(mode):
        for backward in (False, True):
            assert counted(converted, x, backward) == counted(model, x, backward) > 0


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)
        self.line, self.up, self.last = nn.Conv1d(4, 4, 3, padding=1), nn.ConvTranspose2d(4, 3, 2), nn.Linear(10, 2)

    def forward(self, x):
        y = torch.relu(self.norm(self.first(x)) + x)
        return self.last(self.up(self.line(y.flatten(2)).unflatten(2, (9, 9))))


@pytest.mark.parametrize(
    "model",
    [
        Residual(),
        nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(4 * 81, 6), nn.BatchNorm1d(6), nn.GELU()),
    ],
    ids=["residual", "pooled", "linear"],
)
def test_fused_models_count_as_the_original(model):
    x = torch.randn(2, 4, 9, 9)
    expected = counted(model.eval(), x, backward=False)
    with torch.no_grad():
        fused = gpukern.fuse(model, x)
    assert counted(fused, x, backward=False) == expected > 0


def test_where_the_counter_is_imported_first(run_python):
    code = """
import torch
from torch.utils.flop_counter import FlopCounterMode
import gpukern
with FlopCounterMode(display=False) as counter:
    gpukern.nn.Linear(3, 4)(torch.ones(2, 3))
print(counter.get_total_flops())
"""
    run = run_python(code)
    assert run.stdout == "48\n", run.stderr
