"""A convolution with the max pool that follows, as one launch and as two, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import gpukern.functional as GF
from gpukern.conv import launch, planner
from gpukern.conv.families.tma_conv.plan import part
from gpukern.conv.plan import ConvPlan, Direction, Layout, Operands, Variant
from gpukern.conv.pooled import launch as pooled_launch
from gpukern.conv.pooled.plan import choose, seconds_apart, together
from gpukern.conv.prepare import pooled_choice
from gpukern.conv.problem import ConvProblem, conv_problem, pooled_problem
from gpukern.conv.request import Epilogue, operands_of, shapes
from gpukern.ops._activation.properties import PROPERTIES
from gpukern.ops._activation.reference import activation as reference_activation
from gpukern.ops.conv_max_pool2d import conv2d_max_pool2d
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.device import A100, EMULATED, H100, DeviceSpec
from gpukern.runtime.mode import Mode, force_mode
from gpukern.runtime.precision import conv_precision
from gpukern.runtime.tensors import memory_format_of
from tests.numerics import assert_within, sum_bound, uses_tf32
from tests.ops.conv_cases import Case, as_problem

pytestmark = pytest.mark.usefixtures("poisoned")

AMPERE = DeviceSpec("emulated Ampere", (8, 0), EMULATED.sm_count, 163 * 1024)
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
KINDS = (
    (torch.float16, "channels_last"),
    (torch.bfloat16, "channels_last"),
    (torch.float32, "channels_last"),
    (torch.float16, "NCHW"),
)
CASES = (
    Case("even", (2, 16, 6, 8), 24, (3, 3), padding=1),
    Case("odd rows and columns", (3, 24, 9, 7), 40, (3, 3), padding=1),
    Case("odd channels, valid", (1, 17, 7, 6), 9, (3, 2)),
    Case("one window", (2, 16, 3, 3), 16, (2, 2)),
    Case("a row of windows", (1, 8, 2, 23), 16, (1, 3), padding=(0, 1)),
    Case("stride 2, even", (2, 32, 10, 12), 24, (3, 3), stride=2, padding=1),
    Case("stride 2, odd", (2, 32, 11, 9), 24, (3, 3), stride=2, padding=1),
    Case("1x1", (2, 24, 5, 6), 16, (1, 1)),
    Case("1x1 stride 2", (1, 32, 12, 10), 16, (1, 1), stride=2),
    Case("dilated", (1, 16, 9, 8), 16, (3, 2), padding=2, dilation=(2, 3)),
    Case("three channels", (3, 3, 7, 8), 16, (3, 3), padding=1),
    Case("stem of MobileNet", (2, 3, 18, 23), 24, (3, 3), stride=2, padding=1),
    Case("LeNet's first", (3, 1, 12, 11), 6, (5, 5)),
    Case("groups of 16", (1, 32, 6, 6), 32, (3, 3), padding=1, groups=2),
)
TINY = Case("tiny", (2, 16, 5, 7), 24, (3, 2), padding=1)


def tensors(case: Case, dtype: torch.dtype, device: torch.device, layout: str) -> tuple[torch.Tensor, ...]:
    """x, w, bias."""
    x, w = (
        torch.randn(shape).to(device, dtype).contiguous(memory_format=FORMATS[layout])
        for shape in (case.input, case.weight)
    )
    return x, w * 0.3, torch.randn(case.outputs).to(device)


def truth(p: ConvProblem, x, w, bias, name: str = "none") -> tuple[torch.Tensor, torch.Tensor]:
    """(the maxima in float64, their bound): a maximum errs by no more than the worst of its window."""
    from gpukern.conv import reference

    x, w, bias = (t.detach().double().cpu() for t in (x, w, bias))
    value = reference.conv2d(p, x, w, bias, None, "none", 0.0)
    absolute = reference.conv2d(p, x.abs(), w.abs(), bias.abs(), None, "none", 0.0)
    return reference_activation(value, name, 0.1), absolute


def bound(p: ConvProblem, value, absolute, x) -> torch.Tensor:
    tf32 = uses_tf32(x.dtype, conv_precision(x.dtype))
    # No activation is steeper than hardswish, 1.5.
    return F.max_pool2d(1.5 * sum_bound(value, absolute, p.group_inputs * p.R * p.S + 1, x.dtype, tf32=tf32), 2)


def check(name: str, p: ConvProblem, x, w, bias, actual: torch.Tensor, activation: str = "none") -> None:
    value, absolute = truth(p, x, w, bias, activation)
    assert_within(name, actual, F.max_pool2d(value, 2), bound(p, value, absolute, x))


def arguments(p: ConvProblem) -> tuple:
    return p.stride, p.padding, p.dilation, p.groups


# ---- through the operator ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, layout", KINDS, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_float64(case, dtype, layout, device):
    p = as_problem(case)
    x, w, bias = tensors(case, dtype, device, layout)
    for added in (bias, bias.to(dtype)):
        actual = conv2d_max_pool2d(x, w, added, *arguments(p), "leaky_relu", 0.1)
        check(case.name, p, x, w, added, actual, "leaky_relu")
        assert actual.dtype is dtype
        assert actual.is_contiguous(memory_format=memory_format_of(x, w))


@pytest.mark.parametrize(
    "case",
    [
        Case("depthwise", (2, 24, 7, 6), 24, (3, 3), padding=1, groups=24),
        Case("groups of 4", (1, 32, 6, 7), 32, (3, 3), padding=1, groups=8),
    ],
    ids=lambda case: case.name,
)
def test_small_groups_take_two_launches(case, device, monkeypatch):
    p = as_problem(case)
    x, w, bias = tensors(case, torch.float16, device, "channels_last")
    seen = []
    alone = pooled_launch.conv2d
    monkeypatch.setattr(pooled_launch, "conv2d", lambda *given: seen.append(given) or alone(*given))
    actual = conv2d_max_pool2d(x, w, bias, *arguments(p), "silu", 0.0)
    assert len(seen) == 1
    check(case.name, p, x, w, bias, actual, "silu")


def test_elsewhere_it_is_one_launch(device, monkeypatch):
    def refuse(*_):
        raise AssertionError("two launches")

    monkeypatch.setattr(pooled_launch, "conv2d", refuse)
    p = as_problem(TINY)
    x, w, bias = tensors(TINY, torch.float16, device, "channels_last")
    conv2d_max_pool2d(x, w, bias, *arguments(p), "relu", 0.0)


def test_without_bias_and_without_images(device):
    p = as_problem(TINY)
    x, w, bias = tensors(TINY, torch.float16, device, "channels_last")
    actual = conv2d_max_pool2d(x, w, None, *arguments(p), "none", 0.0)
    check("no bias", p, x, w, torch.zeros_like(bias), actual)
    assert conv2d_max_pool2d(x[:0], w, bias, *arguments(p), "relu", 0.0).shape == (0, 24, 2, 4)


def test_a_crop_of_a_larger_image(device):
    p = as_problem(TINY)
    _, w, bias = tensors(TINY, torch.float16, device, "channels_last")
    wider = torch.randn(2, 16, 9, 9, device=device).half().contiguous(memory_format=torch.channels_last)
    crop = wider[:, :, 2:7, 1:8]
    check("crop", p, crop, w, bias, conv2d_max_pool2d(crop, w, bias, *arguments(p), "tanh", 0.0), "tanh")


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(x=(2, 16, 2, 3), padding=(0, 0, 0, 0)), "output size is too small"),
        (dict(x=(2, 15, 5, 7)), "15 channels instead"),
        (dict(bias=(23,)), r"expected bias to have shape \[24\]"),
        (dict(w=(24, 16, 9, 9)), "can't be greater than actual input size"),
        (dict(dtype=torch.float16), "same dtype"),
        (dict(padding=(-1, 0, 0, 0)), "negative padding"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_errors(change, words, where):
    given = {"x": (2, 16, 5, 7), "w": (24, 16, 2, 3), "bias": (24,), "padding": (1, 1, 1, 1), **change}
    x, w, bias = (torch.randn(given[name], device=where) for name in ("x", "w", "bias"))
    w = w.to(given.get("dtype", w.dtype))
    for operator in (conv2d_max_pool2d, torch.ops.gpukern.conv2d_max_pool2d):
        for device in (where, "meta"):
            with pytest.raises(RuntimeError, match=words):
                operator(*(t.to(device) for t in (x, w, bias)), [1, 1], list(given["padding"]), [1, 1], 1, "relu", 0.0)


# ---- every plan ----------------------------------------------------------------------------------------------------


def plans(p: ConvProblem, operands: Operands, device: torch.device) -> list[ConvPlan]:
    """One plan of each variant that can, with and without splits: the candidate with the smallest tile."""
    found: dict[tuple[Variant, bool], ConvPlan] = {}
    for spec in (device_spec(device), *(() if device.type == "cuda" else (AMPERE,))):
        for plan in planner.candidates(p, Direction.FORWARD, operands, spec):
            if planner.only_measured(plan):
                continue
            best = found.setdefault((plan.variant, plan.splits > 1), plan)
            if plan.block_m * plan.block_n < best.block_m * best.block_n:
                found[plan.variant, plan.splits > 1] = plan
    return list(found.values())


def run(p: ConvProblem, plan: ConvPlan, x, w, bias, activation: str = "none") -> torch.Tensor:
    last = x.is_contiguous(memory_format=torch.channels_last)
    prepared = launch.prepared_for(pooled_problem(p), Direction.FORWARD, x, w, last, Epilogue(activation), plan)
    return launch.run(prepared, x, w, bias, None, 0.1)[0]


def operands(p: ConvProblem, x, w, layout: str) -> Operands:
    both = pooled_problem(p)
    output = torch.empty(shapes(both, Direction.FORWARD)[2]).contiguous(memory_format=FORMATS[layout])
    strides = x.stride(), w.stride(), output.stride()
    return operands_of(both, Direction.FORWARD, strides, True, x.dtype, conv_precision(x.dtype))


@pytest.mark.parametrize("dtype, layout", KINDS, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("case", (*CASES, TINY), ids=lambda case: case.name)
def test_every_variant(case, dtype, layout, device):
    p = as_problem(case)
    x, w, bias = tensors(case, dtype, device, layout)
    found = plans(pooled_problem(p), operands(p, x, w, layout), device)
    assert found
    for plan in found:
        check(f"{case.name}, {plan}", p, x, w, bias, run(p, plan, x, w, bias, "relu"), "relu")


#: (3, 40, 9, 11) pooled is (3, 40, 4, 5): boxes that end within, of few and of many images; of 256 pixels the halves.
BOXES = ((1, 4, 8), (1, 8, 4), (2, 2, 8), (8, 2, 2), (4, 8, 8), (1, 4, 64))


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_boxes(box, device):
    case = Case("boxes", (3, 24, 9, 11), 40, (3, 3), padding=1)
    p = as_problem(case)
    x, w, bias = tensors(case, torch.float16, device, "channels_last")
    images, rows, cols = box
    plan = ConvPlan(Variant.BOX, images * rows * cols, 32, 16, 4, 3, box=box)
    check(str(box), p, x, w, bias, run(p, plan, x, w, bias, "gelu"), "gelu")


def test_parts_of_a_box_are_of_whole_windows():
    sizes = (1, 2, 3, 8, 33), (2, 4, 6, 14, 56, 250), (2, 4, 6, 14, 56, 250)
    seen = set()
    for N, P, Q in ((n, p, q) for n in sizes[0] for p in sizes[1] for q in sizes[2]):
        p = pooled_problem(conv_problem((N, 64, P, Q), (128, 64, 3, 3), None, (1, 1), (1,) * 4, (1, 1), 1))
        for plan in planner.candidates(p, Direction.FORWARD, Operands("float16"), H100):
            if plan.variant is Variant.BOX:
                seen.add(plan.block_m)
                images, rows, cols = part(plan.box)
                assert rows % 2 == cols % 2 == 0
                # The first dimension that is halved is the outermost: the sums of a part lie side by side.
                halved = [side for side, half in zip(plan.box, (images, rows, cols), strict=True) if side != half]
                assert len(halved) <= 1
    assert seen == {64, 128, 256}


# ---- epilogue ------------------------------------------------------------------------------------------------------


def _by_variant() -> list[tuple[Variant, Case, ConvPlan]]:
    found: dict[Variant, tuple[Variant, Case, ConvPlan]] = {}
    for case in (TINY, *CASES):
        for plan in plans(pooled_problem(as_problem(case)), Operands("float16"), torch.device("cpu")):
            found.setdefault(plan.variant, (plan.variant, case, plan))
    return list(found.values())


VARIANTS = pytest.mark.parametrize("variant, case, plan", _by_variant(), ids=lambda value: getattr(value, "value", ""))


def test_every_pooling_kernel_is_tested():
    assert {variant for variant, _, _ in _by_variant()} == {Variant.BOX, Variant.STEM, Variant.TAPS, Variant.FLAT}


@pytest.mark.parametrize("name", ["none", *PROPERTIES])
@VARIANTS
def test_activations(variant, case, plan, name, device):
    """Of which not all are monotone: the activation comes first."""
    p = as_problem(case)
    x, w, bias = tensors(case, torch.float16, device, "channels_last")
    check(f"{plan}, {name}", p, x, w, bias, run(p, plan, x, w, bias, name), name)


@VARIANTS
def test_nan_wins_and_infinities_come_through(variant, case, plan, device):
    p = as_problem(case)
    x, w, bias = tensors(case, torch.float16, device, "channels_last")
    x[0, 0, 0, 0], x[-1, -1, -1, -1] = float("nan"), float("inf")
    bias[0], bias[1] = -float("inf"), float("nan")
    actual = run(p, plan, x, w, bias).cpu()
    value = F.max_pool2d(truth(p, x, w, bias)[0], 2)
    assert torch.equal(actual.isnan(), value.isnan())
    assert torch.equal(actual.isposinf(), value.isposinf()) and torch.equal(actual.isneginf(), value.isneginf())
    assert actual.isneginf().any() and not actual.isnan().all()


@pytest.mark.parametrize("place", range(4))
@VARIANTS
def test_a_nan_anywhere_in_a_window(variant, case, plan, place, device):
    """Of a 1×1 product that passes the image on: one pixel of one window, whichever it is."""
    p = as_problem(Case("1x1", (1, 16, 6, 4), 16, (1, 1), stride=2 if variant is Variant.BOX else 1))
    plan = ConvPlan(Variant.TAPS, 16, 16, 16, 4, 2) if variant is not Variant.BOX else plan
    x = torch.randn(1, 16, p.H, p.W, device=device).half().contiguous(memory_format=torch.channels_last)
    step = p.stride[0]
    x[0, 3, place // 2 * step, place % 2 * step] = float("nan")
    w = torch.eye(16, device=device).half()[:, :, None, None].contiguous(memory_format=torch.channels_last)
    actual = run(p, plan, x, w, None)
    assert actual[0, :, 0, 0].isnan().all() and not actual[0, :, 1:].isnan().any()


#: The interpreter's maximum takes a NaN whatever it is asked.
COMPILED = """
import torch
from gpukern.ops.conv_max_pool2d import conv2d_max_pool2d
from gpukern.runtime import device
from gpukern.runtime.compile_only import record_launches

