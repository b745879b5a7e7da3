"""Hooks to observe which plans are chosen and to override the choice: for tools and tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from gpukern.conv.choice import forced
from gpukern.conv.plan import ConvPlan
from gpukern.conv.prepare import Observer, forget, observers


@contextlib.contextmanager
def observe(callback: Observer) -> Iterator[None]:
    """Call ``callback(call, device)`` inside the block whenever a plan is chosen.

    Cached choices are made again. Calls that differ only in their epilogue are reported once each.
    """
    observers.append(callback)
    forget()
    try:
        yield
    finally:
        observers.remove(callback)


@contextlib.contextmanager
def force_plan(plan: ConvPlan) -> Iterator[None]:
    """Launch every convolution inside the block with ``plan``, whether or not it is a candidate.

    Convolutions that share a launch with a max pool keep their own plans.
    """
    forced.append(plan)
    forget()
    try:
        yield
    finally:
        forced.pop()
        forget()
