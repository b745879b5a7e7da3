"""Layers are made as those of ``torch.nn``, and tell so."""

from __future__ import annotations

import inspect

import pytest
import torch

import gpukern.nn

NAMES = [name for name in gpukern.nn.__all__ if hasattr(torch.nn, name)]


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_torchs(name):
    ours, theirs = getattr(gpukern.nn, name), getattr(torch.nn, name)
    assert inspect.signature(ours) == inspect.signature(theirs)


def test_signature_of_a_subclass_is_its_own():
    class Square(gpukern.nn.Conv2d):
        def __init__(self, channels: int, size: int = 3) -> None:
            super().__init__(channels, channels, size)

    class Larger(Square):
        pass

    for layer in (Square, Larger):
        assert str(inspect.signature(layer)) == "(channels: 'int', size: 'int' = 3) -> 'None'"
    assert list(inspect.signature(gpukern.nn.BatchNormAct2d).parameters)[-2:] == ["activation", "negative_slope"]


def test_signature_of_a_layer_is_that_of_its_call():
    ours, theirs = (nn.Linear(3, 2) for nn in (gpukern.nn, torch.nn))
    assert inspect.signature(ours) == inspect.signature(theirs)


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d", "Linear", "BatchNorm2d"])
def test_skip_init(name):
    arguments = {"BatchNorm2d": (4,), "Linear": (4, 3)}.get(name, (4, 3, 3))
    layer = torch.nn.utils.skip_init(getattr(gpukern.nn, name), *arguments, dtype=torch.bfloat16)
    assert type(layer) is getattr(gpukern.nn, name)
    assert (layer.weight.device.type, layer.weight.dtype) == ("cpu", torch.bfloat16)
