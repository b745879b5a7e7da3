"""How kernels are launched: in a process of its own, where launches are recorded and not emulated."""

from __future__ import annotations

import json

import pytest

COMPILE = """
import json
import torch
import gpukern.functional as F
from gpukern.runtime.compile_only import record_launches
from gpukern.runtime.device import H100
from gpukern.runtime.launcher import launch
from tests.compile.small_kernels import copy_gluon_kernel

def tensor(*shape):
    return torch.empty(shape, dtype=torch.float16, device="meta").contiguous(memory_format=torch.channels_last)

with record_launches(H100) as launches:
    F.max_pool2d(F.conv2d(tensor(2, 16, 9, 9), tensor(16, 1, 3, 3), groups=16), 2)
    # In Gluon, which compiles in ways of its own.
    x = torch.empty(128, dtype=torch.float16, device="meta")
    launch(copy_gluon_kernel, (1,), x.device, (x, x), {"BLOCK": 128, "num_warps": 4})
print(json.dumps([(x.kernel, x.compile().metadata.enable_fp_fusion) for x in launches]))
"""

EMULATE = """
import torch
import gpukern.functional as F
print(F.relu(torch.tensor([-1.0, 2.0])).tolist())
"""


@pytest.mark.parametrize("default", ["0", None])
def test_products_and_sums_are_fused_whatever_the_default(run_python, monkeypatch, default):
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    environment = {} if default is None else {"TRITON_DEFAULT_FP_FUSION": default}
    result = run_python(COMPILE, GPUKERN_PLANS="", PYTHONWARNINGS="error", **environment)
    assert result.returncode == 0, result.stderr
    fused = dict(json.loads(result.stdout))
    assert {"conv2d_depthwise_kernel", "max_pool2d_kernel", "copy_gluon_kernel"} <= fused.keys()
    assert all(fused.values()), fused


def test_emulation_takes_it_too(run_python):
    result = run_python(EMULATE, GPUKERN_EMULATE="1", PYTHONWARNINGS="error")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[0.0, 2.0]\n"
