"""Named devices: found by name, and with numbers that fit together."""

from __future__ import annotations

import pytest

from gpukern.runtime.device import (
    DEVICES,
    EMULATED,
    H100,
    L4,
    RTX_3090,
    RTX_4090,
    RTX_5090,
    DeviceSpec,
    assumed_peaks,
    named_device,
)

#: Boost clocks in GHz, which the rates of fp32 are printed for.
CLOCKS = {
    "a100": 1.41, "rtx3090": 1.695, "a10": 1.695, "l4": 2.04, "rtx4090": 2.52, "h100": 1.98, "h200": 1.98,
    "gh200": 1.98, "b200": 1.98, "b300": 1.98, "rtx5090": 2.407,
}  # fmt: skip


@pytest.mark.parametrize("name", ["H100", "h100", " H100 ", "h-100"])
def test_harmless_spellings(name):
    assert named_device(name) is H100


@pytest.mark.parametrize("name", ["RTX 4090", "rtx-4090", "RTX_4090", "rtx4090"])
def test_harmless_spellings_of_two_words(name):
    assert named_device(name) is RTX_4090


@pytest.mark.parametrize("name", ["V100", "", "4090", "emulated"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="a100, rtx3090, a10, l4, rtx4090, h100, h200, gh200, b200, b300, rtx5090"):
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
    float8 = ["float8"] if DEVICES[name].multiplies_float8 else []
    assert list(rates) == ["float16", "bfloat16", "tf32", "tf32x3", "fma", "float32", "int8", *float8]
    assert rates["float16"] == rates["bfloat16"] == pytest.approx(2 * rates["tf32"], rel=0.03)
    assert rates["tf32"] >= rates["fma"]


@pytest.mark.parametrize("name", DEVICES)
def test_tensor_cores_double_their_rate_for_bytes(name):
    """Of int8 four times a GeForce's rate of halves, which it sums in fp32 at half the rate; next to none on a B300."""
    rates, gaming = DEVICES[name].peaks.matrix_rates, name in ("rtx3090", "rtx4090", "rtx5090")
    times = {"b300": 1 / 15}.get(name, 4 if gaming else 2)
    assert rates["int8"] == pytest.approx(times * rates["float16"], rel=0.005)
    if "float8" in rates:
        assert rates["float8"] == pytest.approx(2 * rates["float16"], rel=0.005)


def test_full_precision_takes_the_faster_way():
    """Three products on tensor cores, or one beside them: the gaming chips have many cores beside them."""
    for name, device in DEVICES.items():
        rates = device.peaks.matrix_rates
        assert rates["tf32x3"] * 3 == pytest.approx(rates["tf32"])
        assert rates["float32"] == rates["fma" if name in ("rtx3090", "a10", "l4", "rtx4090", "rtx5090") else "tf32x3"]


def test_assumed_peaks():
    """By name, else by age, in proportion to the multiprocessors."""
    assert assumed_peaks(H100) is H100.peaks
    smaller = DeviceSpec("NVIDIA H100 PCIe", (9, 0), 114, H100.shared_memory)
    assert assumed_peaks(smaller).bandwidth == pytest.approx(H100.peaks.bandwidth * 114 / 132)
    unknown = DeviceSpec("NVIDIA A30", (8, 0), 56, 163 * 1024)
    a100 = DEVICES["a100"]
    assert assumed_peaks(unknown).matrix_rates["tf32"] == pytest.approx(a100.peaks.matrix_rates["tf32"] * 56 / 108)
    assert assumed_peaks(EMULATED).bandwidth == pytest.approx(H100.peaks.bandwidth * 2 / 132)


@pytest.mark.parametrize(
    "called, capability, name",
    [
        ("NVIDIA GeForce RTX 5090", (12, 0), "rtx5090"),
        ("NVIDIA GeForce RTX 5080", (12, 0), "rtx5090"),
        ("NVIDIA GeForce RTX 3080", (8, 6), "rtx3090"),
        ("NVIDIA GH200 480GB", (9, 0), "gh200"),
        ("NVIDIA H200", (9, 0), "h200"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "a100"),
        ("NVIDIA A10", (8, 6), "a10"),
        ("NVIDIA B300 SXM6 AC", (10, 3), "b300"),
        ("NVIDIA GB300", (10, 3), "b300"),
        ("NVIDIA GB200", (10, 0), "b200"),
    ],
)
def test_a_device_that_was_asked_is_taken_for_its_relative(called, capability, name):
    """By the driver's names: one is part of another, and a newer architecture is not always a faster one."""
    relative = DEVICES[name]
    assert assumed_peaks(DeviceSpec(called, capability, relative.sm_count, 1)) == relative.peaks


def test_what_an_architecture_can():
    can = {name: (d.copies_boxes, d.multiplies_from_shared_memory) for name, d in DEVICES.items()}
    assert can["a100"] == can["rtx3090"] == can["rtx4090"] == (False, False)
    assert can["h100"] == can["gh200"] == can["b200"] == can["b300"] == (True, True)
    assert can["rtx5090"] == (True, False)


def test_rates_are_dense_and_sum_in_fp32():
    """16-bit multiply-adds a clock of one multiprocessor: 1024 on the A100, of later chips 512, half on gaming ones."""
    for device, clock, expected in (
        (DEVICES["a100"], 1.41, 1024),
        (RTX_3090, 1.695, 256),
        (DEVICES["a10"], 1.695, 512),
        (L4, 2.04, 512),
        (RTX_4090, 2.52, 256),
        (RTX_5090, 2.407, 256),
    ):
        per_clock = device.peaks.matrix_rates["float16"] / (2 * device.sm_count * clock * 1e9)
        assert per_clock == pytest.approx(expected, rel=0.01)


def test_limits():
    assert {name: device.shared_memory // 1024 for name, device in DEVICES.items()} == {
        "a100": 163, "rtx3090": 99, "a10": 99, "l4": 99, "rtx4090": 99, "h100": 227, "h200": 227, "gh200": 227,
        "b200": 227, "b300": 227, "rtx5090": 99,
    }  # fmt: skip
    assert EMULATED.peaks is None
