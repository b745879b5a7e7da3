"""Bad arguments of pooling raise what torch raises, before anything is launched."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as T

import gpukern.functional as F
from gpukern.ops._pool2d import launch as launches
from gpukern.runtime.mode import Mode, force_mode

IMAGE = (2, 3, 8, 9)
WRONG = [
    *((name, IMAGE, args, {}) for name in ("max_pool2d", "avg_pool2d") for args in [
        ((2, 2, 2),), ((),), (0,), (-1,), (2.0,), ("2",), (True,), (None,), (9,), ((2, 10),),
        (2, 0), (2, -1), (2, (1, 2, 3)), (2, 2.0), (2, "1"), (2, 1, 2), (3, 1, -1), (3, 1, 1.0), (3, 1, ()),
        (2, 1, (1, 1, 1)),
    ]),
    *((name, shape, (2,), {}) for name in ("max_pool2d", "avg_pool2d") for shape in [
        (2, 0, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0), (0, 3, 0, 8), (1, 2, 3, 8, 8), (0, 8, 8), (3, 0, 8),
    ]),
    *(("max_pool2d", shape, (2,), {}) for shape in [(8, 8), (8,)]),  # torch's avg_pool2d stumbles: IndexError
    *(("max_pool2d", IMAGE, args, {}) for args in [
        (2, 1, 0, 0), (2, 1, 0, -1), (2, 1, 0, (1, 2, 3)), (2, 1, 0, 8), (3, 1, 2, 2), (2, 1, 0, 1.0), (2, 1, 0, ()),
        (2, 1, 0, 1, 1), (2, 1, 0, 1, None),
    ]),
    *(("avg_pool2d", IMAGE, (2,), options) for options in [
        dict(divisor_override=0), dict(divisor_override=2.0), dict(divisor_override=True), dict(count_include_pad=1),
        dict(ceil_mode=1), dict(ceil_mode=None),
    ]),
    *(("adaptive_avg_pool2d", IMAGE, (size,), {}) for size in [
        None, (3,), (None,), (3, 4, 5), -1, (3, -1), 2.0, "3", "34", True, (), (3.0, 2),
    ]),
    *(("adaptive_avg_pool2d", shape, (2,), {}) for shape in [(2, 3, 0, 8), (2, 3, 8, 0), (8, 8), (1, 2, 3, 8, 8)]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape", "args", "options"), WRONG, ids=str)
def test_errors_are_of_torchs_type(name, shape, args, options, device, monkeypatch):
    monkeypatch.setattr(launches, "launch", None)  # nothing may be launched
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        getattr(T, name)(torch.randn(shape), *args, **options)
    with pytest.raises(theirs.type):
        getattr(F, name)(torch.randn(shape, device=device), *args, **options)


def test_unusual_but_right_arguments(device):
    x = torch.randn(1, 1, 6, 6, device=device)
    expected = F.max_pool2d(x, 2)
    for arguments in (([2],), (2, None), (2, ()), (2, []), ((2, 2), 2, (0,)), (torch.tensor(2),)):
        assert torch.equal(F.max_pool2d(x, *arguments), expected)


@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"])
def test_wrong_tensors(name, device):
    function = getattr(F, name)
    for no_tensor in (None, [[1.0]], 3):
        with pytest.raises(TypeError):
            function(no_tensor, 2)
    for dtype in (torch.int32, torch.bool, torch.complex64):
        with pytest.raises(RuntimeError, match="float"):
            function(torch.ones(1, 1, 4, 4, device=device).to(dtype), 2)
    with pytest.raises(RuntimeError, match="float32, float16 and bfloat16"):
        function(torch.ones(1, 1, 4, 4, device=device, dtype=torch.float64), 2)
    with force_mode(Mode.REFERENCE):
        assert function(torch.ones(1, 1, 4, 4, dtype=torch.float64), 2).dtype is torch.float64
