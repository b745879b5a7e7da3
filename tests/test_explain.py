"""Questions as they are typed, the answers to them, and how these are shown."""

from __future__ import annotations

import json
import math

import pytest
from rich.console import Console

from gpukern.conv import database, force_plan
from gpukern.conv.cost import minimum_work
from gpukern.conv.plan import ConvPlan, Direction, Layout, Variant
from gpukern.conv.planner import heuristic_plan, only_measured, ranking
from gpukern.conv.problem import conv_problem
from gpukern.explain import formatting, machine_code, show
from gpukern.explain import ranking as answers
from gpukern.explain.machine_code import CannotCompile, Compiled, compiled
from gpukern.explain.query import KINDS, Epilogue, convolution, linear
from gpukern.explain.ranking import answer, ranked, reasons, residual_bytes
from gpukern.explain.roofline_chart import HEIGHT, WIDTH, Point, chart
from gpukern.runtime.device import A100, B200, B300, GH200, H100, L4, RTX_3090, RTX_4090, RTX_5090

FORWARD, INPUT_GRAD, WEIGHT_GRAD = Direction
CONV2 = formatting.problem_called("32x64x56x56", "64x3x3", padding="1")
SMALL = formatting.problem_called("1x512x7x7", "512x3x3", padding="1")
RESIDUAL = Epilogue("relu", residual=True)
KERNEL = Compiled("conv2d_kernel", (7, 2), 99, 2**16, 0, 500, "HGMMA", {"tensor cores": 4, "predicates": 8}, 6)


def asked(p=CONV2, direction=FORWARD, kind="float16", device=H100, channels_last=True, **others):
    return convolution(p, direction, kind, channels_last, device, **others)


# ---- what is typed -------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_problem():
    p = formatting.problem_called("2x16x9×8", "24X3x5", "2x1", "1x2", "1x2", 1)
    assert p is conv_problem((2, 16, 9, 8), (24, 16, 3, 5), None, (2, 1), (1, 1, 2, 2), (1, 2), 1)
    assert formatting.problem_called("2x16x9x8", "24x4x3x5", groups=4) is formatting.problem_called(
        "2x16x9x8", "24x3x5", groups=4
    )
    assert formatting.problem_called("1x8x6x6", "8x2x2", padding="same").padding == (0, 1, 0, 1)
    assert formatting.problem_called("1x8x6x6", "8x2x2", padding="valid").padding == (0, 0, 0, 0)
    assert formatting.problem_called("1,8,6,6", "8,2,2") == formatting.problem_called("1x8x6x6", "8x2x2")


@pytest.mark.parametrize(
    "given, message",
    [
        (("32x64x56", "64x3x3"), "'32x64x56' has 3 sizes, expected 4 joined by x"),
        (("32x64x56x56", "64x3"), "'64x3' has 2 sizes, expected 3 or 4"),
        (("32", "64x3x3"), "'32' has 1 size, expected 4 joined by x"),
        (("32x64x56x0", "64x3x3"), "'0' in '32x64x56x0' is no size: expected a number from 1 on"),
        (("32x64x56x-6", "64x3x3"), "'-6' in '32x64x56x-6' is no size"),
        (("1e3x64x56x56", "64x3x3"), "'1e3' in '1e3x64x56x56' is no size"),
        ((f"{2**31}x4x9x9", "4x3x3"), "is no size"),
        (("2x4x9x9", "4x3x3", "0"), "'0' is no size: expected a number from 1 on"),
        (("2x4x9x9", "4x3x3", "1x2x3"), "'1x2x3' is no size: expected one number, or two joined by x"),
        (("2x4x9x9", "4x3x3", "1", "x"), "'x' is no size"),
        (("2x4x9x9", "4x3x3", "2", "same"), "padding 'same' is for stride 1"),
        (("2x4x9x9", "4x3x3", "1", "0", "1", 3), "4 input channels do not divide into 3 groups"),
        (("2x4x9x9", "4x3x3", "1", "0", "1", 0), "4 input channels do not divide into 0 groups"),
        (("2x4x9x9", "4x2x3x3"), "given groups=1"),
        (("2x4x2x2", "4x3x3"), "Kernel size can't be greater than actual input size"),
    ],
)
def test_what_is_no_convolution_is_told(given, message):
    with pytest.raises(ValueError) as error:
        formatting.problem_called(*given)
    assert message in str(error.value)


