"""What a convolution costs: by hand, against the launches that are made, and never below the floor."""

from __future__ import annotations

import dataclasses
import importlib
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gpukern.conv import launch
from gpukern.conv.cost import least_cost, minimum_work
from gpukern.conv.families.registry import FAMILIES, family_of
from gpukern.conv.geometry import dimensions, gemm_mnk
from gpukern.conv.plan import ConvPlan, Direction, Operands, Variant
from gpukern.conv.planner import heuristic_plan, ranking
from gpukern.conv.problem import conv_problem
from gpukern.conv.request import operands_of, shapes
from gpukern.ops._reduction import launch as passes
from gpukern.runtime.current_device import pretend
from gpukern.runtime.device import A100, B200, DEVICES, EMULATED, H100, Peaks
from gpukern.runtime.roofline import Work, floor, window_reads
from gpukern.runtime.strides import dense_strides
from tests.ops.conv_cases import CASES, as_problem

FORWARD, INPUT_GRAD, WEIGHT_GRAD = Direction
HALF = Operands("float16")
KINDS = (
    (torch.float16, "ieee"),
    (torch.bfloat16, "ieee"),
    (torch.float32, "tf32"),
    (torch.float32, "ieee"),
)
TAPS = ConvPlan(Variant.TAPS, 128, 64, 64, num_warps=4, num_stages=3)
DIRECT = ConvPlan(Variant.DIRECT, 32, 64, 1, num_warps=4, num_stages=1)


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
LAYERS |= {case.name: as_problem(case) for case in CASES}


def endless_memory(device):
    """``device`` with a bandwidth that never bounds: its seconds are those of the multiprocessors."""
    return dataclasses.replace(device, peaks=Peaks(1e30, device.peaks.matrix_rates))


def costed(p, direction, choice, operands=HALF, device=H100):
    tiles = family_of(choice).tiles(p, direction, choice)
    return least_cost(p, direction, choice, tiles, operands, device)


# ---- by hand -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", Direction)
def test_work_of_a_resnet_layer(direction):
    must = minimum_work(CONV2, direction, 2, "float16")
    assert must.flops == 2 * (32 * 56 * 56) * 64 * (64 * 9) == 7_398_752_256
    assert must.bytes == 2 * (32 * 64 * 56 * 56 * 2 + 64 * 64 * 9) == 25_763_840
    # 25.8 MB / 3.35 TB/s = 7.69 µs, just above 7.40 GFLOP / 989.4 TFLOP/s = 7.48 µs; on an A100 arithmetic is slower.
    least = floor(must, H100.peaks)
    assert (least.bound, least.seconds) == ("memory", pytest.approx(7.6907e-6, rel=1e-4))
    least = floor(must, A100.peaks)
    assert (least.bound, least.seconds) == ("compute", pytest.approx(23.714e-6, rel=1e-4))


def test_a_convolution_is_a_matrix_product_for_each_tap_group_and_phase():
    p = problem(4, 24, 9, 7, 36, 3, 5, padding=(1, 0), groups=3)  # y of 9 × 3 pixels
    assert gemm_mnk(p, FORWARD) == (4 * 9 * 3, 12, 8)
    assert gemm_mnk(p, INPUT_GRAD) == (4 * 9 * 7, 8, 12)
    assert gemm_mnk(p, WEIGHT_GRAD) == (12, 8, 4 * 9 * 3)
    # Of the four phases of a stride of 2 the largest has 5 × 4 of the 9 × 7 pixels.
    assert gemm_mnk(problem(4, 24, 9, 7, 36, 3, 3, stride=(2, 2)), INPUT_GRAD) == (4 * 5 * 4, 24, 36)


def test_cost_of_a_resnet_layer():
    # 100352 pixels in tiles of 128 × 64: 784 tiles of 2·128·64·576 flops, on 132 multiprocessors in six waves.
    found = costed(CONV2, FORWARD, TAPS)
    assert (found.tiles, found.launches, found.efficiency, found.bytes) == (784, 1, 1, 25_763_840)
    assert found.waves == pytest.approx(784 / 132)
    assert found.compute == pytest.approx(6 * 9_437_184 * 132 / 989.4e12)
    assert found.seconds == pytest.approx(7.6907e-6, rel=1e-4)  # six waves take 7.554 µs
    assert costed(CONV2, FORWARD, TAPS, device=endless_memory(H100)).seconds == found.compute


