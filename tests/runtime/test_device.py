"""Named devices: found by name, and with numbers that fit together."""

from __future__ import annotations

import pytest

from gpukern.runtime.device import DEVICES, EMULATED, H100, L4, RTX_4090, DeviceSpec, assumed_peaks, named_device

#: Boost clocks in GHz, which the rates of fp32 are printed for.
CLOCKS = {"a100": 1.41, "l4": 2.04, "rtx4090": 2.52, "h100": 1.98, "h200": 1.98, "b200": 1.98}


@pytest.mark.parametrize("name", ["H100", "h100", " H100 ", "h-100"])
def test_harmless_spellings(name):
    assert named_device(name) is H100


@pytest.mark.parametrize("name", ["RTX 4090", "rtx-4090", "RTX_4090", "rtx4090"])
def test_harmless_spellings_of_two_words(name):
    assert named_device(name) is RTX_4090


@pytest.mark.parametrize("name", ["V100", "", "4090", "emulated"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="a100, l4, rtx4090, h100, h200, b200"):
        named_device(name)


@pytest.mark.parametrize("name", DEVICES)
def test_full_precision_is_the_multiprocessors_clock(name):
    """FLOP/s of fp32 = 2 · cores · clock; 64 cores a multiprocessor on the A100, 128 since."""
    device = DEVICES[name]
    cores = 64 if name == "a100" else 128
    assert device.peaks.matrix_rates["fma"] == pytest.approx(
        2 * cores * device.sm_count * CLOCKS[name] * 1e9, rel=0.005
    )


@pytest.mark.parametrize("name", DEVICES)
def test_tensor_cores_halve_their_rate_with_the_operands(name):
    """TF32 has half the rate of 16-bit operands; printed numbers are rounded, to two digits for the B200."""
    rates = DEVICES[name].peaks.matrix_rates
    assert list(rates) == ["float16", "bfloat16", "tf32", "tf32x3", "fma", "float32"]
    assert rates["float16"] == rates["bfloat16"] == pytest.approx(2 * rates["tf32"], rel=0.03)
    assert rates["tf32"] >= rates["fma"]


def test_full_precision_takes_the_faster_way():
    """Three products on tensor cores, or one beside them: the gaming chips have many cores beside them."""
    for name, device in DEVICES.items():
        rates = device.peaks.matrix_rates
        assert rates["tf32x3"] * 3 == pytest.approx(rates["tf32"])
        assert rates["float32"] == rates["fma" if name in ("l4", "rtx4090") else "tf32x3"]


def test_assumed_peaks():
    """By name, else by age, in proportion to the multiprocessors."""
    assert assumed_peaks(H100) is H100.peaks
    smaller = DeviceSpec("NVIDIA H100 PCIe", (9, 0), 114, H100.shared_memory)
    assert assumed_peaks(smaller).bandwidth == pytest.approx(H100.peaks.bandwidth * 114 / 132)
    unknown = DeviceSpec("NVIDIA GeForce RTX 3090", (8, 6), 82, 99 * 1024)
    a100 = DEVICES["a100"]
    assert assumed_peaks(unknown).matrix_rates["tf32"] == pytest.approx(a100.peaks.matrix_rates["tf32"] * 82 / 108)
    assert assumed_peaks(EMULATED).bandwidth == pytest.approx(H100.peaks.bandwidth * 2 / 132)


def test_rates_are_dense_and_sum_in_fp32():
    """16-bit multiply-adds a clock of one multiprocessor: 1024 on the A100, 512 and 256 on the two kinds of Ada."""
    for device, clock, expected in ((DEVICES["a100"], 1.41, 1024), (L4, 2.04, 512), (RTX_4090, 2.52, 256)):
        per_clock = device.peaks.matrix_rates["float16"] / (2 * device.sm_count * clock * 1e9)
        assert per_clock == pytest.approx(expected, rel=0.01)


def test_limits():
    assert {name: device.shared_memory // 1024 for name, device in DEVICES.items()} == {
        "a100": 163, "l4": 99, "rtx4090": 99, "h100": 227, "h200": 227, "b200": 227,
    }  # fmt: skip
    assert EMULATED.peaks is None
