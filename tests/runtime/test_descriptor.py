"""What the driver is told of a descriptor: an element type that rounds where the operand is one of TF32."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from triton.runtime import driver

from gpukern.runtime.descriptor import Described, channel_run_strides, whole_run

FLOAT32, TFLOAT32 = 7, 11  # of CUtensorMapDataType
METADATA = {"swizzle": 3, "elem_size": 4, "elem_type": FLOAT32, "block_size": [8, 32], "fp4_padded": False}


@pytest.fixture
def element_type(monkeypatch):
    """Of the tensor map that Triton's launcher would make of a descriptor."""

    def of(described: Described) -> int:
        made = []

        def fill(address, swizzle, size, kind, *rest):
            made.append(kind)

        utils = SimpleNamespace(fill_tma_descriptor=fill, fill_tma_descriptor_tiled=fill)
        monkeypatch.setattr(driver, "_active", SimpleNamespace(utils=utils))
        from triton.backends.nvidia.driver import make_tensordesc_arg

        # Triton 3.9 has a third parameter, which it does not use.
        rest = [None] * (len(inspect.signature(make_tensordesc_arg).parameters) - 2)
        make_tensordesc_arg(described.of(torch.empty(64, 32)), METADATA, *rest)
        return made[0]

    return of


def test_operands_of_tf32_round(element_type):
    described = Described((64, 32), (32, 1), (8, 32))
    assert element_type(described.operand(torch.float32, "tf32")) == TFLOAT32
    for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32x3"), (torch.float16, "tf32")):
        assert element_type(described.operand(dtype, precision)) == FLOAT32, (dtype, precision)
    assert element_type(described.checked(torch.float32)) == FLOAT32  # what is stored


def test_operands_are_checked():
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        Described((64, 30), (30, 1), (8, 32)).operand(torch.float32, "tf32")


@pytest.mark.parametrize("dtype, sixteen", [(torch.float32, 4), (torch.float16, 8)])
def test_strides_of_one_element_are_made_whole_units_of_16_bytes(dtype, sixteen):
    """PyTorch leaves any number there; strides that are used stay as they are, whatever they are."""
    assert [whole_run(length, dtype) for length in (0, 1, sixteen, sixteen + 1)] == [0, sixteen, sixteen, 2 * sixteen]
    run = 3 * sixteen
    assert channel_run_strides((1, run - 1, 5, 1), (7, 1, 40, 3), dtype) == (run, 1, 40, run)
    assert channel_run_strides((2, 1, 1, 4), (7, 9, 0, 3), dtype) == (7, 1, sixteen, 3)
    N, C, H, W = 1, run, 1, 6
    n, c, h, w = channel_run_strides((N, C, H, W), (7, 1, 3, run), dtype)
    Described((N, H, W, C), (n, h, w, c), (1, 1, 2, sixteen)).checked(dtype)
