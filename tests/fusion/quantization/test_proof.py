"""Planted faults: a wrong model in eight bits is refused, whatever its target."""

from __future__ import annotations

import pytest
import torch

import gpukern
from gpukern.fusion import FusionError
from gpukern.fusion.quantization import rewriting, scheme
from gpukern.fusion.quantization.formats import FP8, INT8, half_a_step, rounded_to, scale_for, stored, weight_scales
from tests.fusion.quantization.nets import batches, chain, residual

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("reference_mode"),
]


def fused(model, dtype: str = "int8"):
    torch.manual_seed(0)
    return gpukern.fuse(model(), batches(1, 2)[0], dtype=dtype, calibrate=batches(2), target=0.01)


def changed(monkeypatch, name: str, change) -> None:
    """Every node that the rewriting makes for a layer is given changed constants."""
    held = rewriting._Rewriting.held

    def other(self, called: str, tensor):
        return held(self, called, change(tensor) if tensor is not None and called.endswith(name) else tensor)

    monkeypatch.setattr(rewriting._Rewriting, "held", other)


def one_larger(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[0] *= 1.02
    return tensor


def one_weight(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1).reshape(-1)
    flat = flat.clone()
    flat[0] = 1 - flat[0].sign()
    return (
        flat.view(tensor.shape)
        if tensor.is_contiguous()
        else flat.view(tensor.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    )


FAULTS = {
    "a scale of one channel": ("_scale", one_larger),
    "no bias": ("_added", torch.zeros_like),
    "the bias of one channel": ("_added", lambda bias: bias + 0.05 * (torch.arange(len(bias)) == 1)),
    "one weight": ("_weight8", one_weight),
    "channels in another order": ("_weight8", lambda weight: weight.flip(0)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_layer_is_found_and_named(name, monkeypatch):
    changed(monkeypatch, *FAULTS[name])
    with pytest.raises(FusionError, match=r"wrong in 8 bits: .* To blame is conv2d \+ batch_norm \+ relu"):
        fused(chain)


def test_a_wrong_scale_of_a_residual_is_found(monkeypatch):
    scale_of = scheme.Scheme.scale_of

    def wrong(self, name):
        found = scale_of(self, name)
        return found * 1.03 if found is not None and self.wrong else found

    monkeypatch.setattr(scheme.Scheme, "scale_of", wrong)
    monkeypatch.setattr(scheme.Scheme, "wrong", False, raising=False)
    layer = rewriting._Rewriting.layer

    def with_wrong(self, old, node):
        has_residual = len(old.args) > 3 and isinstance(old.args[3], torch.fx.Node)
        monkeypatch.setattr(scheme.Scheme, "wrong", has_residual)
        try:
            return layer(self, old, node)
        finally:
            monkeypatch.setattr(scheme.Scheme, "wrong", False)

    monkeypatch.setattr(rewriting._Rewriting, "layer", with_wrong)
    with pytest.raises(FusionError, match=r"wrong in 8 bits: .* add"):
        fused(residual)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_without_a_fault_it_passes(dtype):
    told = fused(chain, dtype).report.quantization
    assert sum(group.precision == told.format for group in told.groups) >= 4


# ---- the formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [INT8, FP8], ids=str)
def test_numbers_are_stored_within_half_a_step(format):
    x = torch.randn(4001, dtype=torch.float64) * 3
    scale = scale_for(float(x.abs().max()), format)
    error = (rounded_to(x, scale, format) - x).abs()
    assert (error <= half_a_step(x, torch.tensor(scale), format) * (1 + 1e-6)).all() and error.max() > 0
    assert stored(torch.tensor([1e9, -1e9, 0.0]), scale, format).float().tolist() == [
        format.largest,
        -format.largest,
        0,
    ]


def test_integers_round_to_the_nearest_even_and_never_to_the_lowest():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -200.0])
    assert stored(x, 1.0, INT8).tolist() == [0, 2, 2, 0, -2, -127]


@pytest.mark.parametrize("dim, shape, groups", [(0, (6, 2, 3, 3), 2), (1, (4, 3, 2, 2), 2), (0, (5, 7), 1)])
def test_each_output_channel_has_its_scale(dim, shape, groups):
    weight = torch.randn(shape, dtype=torch.float64)
    scales = weight_scales(weight, dim, groups, INT8)
    channels = shape[0] if dim == 0 else shape[1] * groups
    expected = []
    for channel in range(channels):
        if dim == 0:
            part = weight[channel]
        else:
            group, within = divmod(channel, shape[1])
            part = weight[group * shape[0] // groups : (group + 1) * shape[0] // groups, within]
        expected.append(part.abs().max() / 127)
    torch.testing.assert_close(scales, torch.stack(expected))