x, w = (torch.empty(s, device="meta").half().contiguous(memory_format=torch.channels_last)
        for s in ((8, 64, 28, 28), (64, 64, 3, 3)))
for spec in (device.H100, device.A100):
    with record_launches(spec) as launches:
        conv2d_max_pool2d(x, w, None, (1, 1), (1, 1, 1, 1), (1, 1), 1, "relu", 0.0)
    code = launches[-1].compile().asm["ptx"]
    print(launches[-1].kernel, "max.NaN.f32" in code, "max.f32" in code)
"""


def test_the_compiled_maximum_takes_a_nan(run_python):
    run = run_python(COMPILED, GPUKERN_PLANS="")
    assert run.stdout == "conv2d_box_kernel True False\nconv2d_gather_kernel True False\n", run.stderr


def test_splits_give_the_same_bits_every_time(device):
    case = Case("small grid", (1, 64, 6, 6), 32, (3, 3), padding=1)
    p = as_problem(case)
    x, w, bias = tensors(case, torch.float16, device, "channels_last")
    found = [plan for plan in plans(pooled_problem(p), Operands("float16"), device) if plan.splits > 1]
    assert {plan.variant for plan in found} == {Variant.BOX, Variant.TAPS}
    for plan in found:
        first, *others = (run(p, plan, x, w, bias) for _ in range(3))
        assert all(torch.equal(first, other) for other in others)


# ---- gradients, tracing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["none", "relu", "tanh", "silu"])
def test_gradients(activation, where, full_fp32):
    """Computed again, by the gradients of convolution, activation and pool: without ATen on a GPU."""
    p = as_problem(TINY)
    x, w, bias = (t.requires_grad_() for t in tensors(TINY, torch.float32, where, "channels_last"))
    grad = torch.randn(2, 24, 2, 4, device=where)
    actual = torch.autograd.grad(conv2d_max_pool2d(x, w, bias, *arguments(p), activation, 0.0), (x, w, bias), grad)
    exact = [t.detach().double().cpu().requires_grad_() for t in (x, w, bias)]
    y = F.conv2d(F.pad(exact[0], (1, 1, 1, 1)), *exact[1:])
    value = F.max_pool2d(reference_activation(y, activation, 0.0), 2)
    for mine, theirs in zip(actual, torch.autograd.grad(value, exact, grad.double().cpu()), strict=True):
        assert (mine.double().cpu() - theirs).norm() <= 1e-5 * theirs.norm()


def test_gradients_of_gradients():
    p = as_problem(Case("small", (1, 1, 3, 4), 2, (2, 1)))
    x, w = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 1, 3, 4), (2, 1, 2, 1)))
    with force_mode(Mode.REFERENCE):
        for name in ("sigmoid", "silu"):
            assert torch.autograd.gradgradcheck(
                lambda x, w, name=name: conv2d_max_pool2d(x, w, None, *arguments(p), name, 0.0), (x, w)
            )


@pytest.mark.parametrize("layout", FORMATS)
def test_operator(layout, where):
    p = as_problem(TINY)
    x, w, bias = (t.requires_grad_() for t in tensors(TINY, torch.float32, where, layout))
    geometry = [list(each) for each in arguments(p)[:3]]
    operator = torch.ops.gpukern.conv2d_max_pool2d.default
    torch.library.opcheck(operator, (x, w, bias, *geometry, p.groups, "silu", 0.0))
    torch.library.opcheck(operator, (x.detach(), w.detach(), None, *geometry, p.groups, "leaky_relu", 0.2))


def test_exported(where):
    class Network(torch.nn.Module):
        def forward(self, x, w):
            return conv2d_max_pool2d(x, w, None, (1, 1), (1, 1, 1, 1), (1, 1), 1, "relu", 0.0)

    p = as_problem(TINY)
    x, w, _ = tensors(TINY, torch.float32, where, "channels_last")
    batch = torch.export.Dim("batch")
    exported = torch.export.export(Network(), (x, w), dynamic_shapes=({0: batch}, None))
    assert [str(n.target) for n in exported.graph.nodes if n.op == "call_function"] == [
        "gpukern.conv2d_max_pool2d.default"
    ]
    more = torch.cat([x, x[:1]])
    expected = conv2d_max_pool2d(more, w, None, *arguments(p), "relu", 0.0)
    assert torch.equal(exported.module()(more, w), expected)


def test_the_reference_is_the_two_operations_bit_for_bit():
    p = as_problem(TINY)
    with force_mode(Mode.REFERENCE):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            x, w, bias = tensors(TINY, dtype, torch.device("cpu"), "channels_last")
            bias = bias.to(dtype)
            y = GF.max_pool2d(GF.conv2d(x, w, bias, padding=1, activation="silu"), 2)
            assert torch.equal(conv2d_max_pool2d(x, w, bias, *arguments(p), "silu", 0.0), y)


# ---- one launch or two ---------------------------------------------------------------------------------------------


def layer(batch: int, channels: int, size: int, outputs: int, kernel: int = 3, groups: int = 1) -> ConvProblem:
    padding = (kernel // 2,) * 4
    weight = (outputs, channels // groups, kernel, kernel)
    return conv_problem((batch, channels, size, size), weight, None, (1, 1), padding, (1, 1), groups)


LAST, PLANES = Operands("float16"), Operands("float16", "ieee", Layout.NCHW, Layout.NCHW, Layout.NCHW)


@pytest.mark.parametrize("batch", [1, 32, 128])
@pytest.mark.parametrize("channels, size", [(64, 224), (128, 112), (256, 56), (512, 28), (512, 14)])
def test_the_layers_of_vgg_are_one_launch(channels, size, batch):
    p = layer(batch, channels, size, channels)
    assert choose(p, LAST, LAST, H100).variant is Variant.BOX
    assert choose(p, LAST, LAST, A100).variant is Variant.TAPS


def test_matrix_products_of_planes_are_two_launches_on_hopper():
    """1×1 of NCHW is read and written as it lies by a kernel that cannot pool; the one that can would copy or crawl."""
    p = layer(32, 64, 56, 64, kernel=1)
    assert choose(p, PLANES, PLANES, H100) is None
    assert choose(p, LAST, LAST, H100) is not None


def test_nothing_to_pool_with_or_to_launch():
    assert choose(layer(32, 64, 56, 64, groups=64), LAST, LAST, H100) is None
    assert choose(layer(32, 64, 56, 64, groups=16), LAST, LAST, A100) is None
    assert choose(layer(0, 64, 56, 64), LAST, LAST, H100) is None


@pytest.mark.parametrize("device", [H100, A100], ids=lambda device: device.name)
def test_never_slower_by_expectation(device):
    chosen = []
    for channels, outputs, size, kernel in ((1, 6, 28, 5), (3, 64, 32, 3), (64, 64, 56, 1), (16, 200, 13, 3)):
        for batch, operands in ((1, LAST), (64, LAST), (1, PLANES), (64, PLANES)):
            p = layer(batch, channels, size, outputs, kernel)
            plan, one = choose(p, operands, operands, device), together(p, operands, device)
            assert (plan is not None) == (one.seconds <= seconds_apart(p, operands, device))
            chosen.append(plan)
    assert any(chosen)


def test_a_quarter_is_written_and_nothing_read_back():
    p = layer(32, 64, 56, 64)
    image, filter = 32 * 64 * 56 * 56, 64 * 64 * 9
    assert together(p, LAST, H100).cost.bytes == 2 * (image + filter + image // 4)
    odd = pooled_problem(layer(32, 64, 57, 64))
    assert (odd.P, odd.Q) == (56, 56)


def test_a_measured_plan_goes_before(tmp_path, monkeypatch):
    from gpukern.conv import database

    p = layer(2, 64, 12, 64)
    asked = p, (9216, 1, 768, 64), (576, 1, 192, 64), True, torch.float16, "ieee", A100
    expected = pooled_choice(*asked)
    other = next(
        plan
        for plan in planner.candidates(pooled_problem(p), Direction.FORWARD, LAST, A100)
        if plan != expected and not any(plan.pack)
    )
    # Measured for the pooled convolution: the key of the convolution alone is another.
    key = database.key(pooled_problem(p), Direction.FORWARD, LAST)
    assert key != database.key(p, Direction.FORWARD, LAST)
    monkeypatch.setattr(
        database, "lookup", lambda problem, *rest: other if database.key(problem, *rest[:2]) == key else None
    )
    pooled_choice.cache_clear()
    assert pooled_choice(*asked) == other
    pooled_choice.cache_clear()