def test_devices_by_name_and_by_architecture(monkeypatch):
    named = {"h100": H100, "RTX 4090": RTX_4090, "rtx-5090": RTX_5090, "GH200": GH200}
    best = {
        "sm_80": A100,
        "SM86": RTX_3090,
        "SM89": L4,
        "sm_90": H100,
        "sm_100": B200,
        "sm_103": B300,
        "sm_120": RTX_5090,
    }
    for name, device in {**named, **best}.items():
        assert formatting.device_called(name) is device
    assert formatting.device_called(None) is H100
    for name in ("sm_75", "sm_9", "", "tpu"):
        with pytest.raises(ValueError, match=r"known are a100.*sm_100.*sm_120"):
            formatting.device_called(name)
    # The GPU that is here comes without its peaks.
    monkeypatch.setattr(formatting.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        formatting, "device_spec", lambda device: formatting.replace(H100, name="NVIDIA H100 PCIe", peaks=None)
    )
    assert formatting.device_called(None).peaks.bandwidth == H100.peaks.bandwidth


def test_kinds_and_directions_by_short_and_long_names():
    assert [formatting.kind_called(name) for name in ("fp16", "BF16", "tf32", "float32")] == list(KINDS)
    assert formatting.directions_called("all") == list(Direction)
    assert (
        formatting.directions_called("weight-grad") == formatting.directions_called("weight gradient") == [WEIGHT_GRAD]
    )
    for read in (formatting.kind_called, formatting.directions_called):
        with pytest.raises(ValueError, match="known are"):
            read("int8")


def test_epilogues():
    assert formatting.epilogue_called("") == formatting.epilogue_called("none") == (False, Epilogue())
    assert formatting.epilogue_called("bias, residual,ReLU") == (True, RESIDUAL)
    assert formatting.epilogue_called("silu+bias") == (True, Epilogue("silu"))
    for given, message in (("bias,softmax", "no part 'softmax'"), ("relu,silu", "one activation, not relu and silu")):
        with pytest.raises(ValueError, match=message):
            formatting.epilogue_called(given)


def test_sizes_and_plans_go_back_into_words():
    assert formatting.describe(CONV2) == "32×64×56×56 by 64×64×3×3, stride 1, padding 1"
    p = formatting.problem_called("1x16x9x9", "16x2x2", dilation="2x1", padding="same", groups=16)
    assert formatting.describe(p) == "1×16×9×9 by 16×1×2×2, stride 1, padding 1+1×0+1, dilation 2×1, 16 groups"
    assert formatting.describe(linear(5, 64, 10, FORWARD, "float16", H100).problem) == "5×64 by 10×64"
    copied = ConvPlan(Variant.TAPS, 64, 32, 16, 4, 3, pack=(True, False, True), precision="tf32x3")
    assert formatting.describe_plan(copied, FORWARD) == "taps 64×32×16, 4 warps, 3 stages, tf32x3, x and y copied"
    assert formatting.describe_plan(copied, WEIGHT_GRAD).endswith("dy and dw copied")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", Direction)
def test_no_two_plans_have_the_same_words(direction, kind):
    for channels_last in (True, False):
        question = asked(direction=direction, kind=kind, channels_last=channels_last)
        plans = [each.plan for each in ranking(CONV2, direction, question.operands, H100)]
        assert len({formatting.describe_plan(each, direction) for each in plans}) == len(plans)


# ---- what is asked -------------------------------------------------------------------------------------------------


def test_operands_are_those_of_dense_tensors():
    operands = asked(kind="tf32").operands
    assert (operands.dtype, operands.precision, operands.first) == ("float32", "tf32", Layout.NHWC)
    planes = asked(channels_last=False).operands
    assert {planes.first, planes.second, planes.output} == {Layout.NCHW}


def test_a_linear_layer_is_asked_as_it_is_launched():
    """Its input gradient is a product of dy and the transpose of w, which no convolution's is."""
    forward, input_grad, weight_grad = (linear(5, 64, 48, each, "float16", H100) for each in Direction)
    assert (forward.direction, forward.problem.C, forward.problem.K) == (FORWARD, 64, 48)
    assert (input_grad.direction, input_grad.problem.C, input_grad.problem.K) == (FORWARD, 48, 64)
    assert input_grad.operands.second is Layout.TRANSPOSED
    assert (weight_grad.direction, weight_grad.problem.K) == (WEIGHT_GRAD, 48)
    assert linear(5, 64, 48, FORWARD, "float16", H100, True, "relu").epilogue == Epilogue("relu")


def test_gradients_have_no_epilogue():
    for direction in (INPUT_GRAD, WEIGHT_GRAD):
        question = asked(direction=direction, bias=True, epilogue=RESIDUAL)
        assert (question.bias, question.epilogue) == (False, Epilogue())


