"""What the driver is told of a descriptor: an element type that rounds where the operand is one of TF32."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from triton.runtime import driver

from gpukern.runtime.descriptor import Described

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