def test_boxes_reach_past_the_image():
    # 56 × 56 in boxes of 4 × 8 × 8 has none to spare, 7 × 7 in boxes of 1 × 8 × 8 has 15 of 64 pixels.
    box = ConvPlan(Variant.BOX, 256, 64, 64, 8, 3, box=(4, 8, 8))
    assert costed(CONV2, FORWARD, box).efficiency == 1
    small = ConvPlan(Variant.BOX, 64, 64, 64, 4, 3, box=(1, 8, 8))
    assert costed(LAYERS["conv5 3x3"], FORWARD, small).efficiency == pytest.approx(49 / 64)


def test_a_sum_over_few_channels_is_rounded_up_once():
    found = costed(STEM, FORWARD, ConvPlan(Variant.FLAT, 64, 32, 32, num_warps=4, num_stages=3))
    assert found.efficiency == pytest.approx(147 / 160)  # 7·7·3 in five steps
    assert found.bytes == 2 * (32 * 3 * 224 * 224 + 64 * 147 + 32 * 64 * 112 * 112)


def test_a_stride_beyond_the_kernel_reads_part_of_the_image():
    p = square(1, 256, 56, 512, 1, 2)
    x, y, w = 256 * 56 * 56, 512 * 28 * 28, 256 * 512
    assert minimum_work(p, FORWARD, 2, "float16").bytes == 2 * (x // 4 + w + y)
    assert minimum_work(p, WEIGHT_GRAD, 2, "float16").bytes == 2 * (x // 4 + y + w)
    # All of dx is written, zeros too.
    assert minimum_work(p, INPUT_GRAD, 2, "float16").bytes == 2 * (y + w + x)


def test_taps_that_reach_no_pixel_of_dx_do_not_count():
    p = square(1, 16, 57, 16, 3, 2)
    assert minimum_work(p, FORWARD, 2, "float16").flops == 2 * (29 * 3) ** 2 * 16 * 16
    # Even rows, 29 of them, meet one tap, the 28 odd ones two.
    assert minimum_work(p, INPUT_GRAD, 2, "float16").flops == 2 * (29 + 2 * 28) ** 2 * 16 * 16


def test_phases_of_the_input_gradient_walk_their_own_taps():
    # 3×3 at stride 2: 1, 2, 2 and 4 taps. 784 pixels a phase in 13 tiles of 64 take 4 channel blocks each.
    p = square(1, 128, 56, 128, 3, 2)
    found = costed(p, INPUT_GRAD, ConvPlan(Variant.TAPS, 64, 64, 32, num_warps=4, num_stages=3))
    assert found.tiles == 13 * 2 * 4
    assert found.efficiency == pytest.approx(784 / (13 * 64))
    # There are fewer tiles than multiprocessors: the longest decides.
    assert found.compute == pytest.approx(2 * 64 * 64 * 128 * 4 * 132 / 989.4e12)


def test_phases_without_a_tap_cost_no_arithmetic():
    found = costed(square(32, 256, 56, 512, 1, 2), INPUT_GRAD, TAPS)
    assert found.efficiency == 1 and found.tiles % 4 == 0


def test_partial_sums_are_written_and_read():
    choice = dataclasses.replace(TAPS, block_m=64, block_k=32, splits=30)
    whole = dataclasses.replace(choice, splits=1)
    split, plain = (costed(CONV2, WEIGHT_GRAD, each) for each in (choice, whole))
    # The last program to arrive adds them: six at a time, then the five sums of these.
    assert split.launches == plain.launches == 1
    assert split.bytes - plain.bytes == 2 * 4 * (30 + 5) * 64 * 64 * 9
    assert split.tiles == 30 * plain.tiles
    # Of tiles of pixels it adds all at once.
    p = LAYERS["conv5 3x3, one image"]
    choice = dataclasses.replace(whole, splits=8)
    split, plain = (costed(p, FORWARD, each) for each in (choice, whole))
    assert split.launches == plain.launches == 1
    assert split.bytes - plain.bytes == 2 * 4 * 8 * 512 * 7 * 7


def test_the_last_split_may_be_short():
    # 10 pixels in 4 shares of 3: 3, 3, 3, 1; with steps of 2 that is 2 + 2 + 2 + 1.
    p = problem(1, 16, 10, 1, 16, 1, 1)
    choice = ConvPlan(Variant.TAPS, 16, 16, 2, num_warps=4, num_stages=3, splits=4)
    assert costed(p, WEIGHT_GRAD, choice).efficiency == pytest.approx(10 / 14)


@pytest.mark.parametrize("direction", Direction)
def test_copies_read_and_write_their_tensor_once_more(direction):
    p = problem(8, 16, 10, 10, 64, 3, 3)
    x, w, y = 8 * 16 * 10 * 10, 64 * 16 * 9, 8 * 64 * 8 * 8
    sizes = {FORWARD: (x, w, y), INPUT_GRAD: (y, w, x), WEIGHT_GRAD: (y, x, w)}[direction]
    plain = costed(p, direction, TAPS)
    for pack in ((True, False, False), (False, True, False), (False, False, True), (True, True, True)):
        found = costed(p, direction, dataclasses.replace(TAPS, pack=pack))
        assert found.launches == plain.launches + sum(pack)
        assert found.bytes - plain.bytes == 2 * 2 * sum(s for s, copied in zip(sizes, pack, strict=True) if copied)
        assert found.compute == plain.compute


@pytest.mark.parametrize("direction", Direction)
def test_element_by_element_has_the_rate_outside_the_tensor_cores(direction):
    p, choice = LAYERS["MobileNet depthwise"], dataclasses.replace(DIRECT, block_k=1)
    found = costed(p, direction, choice).compute
    faster = dataclasses.replace(H100, peaks=Peaks(1e30, {"float16": 1.0, "fma": 2 * 66.9e12}))
    assert costed(p, direction, choice, device=faster).compute == pytest.approx(found / 2)


def test_float32_has_the_rate_of_its_products():
    rates = {"ieee": 66.9e12, "tf32": 494.7e12, "tf32x3": 494.7e12 / 3}
    flops = costed(CONV2, FORWARD, TAPS).compute * 989.4e12
    for precision, rate in rates.items():
        operands = Operands("float32", "tf32" if precision == "tf32" else "ieee")
        found = costed(CONV2, FORWARD, dataclasses.replace(TAPS, precision=precision), operands)
        assert found.compute == pytest.approx(flops / rate)
        assert found.bytes == 2 * 25_763_840


def test_cost_of_a_depthwise_layer():
    # 25088 pixels by 144 channels in tiles of 32 × 64: 784 × 3 of them, 18 waves; nine taps each.
    found = costed(LAYERS["MobileNet depthwise"], FORWARD, DIRECT)
    assert (found.tiles, found.efficiency) == (2352, 144 / 192)
    assert found.compute == pytest.approx(18 * 2 * 32 * 64 * 9 * 132 / 66.9e12)


def test_a_device_without_peaks():
    with pytest.raises(ValueError, match="emulated"):
        costed(CONV2, FORWARD, TAPS, device=EMULATED)


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize(
    "p", [square(0, 16, 6, 16, 3), square(0, 32, 6, 32, 3, groups=32), problem(2, 0, 4, 4, 8, 3, 3)], ids=str
)
def test_nothing_to_do(p, direction):
    found = costed(p, direction, heuristic_plan(p, direction, HALF, H100))
    assert floor(minimum_work(p, direction, 2, "float16"), H100.peaks).seconds <= found.seconds < 1e-6
    if not p.N:
        assert (found.tiles, found.launches) == (0, 0)


# ---- against the launches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "NCHW"])
@pytest.mark.parametrize("name", LAYERS)
def test_cost_counts_the_launches_that_are_made(name, channels_last, monkeypatch):
    """Of the plan of a call, and of the best plan of every kernel, with operands copied and not."""
    p, launches = LAYERS[name], _recorded(monkeypatch)
    for device in (H100, A100):
        for dtype, precision in KINDS:
            for direction in Direction:
                operands = _operands(p, direction, channels_last, dtype, precision)
                ranked = ranking(p, direction, operands, device)
                best = {(each.plan.variant, each.plan.pack, each.plan.splits > 1): each for each in reversed(ranked)}
                for each in best.values():
                    launches.clear()
                    _run(p, direction, channels_last, dtype, device, each.plan)
                    _check_launches(each, launches, device)
                    assert each.cost.bytes >= minimum_work(p, direction, operands.itemsize, operands.kind).bytes
                    must = inside(p, direction, operands)
                    assert floor(must, device.peaks).seconds <= each.cost.seconds
                    assert each.cost.efficiency > 0


def _check_launches(ranked, launches, device) -> None:
    assert ranked.cost.launches == len(launches), (ranked.plan, launches)
    main = [math.prod(grid) for kernel, grid in launches if kernel.startswith("conv2d_")]
    if not ranked.cost.launches:
        assert not main
        return
    (programs,) = main
    # Persistent programs walk many tiles each: one program a multiprocessor.
    persistent = programs < ranked.cost.tiles and programs == device.sm_count
    assert persistent or programs == ranked.cost.tiles, (ranked.plan, programs)


def _recorded(monkeypatch) -> list[tuple[str, tuple[int, ...]]]:
    """Where every launch is noted as (kernel, grid), and not made."""
    launches = []
    for module in (passes, *(importlib.import_module(family.launch_module) for family in FAMILIES)):
        monkeypatch.setattr(
            module, "launch", lambda kernel, grid, *rest: launches.append((kernel.fn.__name__, tuple(grid)))
        )
    return launches


def _operands(p, direction, channels_last, dtype, precision) -> Operands:
    strides = tuple(dense_strides(shape, channels_last) for shape in shapes(p, direction))
    return operands_of(p, direction, strides, True, dtype, precision)


def _run(p, direction, channels_last, dtype, device, choice) -> None:
    """On tensors without memory."""
    first, second = (
        torch.empty_strided(shape, dense_strides(shape, channels_last), dtype=dtype, device="meta")
        for shape in shapes(p, direction)[:2]
    )
    with pretend(device):
        launch.run(launch.prepared_for(p, direction, first, second, channels_last, plan=choice), first, second)


# ---- in general ----------------------------------------------------------------------------------------------------


def inside(p, direction, operands) -> Work:
    """What must be done by those who skip the taps in the padding, as some kernels can."""
    must = minimum_work(p, direction, operands.itemsize, operands.kind)
    rows, cols = (len(window_reads(*dimension)) for dimension in dimensions(p))
    flops = 2 * p.N * rows * cols * p.K * p.group_inputs
    assert flops <= must.flops
    return dataclasses.replace(must, flops=flops)


_SIZE, _SMALL = st.integers(1, 70), st.integers(1, 7)
#: Kernels that leave out taps in the padding, and so may pass the floor that counts them.
SKIP_PADDING = {Variant.BATCH_BOX}


@given(
    st.integers(0, 70), st.tuples(_SIZE, _SIZE), st.tuples(_SIZE, _SIZE), st.tuples(_SMALL, _SMALL),
    st.tuples(_SMALL, _SMALL), st.tuples(st.integers(0, 6), st.integers(0, 6)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)), st.integers(1, 20),
    st.sampled_from(sorted(DEVICES)), st.sampled_from(KINDS), st.booleans(),
)  # fmt: skip
def test_no_plan_beats_the_floor(
    N, channels, size, kernel, stride, padding, dilation, groups, name, how, channels_last
):
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    assume(all(s + 2 * pad >= extent for s, pad, extent in zip(size, padding, extents, strict=True)))
    C, K = (groups * (count if groups == 1 else 1 + count % 12) for count in channels)
    p = problem(N, C, *size, K, *kernel, stride, padding, dilation, groups)
    device = DEVICES[name]
    for direction in Direction:
        operands = _operands(p, direction, channels_last, *how)
        must, least = minimum_work(p, direction, operands.itemsize, operands.kind), inside(p, direction, operands)
        for ranked in ranking(p, direction, operands, device):
            choice = ranked.plan
            # Also where nothing but arithmetic bounds.
            for machine in (device, endless_memory(device)):
                found = costed(p, direction, choice, operands, machine)
                whose = least if choice.variant in SKIP_PADDING else must
                assert floor(whose, machine.peaks).seconds <= found.seconds * (1 + 1e-12), choice
            share = whose.flops / must.flops if must.flops else 1
            assert 0 <= found.efficiency * share <= 1 and found.bytes >= must.bytes
            assert found.waves * device.sm_count == pytest.approx(found.tiles)


def test_a_faster_device_is_predicted_faster():
    slow, fast = (costed(CONV2, FORWARD, TAPS, device=device).seconds for device in (A100, B200))
    assert fast < slow