# ---- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [A100, H100], ids=lambda device: device.name)
@pytest.mark.parametrize("direction", Direction)
def test_the_chosen_plan_is_that_of_a_call(direction, device):
    question = asked(direction=direction, device=device)
    found = answer(question)
    assert found.chosen.plan == heuristic_plan(CONV2, direction, question.operands, device) and not found.measured
    assert found.chosen in found.ranking and found.chosen.plan not in [each.plan for each in found.alternatives]
    assert found.floor.seconds <= found.chosen.cost.seconds <= found.chosen.seconds
    assert found.intensity == pytest.approx(found.work.flops / found.work.bytes)
    assert 1 < len(reasons(found)) <= 5 or len(found.ranking) == 1


def test_reasons_say_how_float32_is_multiplied():
    """Rounded, where a reader of PTX would expect cut operands; full fp32 outside of the tensor cores says nothing."""
    of_tf32, of_fp32, of_fp16 = (reasons(answer(asked(kind=kind))) for kind in ("tf32", "float32", "float16"))
    assert "rounded to the nearest number of 10 mantissa bits" in of_tf32[1]
    assert "three of TF32" in of_fp32[1] and not any("TF32" in reason for reason in of_fp16)


def test_a_measured_plan_is_said_to_be_one(monkeypatch):
    question = asked()
    other = answer(question).alternatives[-1].plan
    monkeypatch.setattr(database, "lookup", lambda *launch: other)
    found = answer(question)
    assert found.measured and found.chosen == ranked(question, other)
    said = " ".join(reasons(found))
    assert "The plan database has it" in said and "less" in said


def test_reasons_say_what_bounds_and_who_comes_next():
    first, *others = reasons(answer(asked()))
    assert first == (
        "Memory bounds it: its 25.8 MB take 7.69 µs, its products 7.55 µs. "
        "It is expected to take 21.0 µs: small tiles, their loops and waiting add the rest."
    )
    assert others[0].startswith("The next best, ")
    first, *_ = reasons(answer(asked(device=A100)))
    assert first.startswith("Arithmetic bounds it: its products take ") and "waves of tiles" in first
    # One image leaves most of a large device idle, or splits a sum and moves more.
    first, *_ = reasons(answer(asked(SMALL, INPUT_GRAD, device=A100)))
    assert "is expected to take" in first


def test_the_best_of_another_kernel_is_named_if_it_is_not_the_next():
    found = answer(asked())
    open_to_calls = [each for each in found.alternatives if not only_measured(each.plan)]
    rest = [each for each in open_to_calls if each.plan.variant != found.chosen.plan.variant]
    assert rest[0] is not open_to_calls[0], "another layer would show it"
    name = formatting.describe_plan(rest[0].plan, FORWARD)
    assert any(f"The best of another kernel, {name}, is expected" in reason for reason in reasons(found))


def test_what_only_a_gpu_can_show_is_mentioned_where_it_looks_faster(monkeypatch):
    """Whichever plans those are: here, all but the slowest."""
    question = asked()
    slowest = answer(question).ranking[-1].plan
    monkeypatch.setattr(answers, "only_measured", lambda plan: plan != slowest)
    with force_plan(slowest):
        assert "but is only chosen where a GPU has shown it right and fast." in reasons(answer(question))[-1]


def test_a_residual_is_read_once_more():
    plain, added = answer(asked()), answer(asked(epilogue=RESIDUAL))
    extra = 32 * 64 * 56 * 56 * 2
    assert residual_bytes(added.question) == extra and residual_bytes(plain.question) == 0
    assert added.work.bytes - plain.work.bytes == extra
    assert added.floor.seconds == pytest.approx(added.work.bytes / H100.peaks.bandwidth)
    for before, after in zip(plain.ranking, added.ranking, strict=True):
        assert (after.plan, after.cost.bytes) == (before.plan, before.cost.bytes + extra)
        assert after.cost.seconds >= added.floor.seconds
        assert after.seconds == pytest.approx(before.seconds + extra / H100.peaks.bandwidth)
    # Where the output is copied, so is the residual on its way in.
    planes = answer(asked(epilogue=RESIDUAL, channels_last=False)).ranking
    without = {each.plan: each for each in answer(asked(channels_last=False)).ranking}
    for each in planes:
        copied = each.plan.pack[2]
        assert each.cost.bytes - without[each.plan].cost.bytes == extra * (3 if copied else 1)
        assert each.cost.launches - without[each.plan].cost.launches == copied
    assert {each.plan.pack[2] for each in planes} == {True, False}


