"""Products of TF32 have no bias: kernels round their operands, which tensor cores would cut.

Of positive operands nothing cancels: cut, each product is too small, by 7.0 · 10⁻⁴ on average for operands uniform in
[0.1, 1.1), and so is every sum (measured on an H200: a mean of −7.0 · 10⁻⁴ at a root mean square of 7.0 · 10⁻⁴).
Rounded, errors have both signs. An operand's is at most 2⁻¹¹, and the mean over all outputs is one over all values of
the operand: six standard deviations are 6 · 2⁻¹¹ / √values, for each of the two. The sums' own roundings, which tensor
cores cut too, add 2⁻²³ for each of the partial sums of four products.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from gpukern.conv import launch
from gpukern.conv.plan import Direction, Variant
from gpukern.conv.request import operands_of, shapes
from tests.ops.conv_cases import Case, as_problem
from tests.ops.test_conv2d_forced import EMULATABLE, FORMATS, plans, terms, truth

CASES = (
    Case("1x1", (4, 32, 6, 6), 32, (1, 1)),
    Case("3x3", (32, 16, 4, 4), 16, (3, 3), padding=1),
    Case("few channels", (2, 3, 20, 20), 32, (5, 5), stride=2, padding=2),
    Case("groups", (1, 32, 6, 6), 32, (3, 3), padding=1, groups=4),
)
#: Of products of positive numbers; see above.
CUT = -7.0e-4


def errors(case: Case, layout: str, device: torch.device) -> dict[tuple[Direction, Variant], tuple[float, float]]:
    """(mean relative error, what is allowed) of each direction and kernel."""
    p, found = as_problem(case), {}
    made = (torch.rand(shape, device=device) + 0.1 for shape in (case.input, case.weight, (p.N, p.K, p.P, p.Q)))
    x, w, dy = (tensor.contiguous(memory_format=FORMATS[layout]) for tensor in made)
    for direction, (first, second) in zip(Direction, ((x, w), (dy, w), (dy, x)), strict=True):
        output = torch.empty(shapes(p, direction)[2]).contiguous(memory_format=FORMATS[layout])
        strides = first.stride(), second.stride(), output.stride()
        operands = operands_of(p, direction, strides, True, torch.float32, "tf32")
        exact = truth(p, direction, *(t.double().cpu() for t in (first, second)))
        allowed = sum(6 * 2.0**-11 * t.numel() ** -0.5 for t in (first, second))
        allowed += terms(p, direction) / 4 * 2.0**-23
        for plan in plans(p, direction, operands, device).values():
            prepared = launch.prepared_for(p, direction, first, second, layout == "channels_last", plan=plan)
            actual, _ = launch.run(prepared, first, second)
            found[direction, plan.variant] = ((actual.double().cpu() - exact) / exact).mean().item(), allowed
    return found


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_products_of_positive_operands_have_no_bias(case, layout, device):
    found = errors(case, layout, device)
    for (direction, variant), (mean, allowed) in found.items():
        assert allowed < -CUT / 2  # which could not tell rounded from cut
        assert abs(mean) <= allowed, f"{direction.value} by {variant.value}: {mean:.2e}, {allowed:.1e} allowed"


def test_every_kernel_of_products_is_among_them():
    # What multiplies element by element does so in fp32.
    expected = set(EMULATABLE) - {Variant.DIRECT, Variant.DEPTHWISE, Variant.DEPTHWISE_1D}
    found = set()
    for case in CASES:
        p = as_problem(case)
        for direction, layout in itertools.product(Direction, FORMATS.values()):
            tensors = (torch.empty(s, device="meta").contiguous(memory_format=layout) for s in shapes(p, direction))
            strides = tuple(tensor.stride() for tensor in tensors)
            operands = operands_of(p, direction, strides, True, torch.float32, "tf32")
            found |= set(plans(p, direction, operands, torch.device("cpu")))
    assert found >= expected
