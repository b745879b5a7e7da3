"""What a convolution costs: by hand, against the launches that are made, and never below the floor."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gpukern.ops._conv2d import kernels, launch, weight_kernels
from gpukern.ops._conv2d.cost import cost, work
from gpukern.ops._conv2d.plan import ConvPlan, Direction, Variant, plan
from gpukern.ops._conv2d.prepare import prepare_gather, prepare_weight_grad
from gpukern.ops._conv2d.problem import conv_problem
from gpukern.runtime.current_device import pretend
from gpukern.runtime.device import A100, B200, DEVICES, EMULATED, H100, Peaks
from gpukern.runtime.roofline import floor
from tests.ops.conv_cases import CASES

FORWARD, INPUT_GRAD, WEIGHT_GRAD = Direction
NONE = (False, False)
#: dtype, precision, and the kind of the operations.
KINDS = (
    (torch.float16, "ieee", "float16"),
    (torch.bfloat16, "ieee", "bfloat16"),
    (torch.float32, "tf32", "tf32"),
    (torch.float32, "ieee", "float32"),
)


def problem(N, C, H, W, K, R, S, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    (top, left) = padding
    return conv_problem((N, C, H, W), (K, C // groups, R, S), None, stride, (top, top, left, left), dilation, groups)


def square(N, C, size, K, kernel, stride=1, groups=1):
    return problem(N, C, size, size, K, kernel, kernel, (stride,) * 2, (kernel // 2,) * 2, groups=groups)


#: ResNet-50 at batch 32.
CONV2 = square(32, 64, 56, 64, 3)
STEM = square(32, 3, 224, 64, 7, 2)
LAYERS = {
    "stem": STEM,
    "conv2 3x3": CONV2,
    "conv2 1x1": square(32, 64, 56, 256, 1),
    "conv3 3x3 stride 2": square(32, 128, 56, 128, 3, 2),
    "conv3 shortcut": square(32, 256, 56, 512, 1, 2),
    "conv4 3x3": square(32, 256, 14, 256, 3),
    "conv5 3x3": square(32, 512, 7, 512, 3),
    "conv5 3x3, one image": square(1, 512, 7, 512, 3),
    "MobileNet expansion": square(32, 24, 56, 144, 1),
    "MobileNet depthwise": square(32, 144, 56, 144, 3, 2, groups=144),
    "ResNeXt groups of 8": square(32, 256, 28, 256, 3, groups=32),
    "ResNeXt groups of 4": square(32, 128, 56, 128, 3, groups=32),
    "LeNet first": square(32, 1, 28, 20, 5),
}
for case in CASES:
    pair = {name: (v, v) if isinstance(v, int) else v for name, v in case.arguments.items() if name != "groups"}
    if not isinstance(case.padding, str):
        LAYERS[case.name] = problem(*case.input, case.outputs, *case.kernel, **pair, groups=case.groups)


def endless_memory(device):
    """``device`` with a bandwidth that never bounds: its seconds are those of the multiprocessors."""
    return dataclasses.replace(device, peaks=Peaks(1e30, device.peaks.matrix_rates))


# ---- by hand -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", Direction)
def test_work_of_a_resnet_layer(direction):
    must = work(CONV2, direction, 2, "float16")
    assert must.flops == 2 * (32 * 56 * 56) * 64 * (64 * 9) == 7_398_752_256
    assert must.bytes == 2 * (32 * 64 * 56 * 56 * 2 + 64 * 64 * 9) == 25_763_840
    # 25.8 MB / 3.35 TB/s = 7.69 µs, just above 7.40 GFLOP / 989.4 TFLOP/s = 7.48 µs; on an A100 arithmetic is slower.
    least = floor(must, H100.peaks)
    assert (least.bound, least.seconds) == ("memory", pytest.approx(7.6907e-6, rel=1e-4))
    least = floor(must, A100.peaks)
    assert (least.bound, least.seconds) == ("compute", pytest.approx(23.714e-6, rel=1e-4))


def test_cost_of_a_resnet_layer():
    # 100352 pixels in tiles of 128 × 64: 784 tiles of 2·128·64·576 flops, on 132 multiprocessors in six waves.
    choice = plan(CONV2, FORWARD, "float16", "ieee", H100)
    found = cost(CONV2, FORWARD, choice, 2, NONE, H100, "float16")
    assert (choice.block_m, choice.block_n, found.tiles, found.launches) == (128, 64, 784, 1)
    assert found.waves == pytest.approx(784 / 132)
    assert found.efficiency == 1
    assert found.bytes == 25_763_840
    assert found.seconds == pytest.approx(7.6907e-6, rel=1e-4)  # six waves would take 7.554 µs
    found = cost(CONV2, FORWARD, choice, 2, NONE, endless_memory(H100), "float16")
    assert found.seconds == pytest.approx(6 * 9_437_184 * 132 / 989.4e12)


def test_a_sum_over_few_channels_is_rounded_up_once():
    choice = plan(STEM, FORWARD, "float16", "ieee", H100)
    assert choice.variant is Variant.FLAT and choice.block_k == 32
    found = cost(STEM, FORWARD, choice, 2, NONE, H100, "float16")
    assert found.efficiency == pytest.approx(147 / 160)  # 7·7·3 in five steps
    assert found.bytes == 2 * (32 * 3 * 224 * 224 + 64 * 147 + 32 * 64 * 112 * 112)


def test_a_stride_beyond_the_kernel_reads_part_of_the_image():
    p = square(1, 256, 56, 512, 1, 2)
    x, y, w = 256 * 56 * 56, 512 * 28 * 28, 256 * 512
    assert work(p, FORWARD, 2, "float16").bytes == 2 * (x // 4 + w + y)
    assert work(p, WEIGHT_GRAD, 2, "float16").bytes == 2 * (x // 4 + y + w)
    # All of dx is written, zeros too.
    assert work(p, INPUT_GRAD, 2, "float16").bytes == 2 * (y + w + x)


def test_taps_that_reach_no_pixel_of_dx_do_not_count():
    p = square(1, 16, 57, 16, 3, 2)
    assert work(p, FORWARD, 2, "float16").flops == 2 * (29 * 3) ** 2 * 16 * 16
    # Even rows, 29 of them, meet one tap, the 28 odd ones two.
    assert work(p, INPUT_GRAD, 2, "float16").flops == 2 * (29 + 2 * 28) ** 2 * 16 * 16


def test_phases_of_the_input_gradient_walk_their_own_taps():
    # 3×3 at stride 2: 1, 2, 2 and 4 taps. 784 pixels a phase in 13 tiles of 64 take 4 channel blocks each.
    p = square(1, 128, 56, 128, 3, 2)
    choice = ConvPlan(Variant.TAPS, 64, 64, 32, num_warps=4, num_stages=3)
    found = cost(p, INPUT_GRAD, choice, 2, NONE, endless_memory(H100), "float16")
    assert found.tiles == 13 * 2 * 4
    assert found.efficiency == pytest.approx(784 / (13 * 64))
    # There are fewer tiles than multiprocessors: the longest decides.
    assert found.seconds == pytest.approx(2 * 64 * 64 * 128 * 4 * 132 / 989.4e12)


def test_phases_without_a_tap_cost_no_arithmetic():
    p = square(32, 256, 56, 512, 1, 2)
    choice = plan(p, INPUT_GRAD, "float16", "ieee", H100)
    found = cost(p, INPUT_GRAD, choice, 2, NONE, H100, "float16")
    assert found.efficiency == 1 and found.tiles % 4 == 0


def test_splits_add_a_launch_and_partial_sums():
    choice = plan(CONV2, WEIGHT_GRAD, "float16", "ieee", H100)
    assert choice.splits > 1
    split, whole = (
        cost(CONV2, WEIGHT_GRAD, c, 2, NONE, H100, "float16") for c in (choice, dataclasses.replace(choice, splits=1))
    )
    assert (split.launches, whole.launches) == (2, 1)
    assert split.bytes - whole.bytes == 2 * 4 * choice.splits * 64 * 64 * 9
    assert split.tiles == choice.splits * whole.tiles


def test_the_last_split_may_be_short():
    # 10 pixels in 4 shares of 3: 3, 3, 3, 1; with steps of 2 that is 2 + 2 + 2 + 1.
    p = problem(1, 16, 10, 1, 16, 1, 1)
    choice = ConvPlan(Variant.TAPS, 16, 16, 2, num_warps=4, num_stages=3, splits=4)
    assert cost(p, WEIGHT_GRAD, choice, 2, NONE, H100, "float16").efficiency == pytest.approx(10 / 14)


@pytest.mark.parametrize("direction", Direction)
def test_packing_reads_and_writes_the_operand_once_more(direction):
    choice = plan(CONV2, direction, "float16", "ieee", H100)
    image, filter = 32 * 64 * 56 * 56, 64 * 64 * 9
    sizes = (image, image if direction is WEIGHT_GRAD else filter)
    plain = cost(CONV2, direction, choice, 2, NONE, H100, "float16")
    for packed in ((True, False), (False, True), (True, True)):
        found = cost(CONV2, direction, choice, 2, packed, H100, "float16")
        assert found.launches == plain.launches + sum(packed)
        assert found.bytes - plain.bytes == 2 * 2 * sum(s for s, copy in zip(sizes, packed, strict=True) if copy)
        assert found.seconds > plain.seconds


def test_packed_operands_are_told_apart():
    p = problem(8, 16, 10, 10, 64, 3, 3)
    y, w = 8 * 64 * 8 * 8, 64 * 16 * 9
    for packed, size in (((True, False), y), ((False, True), w)):
        choice = plan(p, INPUT_GRAD, "float16", "ieee", H100)
        found, plain = (cost(p, INPUT_GRAD, choice, 2, how, H100, "float16") for how in (packed, NONE))
        assert found.bytes - plain.bytes == 4 * size


@pytest.mark.parametrize("direction", Direction)
def test_element_by_element_has_the_rate_of_float32(direction):
    p = LAYERS["MobileNet depthwise"]
    choice = plan(p, direction, "float16", "ieee", H100)
    assert choice.variant is Variant.DIRECT
    found = cost(p, direction, choice, 2, NONE, endless_memory(H100), "float16").seconds
    rates = {"float16": 1.0, "float32": 2 * 66.9e12}
    faster = dataclasses.replace(H100, peaks=Peaks(1e30, rates))
    assert cost(p, direction, choice, 2, NONE, faster, "float16").seconds == pytest.approx(found / 2)


def test_cost_of_a_depthwise_layer():
    # 25088 pixels by 144 channels in tiles of 32 × 64: 784 × 3 of them, 18 waves; nine taps each.
    p = LAYERS["MobileNet depthwise"]
    choice = plan(p, FORWARD, "float16", "ieee", H100)
    assert (choice.block_m, choice.block_n) == (32, 64)
    found = cost(p, FORWARD, choice, 2, NONE, endless_memory(H100), "float16")
    assert (found.tiles, found.efficiency) == (2352, 144 / 192)
    assert found.seconds == pytest.approx(18 * 2 * 32 * 64 * 9 * 132 / 66.9e12)


def test_a_device_without_peaks():
    with pytest.raises(ValueError, match="emulated"):
        cost(CONV2, FORWARD, plan(CONV2, FORWARD, "float16", "ieee", EMULATED), 2, NONE, EMULATED, "float16")


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize(
    "p", [square(0, 16, 6, 16, 3), square(0, 32, 6, 32, 3, groups=32), problem(2, 0, 4, 4, 8, 3, 3)], ids=str
)
def test_nothing_to_do(p, direction):
    choice = plan(p, direction, "float16", "ieee", H100)
    found = cost(p, direction, choice, 2, NONE, H100, "float16")
    assert floor(work(p, direction, 2, "float16"), H100.peaks).seconds <= found.seconds < 1e-6
    if not p.N:
        assert (found.tiles, found.launches) == (0, 0)


# ---- against the launches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "NCHW"])
@pytest.mark.parametrize("name", LAYERS)
def test_cost_counts_the_launches_that_are_made(name, channels_last, monkeypatch):
    p = LAYERS[name]
    for device in (H100, A100):
        for dtype, precision, kind in KINDS:
            for direction in Direction:
                prepared, launches = _launched(p, direction, channels_last, dtype, precision, device, monkeypatch)
                choice = plan(p, direction, str(dtype).removeprefix("torch."), precision, device)
                found = cost(p, direction, choice, dtype.itemsize, prepared.pack, device, kind)
                main = [grid for kernel, grid in launches if kernel in _MAIN]
                assert found.launches == len(launches)
                assert found.tiles == sum(map(math.prod, main))
                least = floor(work(p, direction, dtype.itemsize, kind), device.peaks).seconds
                assert least <= found.seconds and 0 < found.efficiency <= 1


_MAIN = (kernels.conv2d_gather_kernel, weight_kernels.conv2d_weight_grad_kernel)


def _launched(p, direction, channels_last, dtype, precision, device, monkeypatch):
    """What ``launch.py`` prepares, and the (kernel, grid) of each launch, for tensors without memory."""
    launches = []
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, *rest: launches.append((kernel, grid)))
    monkeypatch.setattr(launch, "conv_precision", lambda _: precision)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, y, w = (
        torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=memory_format)
        for shape in ((p.N, p.C, p.H, p.W), (p.N, p.K, p.P, p.Q), (p.K, p.group_inputs, p.R, p.S))
    )
    with pretend(device):
        if direction is WEIGHT_GRAD:
            launch.conv2d_weight_grad(p, y, x, channels_last)
            prepared = prepare_weight_grad(p, y.stride(), x.stride(), channels_last, dtype, precision, device)
        elif direction is INPUT_GRAD:
            launch.conv2d_input_grad(p, y, w, channels_last)
            prepared = prepare_gather(p, True, y.stride(), w.stride(), channels_last, dtype, precision, "none", device)
        else:
            launch.conv2d(p, x, w, None, "none", 0.0)
            prepared = prepare_gather(p, False, x.stride(), w.stride(), None, dtype, precision, "none", device)
    return prepared, launches


# ---- in general ----------------------------------------------------------------------------------------------------

_SIZE, _SMALL = st.integers(1, 70), st.integers(1, 7)


@given(
    st.integers(0, 70), st.tuples(_SIZE, _SIZE), st.tuples(_SIZE, _SIZE), st.tuples(_SMALL, _SMALL),
    st.tuples(_SMALL, _SMALL), st.tuples(st.integers(0, 6), st.integers(0, 6)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)), st.integers(1, 20),
    st.sampled_from(sorted(DEVICES)), st.sampled_from(KINDS),
)  # fmt: skip
def test_no_plan_beats_the_floor(N, channels, size, kernel, stride, padding, dilation, groups, name, how):
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    assume(all(s + 2 * pad >= extent for s, pad, extent in zip(size, padding, extents, strict=True)))
    C, K = (groups * (count if groups == 1 else 1 + count % 12) for count in channels)
    p = problem(N, C, *size, K, *kernel, stride, padding, dilation, groups)
    dtype, precision, kind = how
    device = DEVICES[name]
    for direction in Direction:
        choice = plan(p, direction, str(dtype).removeprefix("torch."), precision, device)
        must = work(p, direction, dtype.itemsize, kind)
        # Also where nothing but arithmetic bounds.
        for machine in (device, endless_memory(device)):
            found = cost(p, direction, choice, dtype.itemsize, NONE, machine, kind)
            assert floor(must, machine.peaks).seconds <= found.seconds
        assert 0 <= found.efficiency <= 1 and found.bytes >= must.bytes
        assert found.waves * device.sm_count == pytest.approx(found.tiles)


def test_a_faster_device_is_predicted_faster():
    choice = plan(CONV2, FORWARD, "float16", "ieee", A100)
    slow, fast = (cost(CONV2, FORWARD, choice, 2, NONE, device, "float16").seconds for device in (A100, B200))
    assert fast < slow