def test_nothing_to_do_and_too_much():
    nothing = answer(asked(conv_problem((0, 8, 6, 6), (8, 8, 3, 3), None, (1, 1), (0, 0, 0, 0), (1, 1), 1)))
    assert "nothing is launched" in reasons(nothing)[0] and nothing.intensity == 0
    assert "\n" not in shown(nothing, "").splitlines()[0]
    with pytest.raises(RuntimeError, match="pixels are more than"):
        answer(asked(formatting.problem_called("1000000x4x56x56", "4x3x3")))


# ---- machine code --------------------------------------------------------------------------------------------------


def test_without_a_compiler_there_is_a_reason(monkeypatch):
    question = asked()
    monkeypatch.setattr(machine_code, "EMULATE", True)
    with pytest.raises(CannotCompile, match="unset it"):
        compiled(question, answer(question).chosen.plan)
    monkeypatch.setattr(machine_code, "has_triton", lambda: False)
    with pytest.raises(CannotCompile, match="Triton is not installed"):
        compiled(question, answer(question).chosen.plan)


COMPILE = """
import dataclasses, json
from gpukern.explain import formatting
from gpukern.explain.machine_code import CannotCompile, compiled
from gpukern.explain.query import Epilogue, convolution
from gpukern.conv.plan import ConvPlan, Direction, Variant
from gpukern.runtime.device import A100

question = convolution(
    formatting.problem_called("2x32x8x8", "32x1x1"), Direction.FORWARD, "float16", False, A100, True,
    Epilogue("relu", True)
)
taps = ConvPlan(Variant.TAPS, 64, 32, 32, num_warps=4, num_stages=3, pack=(True, False, False))
print(json.dumps([dataclasses.asdict(each) for each in compiled(question, taps)]))
try:
    compiled(question, dataclasses.replace(taps, pack=(False, False, False), num_warps=3))
except CannotCompile as reason:
    print(reason)
"""


def test_the_machine_code_of_every_kernel_is_counted(run_python):
    result = run_python(COMPILE)
    assert result.returncode == 0, result.stderr
    found, reason = result.stdout.splitlines()[0], result.stdout.splitlines()[-1]
    copy, main = json.loads(found)
    assert (copy["kernel"], main["kernel"]) == ("copy_image_kernel", "conv2d_gather_kernel")
    assert copy["tensor_core"] is None and main["tensor_core"] == "HMMA" and main["grid"][0] == 2
    assert 32 <= main["registers"] <= 255 and main["shared_memory"] > 0 and main["spills"] == 0
    assert main["loop"]["tensor cores"] > 0 and main["instructions"] > sum(main["loop"].values())
    assert "taps 64×32×32, 3 warps, 3 stages does not compile: " in reason


# ---- the roofline in characters ------------------------------------------------------------------------------------


def test_points_lie_on_and_below_the_roof():
    # Ridge at 100 FLOP/byte: a point on the slope, one on the flat, one half-way down.
    points = [Point("a", 25, 25e12), Point("b", 400, 100e12), Point("c", 100, 25e12)]
    lines = chart(100e12, 1e12, points)
    assert len(lines) == HEIGHT + 2 and all(len(line) <= WIDTH + 9 + len(" FLOP/byte") for line in lines)
    at = {mark: next((y, line.index(mark)) for y, line in enumerate(lines) if mark in line) for mark in "abc"}
    assert at["b"][0] == 0 and at["a"][0] == at["c"][0] > 0
    assert at["a"][1] < at["c"][1] < at["b"][1]
    # Logarithmic: from 25 to 100 as far as from 100 to 400.
    assert (at["c"][1] - at["a"][1]) == pytest.approx(at["b"][1] - at["c"][1], abs=1)
    # The roof goes up to the ridge, above c, and is flat from there.
    top = lines[0]
    assert top[at["c"][1] + 1 : at["b"][1]] == "─" * (at["b"][1] - at["c"][1] - 1)
    assert "/" in lines[at["a"][0] - 1] or "/" in lines[at["a"][0]]
    assert top.startswith("    100 ┤") and lines[-1].endswith("FLOP/byte") and "64" in lines[-1]


@pytest.mark.parametrize("intensity", [1e-3, 0.5, 3.0, 1e5])
@pytest.mark.parametrize("share", [1.0, 0.3, 1e-4])
def test_every_point_has_a_place(intensity, share):
    rate = min(989e12, intensity * 3.35e12) * share
    lines = chart(989e12, 3.35e12, [Point("●", intensity, rate), Point("x", 0, 0)])
    assert sum(line.count("●") for line in lines) == 1 and not any("x" in line for line in lines)


# ---- what is shown -------------------------------------------------------------------------------------------------


