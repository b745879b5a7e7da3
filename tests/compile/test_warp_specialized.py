"""Every tile of the warp-specialised kernel compiles for Hopper to the machine code that was meant.

The interpreter cannot run the kernel, so that nothing else meets Triton's checks of its layouts.
"""

from __future__ import annotations

import json

import pytest

from tests.compile.faults import BUDGETS, faults

COMPILE = """
import json, sys
import torch
from gpukern.runtime.strides import dense_strides
from gpukern.conv.plan import Direction, Operands
from gpukern.conv.request import Epilogue, Request, shapes
from gpukern.conv.problem import conv_problem
from gpukern.conv.families.warp_specialized.launch import prepare
from gpukern.conv.families.warp_specialized.plan import candidates
from gpukern.ops._reduction.functions import Statistics
from gpukern.ops._reduction.launch import with_workspace
from gpukern.runtime.compile_only import record_launches
from gpukern.runtime.device import H100
from tests.compile.worker import describe

def launch(size, channels, kernel, direction, dtype, epilogue=Epilogue(), bias=False):
    p = conv_problem((32, channels, size, size), (channels, channels, *kernel), None, (1, 1), (1, 1, 1, 1), (1, 1), 1)
    of_all = shapes(p, direction)
    strides = [dense_strides(shape, channels_last=True) for shape in of_all]
    first, second, out = (
        torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        for shape, stride in zip(of_all, strides, strict=True)
    )
    for plan in candidates(p, direction, Operands(str(dtype).removeprefix("torch.")), H100):
        prepared = prepare(Request(p, direction, *strides, dtype, epilogue, H100), plan)
        statistics = None
        if epilogue.statistics:
            numbers = (torch.empty(channels, device="meta") for _ in range(4))
            statistics = Statistics(None, None, None, *numbers, 0.1)
            statistics = with_workspace(statistics, channels, first.device, *prepared.tiles)
        bias_of = torch.empty(channels, dtype=dtype, device="meta") if bias else None
        prepared.run(first, second, out, bias_of, out if epilogue.residual else None, statistics, 0.0)

with record_launches(H100) as launches:
    launch(14, 256, (3, 3), Direction.FORWARD, torch.float16, Epilogue("silu", residual=True, statistics=True), True)
    launch(56, 64, (3, 3), Direction.FORWARD, torch.bfloat16, Epilogue("relu"), True)
    launch(28, 96, (1, 1), Direction.FORWARD, torch.float16)
    launch(14, 256, (3, 3), Direction.INPUT_GRAD, torch.bfloat16)
for launch in launches:
    print(json.dumps(describe(launch)))
"""


@pytest.mark.slow
def test_machine_code(run_python):
    result = run_python(COMPILE)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == {"conv2d_warp_specialized_kernel"} and len(rows) >= 16
    assert not [(faults(row), row) for row in rows if faults(row)]
    for row in rows:
        # Two warps' programs: one that only fetches, one that only multiplies and hands buffers back.
        (loop,) = row["loops"]
        assert loop["length"] <= BUDGETS[row["kernel"]] and not loop["copies"]
        assert row["instructions"]["USETMAXREG"], "registers go from the fetching warp to those that multiply"
