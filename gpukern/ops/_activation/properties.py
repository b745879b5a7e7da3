"""What the derivative of each activation is computed from, by name. Plain data: imports neither torch nor Triton."""

from __future__ import annotations

from typing import NamedTuple


class Properties(NamedTuple):
    #: act′ is not a function of the output: a backward pass must keep the input of the activation
    needs_input: bool = False
    #: act″ is zero wherever it is defined
    piecewise_linear: bool = False


PROPERTIES = {
    "relu": Properties(piecewise_linear=True),
    "relu6": Properties(piecewise_linear=True),
    "leaky_relu": Properties(piecewise_linear=True),
    "sigmoid": Properties(),
    "hardsigmoid": Properties(piecewise_linear=True),
    "tanh": Properties(),
    "silu": Properties(needs_input=True),
    "gelu": Properties(needs_input=True),
    "gelu_tanh": Properties(needs_input=True),
    "hardswish": Properties(needs_input=True),
}
