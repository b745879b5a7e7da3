"""The report: multiply-adds by hand, receptive fields, the table."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gpukern
from gpukern.densify import dense

pytestmark = pytest.mark.usefixtures("reference_mode")


def ciresan(width: int = 48) -> nn.Sequential:
    """N4 of Cireşan et al. 2012, for patches of 95 × 95."""
    layers: list[nn.Module] = []
    for inputs, kernel in ((1, 4), (width, 5), (width, 4), (width, 4)):
        layers += [nn.Conv2d(inputs, width, kernel), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 9, 200), nn.ReLU(), nn.Linear(200, 2))


def test_the_multiply_adds_of_ciresans_network_are_those_by_hand():
    report = dense(ciresan(), 95).report
    # 95 → 92 → 46 → 42 → 21 → 18 → 9 → 6 → 3.
    patchwise = 48 * 16 * 92**2, 48 * 48 * 25 * 42**2, 48 * 48 * 16 * 18**2, 48 * 48 * 16 * 6**2, 48 * 9 * 200, 200 * 2
    per_pixel = 48 * 16, 48 * 48 * 25, 48 * 48 * 16, 48 * 48 * 16, 48 * 9 * 200, 200 * 2
    assert [layer.patchwise for layer in report.layers if layer.patchwise] == list(patchwise)
    assert [layer.dense for layer in report.layers if layer.dense] == list(per_pixel)
    assert report.patchwise == sum(patchwise) == 121_464_592
    assert report.dense == sum(per_pixel) == 218_896
    assert report.ratio == 121_464_592 / 218_896


def test_the_multiply_adds_of_an_image_are_those_by_hand():
    report = dense(ciresan(), 95).report
    rows = 512 - 94
    # The rows of each convolution's result: 512 − 3, less 1 by the pool, less 4·2 by the next convolution, and so on.
    sizes = [509, 500, 486, 458, 418, 418]
    assert sizes[-1] == rows
    per_pixel = [48 * 16, 48 * 48 * 25, 48 * 48 * 16, 48 * 48 * 16, 48 * 9 * 200, 200 * 2]
    counted = report.multiply_adds((512, 512))
    assert counted.patchwise == 121_464_592 * rows**2
    assert counted.dense == sum(n * size**2 for n, size in zip(per_pixel, sizes, strict=True))
    assert counted.ratio == counted.patchwise / counted.dense
    assert report.multiply_adds((95, 95)).patchwise == 121_464_592


@pytest.mark.parametrize("border", ["valid", "reflect"])
def test_the_multiply_adds_of_an_image_are_those_that_run(border):
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, (2, 1), dilation=2),
        nn.Flatten(),
        nn.Linear(32, 2),
    )
    network = dense(model, 19 if border == "valid" else (19, 18), border=border)
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 2, 33, 28))
    assert 2 * network.report.multiply_adds((33, 28)).dense == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 2, *network.patch_size))
    assert 2 * network.report.patchwise == counter.get_total_flops()


def test_an_image_without_patches_is_refused():
    with pytest.raises(ValueError, match="an image of 94 × 200 has no patch of 95 × 95"):
        dense(ciresan(), 95).report.multiply_adds((94, 200))
    assert dense(ciresan(4), 95, border="reflect").report.multiply_adds((94, 200)).patchwise > 0


def test_receptive_fields_grow_to_the_part_of_the_patch_that_is_read():
    report = dense(ciresan(), 95).report
    fields = [layer.receptive_field[0] for layer in report.layers if layer.kernel]
    assert fields == [4, 5, 13, 15, 27, 31, 55, 63, 95, 95]
    assert report.receptive_field == report.patch_size == (95, 95)
    assert [layer.dilation[0] for layer in report.layers if layer.dilation] == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16]
    spread = dense(nn.Sequential(nn.Conv2d(1, 2, 2, stride=2), nn.Conv2d(2, 2, 3, dilation=2)), 10).report
    assert [layer.receptive_field for layer in spread.layers] == [(2, 2), (10, 10)]
    unread = dense(nn.Sequential(nn.Conv2d(1, 2, 2, stride=3), nn.Conv2d(2, 2, (5, 6))), (16, 17)).report
    assert unread.receptive_field == (14, 17)
    assert [layer.kind for layer in unread.layers] == ["Conv2d", "Conv2d"]


def test_the_table_has_every_layer_and_the_sums():
    report = dense(ciresan(), 95).report
    table = str(report)
    assert "Sequential, patches of 95 × 95" in table
    assert "121,464,592" in table
    assert "218,896" in table
    assert "555×" in table
    assert len([line for line in table.splitlines() if "Conv2d" in line or "MaxPool2d" in line]) == 8


def test_the_dict_is_that_of_json():
    found = dense(ciresan(), (95, 95), border="reflect").report.to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["patchwise"] == 121_464_592
    assert found["dense"] == 218_896
    assert found["patch_size"] == found["receptive_field"] == [95, 95]
    assert found["border"] == "reflect"
    assert found["layers"][0] | {"margin": None} == {
        "name": "0", "kind": "Conv2d", "kernel": [4, 4], "dilation": [1, 1], "receptive_field": [4, 4],
        "size": [92, 92], "patchwise": 6_500_352, "dense": 768, "margin": None,
    }  # fmt: skip


def test_names_are_at_the_top_of_the_package():
    network = gpukern.dense(ciresan(2), 95)
    assert isinstance(network, gpukern.DenseNetwork)
    assert isinstance(network.report, gpukern.DenseReport)
