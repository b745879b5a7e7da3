"""How layer norm walks over its operands, into how many programs it is cut, and what these read and write."""

from __future__ import annotations

import json

import pytest
import torch

from gpukern.ops._layer_norm.planner import chunk_plan, row_plan, tile_plan
from gpukern.ops._layer_norm.problem import walk
from gpukern.runtime.device import EMULATED, H100
from tests.ops.test_layer_norm import LONG, SHAPES


def strides(*shape: int) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def test_walks_join_what_lies_together():
    dense = walk((32, 56, 56, 96), 1, (strides(32, 56, 56, 96),))
    assert (dense.outer, dense.height, dense.inner, dense.columns) == (1, 1, 32 * 56 * 56, 96)
    assert dense.rows_run == (False,) and dense.column_align == 16
    planes = torch.empty(32, 96, 56, 56, device="meta").permute(0, 2, 3, 1).stride()
    both = walk((32, 56, 56, 96), 1, (planes, strides(32, 56, 56, 96)))
    assert (both.outer, both.height, both.inner) == (1, 32, 56 * 56)
    assert both.rows_run == (True, False) and (both.row_align, both.column_align) == (16, 16)
    assert both.strides[0] == (0, 96 * 56 * 56, 1, 56 * 56)
    assert walk((2, 1000), 1, (strides(2, 1000),)).column_align == 8
    with pytest.raises(ValueError, match="joined"):  # channels_last, normalized over [C, H, W]
        walk((2, 3, 4, 5), 3, ((60, 1, 15, 3),))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", [(6304, 768), (100352, 96), (4096, 4096), (4096, 8192), (50, 1000)], ids=str)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_rows_that_fit_keep_a_gpu_busy(shape, itemsize, backward):
    plan = row_plan(walk(shape, 1, (strides(*shape),)), (itemsize,) * (1 + backward), H100, backward)
    assert plan.programs >= min(plan.steps, 0.7 * H100.sm_count)
    assert (plan.programs - 1) * plan.steps_per_program < plan.steps <= plan.programs * plan.steps_per_program
    assert plan.steps * plan.rows >= shape[0] and plan.columns >= shape[1]
    assert plan.rows * plan.columns <= 32 * 32 * plan.warps  # elements of a thread
    assert (plan.stages - 1) * plan.rows * plan.columns * itemsize * (1 + backward) <= 64 * 1024


def test_long_rows_are_shared_by_programs():
    path = walk((8, 96 * 56 * 56), 1, (strides(8, 96 * 56 * 56),))
    chunks, tiles = chunk_plan(path, H100), tile_plan(path, H100, True)
    assert 8 * chunks.splits >= 2 * H100.sm_count
    assert (chunks.splits - 1) * chunks.chunks_per_split * chunks.columns < path.columns
    assert tiles.column_tiles * tiles.splits >= 4 * H100.sm_count


def test_emulated_shapes_take_both_ways():
    """The shapes of the other tests reach what they are there for."""
    shape, dims = SHAPES["many rows"]
    assert row_plan(walk(shape, dims, (strides(*shape),)), (4, 4), EMULATED, True).programs > 1
    few, _ = SHAPES["rows"]
    assert row_plan(walk(few, 1, (strides(*few),)), (4, 4), EMULATED, True).programs == 1
    assert chunk_plan(walk(LONG, 1, (strides(*LONG),)), EMULATED).splits > 1


#: shape, layout, dtype, whether a layer norm, whether with a residual
COUNTED_CALLS = {
    "ViT": ((32, 197, 768), "rows", "float16", True, False),
    "ConvNeXt, whose images are permuted": ((32, 56, 56, 96), "NCHW", "float16", True, False),
    "Swin V2, which adds": ((32, 56, 56, 96), "rows", "float32", True, True),
    "RMS": ((4096, 4096), "rows", "bfloat16", False, False),
}
COUNT = """
import json, sys, torch
import gpukern.functional as F
from gpukern.runtime.accesses import AccessFinder, tensors
from gpukern.runtime.compile_only import record_launches
from gpukern.runtime.device import H100

find = AccessFinder()

def moved(launches):
    total = 0
    for launch in launches:
        given, found = tensors(launch), find(launch)
        total += sum(given[i].numel() * given[i].itemsize for which in found for i in which)
    count = len(launches)
    launches.clear()
    return count, total

def counts(shape, layout, dtype, centered, residual):
    dtype = getattr(torch, dtype)
    x = torch.empty(shape, dtype=dtype, device="meta")
    if layout == "NCHW":
        x = torch.empty(shape[0], shape[3], *shape[1:3], dtype=dtype, device="meta").permute(0, 2, 3, 1)
    x = x.requires_grad_()
    weight, bias = (torch.empty(shape[-1], device="meta", requires_grad=True) for _ in range(2))
    options = {"residual": torch.empty(shape, dtype=dtype, device="meta"), "activation": "relu"} if residual else {}
    with record_launches(H100) as launches:
        parameters = (weight, bias) if centered else (weight,)
        y = (F.layer_norm if centered else F.rms_norm)(x, shape[-1:], *parameters, **options)
        forward = moved(launches)
        y.backward(torch.empty_like(y))
        return forward, moved(launches)

print(json.dumps([counts(*call) for call in json.loads(sys.argv[1])]))
"""


def test_bytes_are_at_most_a_tenth_above_the_floor(run_python):
    """Each input read once, each output written once; what comes on top are the parts of the parameters' sums."""
    result = run_python(COUNT, json.dumps([*COUNTED_CALLS.values()]))
    assert result.returncode == 0, result.stderr
    counted = json.loads(result.stdout)
    for (name, call), (forward, backward) in zip(COUNTED_CALLS.items(), counted, strict=True):
        shape, _, dtype, _, residual = call
        image = torch.Size(shape).numel() * getattr(torch, dtype).itemsize
        assert forward[0] == backward[0] == 1, name  # launch
        assert (2 + residual) * image <= forward[1] <= 1.1 * (2 + residual) * image, name
        # With a residual, y is read for the activation's derivative, in place of the residual.
        assert (3 + residual) * image <= backward[1] <= 1.1 * (3 + residual) * image, name
