"""Formulas of ``torch.utils.flop_counter`` for gpukern's operators: those of the equivalent torch operators.

It counts two operations for each product of convolutions and matrices, in the padding too, and nothing else.
"""

from __future__ import annotations

import functools
from types import ModuleType

from gpukern.ops._operators import OPERATORS
from gpukern.runtime.import_hooks import when_imported


def register_formulas() -> None:
    """Register the formulas now or when torch's counter is imported, which imports Triton and is not needed before."""
    when_imported("torch.utils.flop_counter", _register)


def _register(counter: ModuleType) -> None:
    for overload, operator in OPERATORS.items():
        packet = overload.overloadpacket
        if operator.flops is not None and packet not in counter.flop_registry:
            formula = functools.partial(operator.flops, counter.conv_flop_count)
            counter.register_flop_formula(packet)(formula)