def shown(found, code, top: int = 6, width: int = 150) -> str:
    console = Console(width=width, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(show.render(found, code, top))
    return capture.get()


def test_everything_is_shown():
    found = answer(asked(bias=True, epilogue=RESIDUAL))
    text = shown(found, [KERNEL])
    for part in (
        "32×64×56×56 by 64×64×3×3, stride 1, padding 1: forward, float16, H100",
        "7.40 GFLOP, 38.6 MB, 192 FLOP per byte", "residual  12.8 MB of these bytes", "11.5 µs, bound by memory",
        f"→ {formatting.describe_plan(found.chosen.plan, FORWARD)}",
        "• Memory bounds it", "expected µs", "conv2d_kernel", "7×2", "64 KiB",
        "main loop (HGMMA): 4 tensor cores, 8 predicates", "┤", "●", "○",
    ):  # fmt: skip
        assert part in text, part
    assert "not compiled: because" in shown(found, "not compiled: because")


def test_the_list_holds_the_chosen_the_first_and_the_best_of_each_kernel():
    found = answer(asked(channels_last=False))
    for top in (1, 3, 100):
        rows = show.listed(found, top)
        assert found.chosen in rows and set(found.ranking[:top]) <= set(rows)
        assert {row.plan.variant for row in rows} == {each.plan.variant for each in found.ranking}
        assert [row.seconds for row in rows] == sorted(row.seconds for row in rows)
        left_out = len(found.ranking) - len(rows)
        assert (f"{left_out} more, all" in shown(found, "", top)) == (left_out > 0)


def test_a_chosen_plan_far_down_is_listed_where_it_stands(monkeypatch):
    *_, middle = (each.plan for each in answer(asked()).ranking if each.plan.variant is Variant.BOX)
    monkeypatch.setattr(database, "lookup", lambda *launch: middle)
    rows = show.listed(answer(asked()), 1)
    assert middle in [row.plan for row in rows] and rows[0].plan != middle


def test_a_chosen_plan_that_is_no_candidate_is_listed_first(monkeypatch):
    own = ConvPlan(Variant.TAPS, 16, 16, 16, num_warps=1, num_stages=1)
    monkeypatch.setattr(database, "lookup", lambda *launch: own)
    found = answer(asked())
    assert show.listed(found, 2)[0].plan == own


def test_json_has_all_of_it_in_units_of_one():
    found = answer(asked(direction=WEIGHT_GRAD, kind="tf32"))
    plain = json.loads(json.dumps(show.as_json(found, [KERNEL])))
    assert plain["problem"]["K"] == 64 and plain["problem"]["padding"] == [1, 1, 1, 1]
    assert (plain["computation"], plain["kind"], plain["device"]) == ("weight gradient", "tf32", "H100")
    must = minimum_work(CONV2, WEIGHT_GRAD, 4, "tf32")
    assert (plain["flops"], plain["bytes"]) == (must.flops, must.bytes)
    assert plain["floor"]["seconds"] < 1e-3 and len(plain["ranking"]) == len(found.ranking)
    assert plain["chosen"]["plan"]["variant"] == found.chosen.plan.variant.value
    assert math.isclose(plain["chosen"]["expected_seconds"], found.chosen.seconds)
    assert plain["kernels"][0]["loop_length"] == 12 and plain["not_compiled"] is None
    assert show.as_json(found, "why")["not_compiled"] == "why" and not show.as_json(found, "why")["kernels"]


# ---- 8 bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, kind", [("int8", "int8"), ("fp8", "float8"), ("E4M3", "float8"), ("fp16", "float16")])
def test_kinds_of_layers_in_8_bits(name, kind):
    assert formatting.layer_kind_called(name) == kind
    for read in (formatting.kind_called, formatting.layer_kind_called):
        with pytest.raises(ValueError, match="known are fp16, bf16, tf32, fp32"):
            read("int4")


def test_a_layer_in_8_bits_moves_half_the_bytes():
    half, whole = answer(asked()), answer(asked(kind="int8"))
    assert whole.work.bytes * 2 == half.work.bytes and whole.work.flops == half.work.flops
    assert whole.work.kind == "int8" and answer(asked(kind="float8")).work.kind == "float8"
    assert whole.floor.seconds < 0.51 * half.floor.seconds
    assert whole.chosen.seconds < half.chosen.seconds
    added = residual_bytes(asked(kind="int8", epilogue=RESIDUAL))
    assert 2 * added == residual_bytes(asked(epilogue=RESIDUAL))
    with pytest.raises(NotImplementedError, match="or later, but A100 has"):
        answer(asked(kind="float8", device=A100))
