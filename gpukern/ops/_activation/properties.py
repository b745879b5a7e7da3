"""Inputs of each activation's derivative, by name. Plain data: imports neither torch nor Triton."""

from __future__ import annotations

from typing import NamedTuple


class Properties(NamedTuple):
    #: a backward pass keeps the input of the activation: act′ is not a function of the output, or torch keeps the input
    #: too, and lets the result be changed in place
    needs_input: bool = False
    #: in place, torch keeps the result all the same: act′ is that function of either
    in_place_keeps_result: bool = False
    #: act″ is zero wherever it is defined
    piecewise_linear: bool = False


PROPERTIES = {
    "relu": Properties(piecewise_linear=True),
    "relu6": Properties(needs_input=True, piecewise_linear=True),
    "leaky_relu": Properties(needs_input=True, in_place_keeps_result=True, piecewise_linear=True),
    "sigmoid": Properties(),
    "hardsigmoid": Properties(needs_input=True, piecewise_linear=True),
    "tanh": Properties(),
    "silu": Properties(needs_input=True),
    "gelu": Properties(needs_input=True),
    "gelu_tanh": Properties(needs_input=True),
    "hardswish": Properties(needs_input=True),
}
