"""What the tests of the compiler share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gpukern.runtime.mode import Mode, force_mode


@pytest.fixture
def cpu() -> Iterator[torch.device]:
    """Where plain torch serves, for tests of what is made of graphs, not of the kernels."""
    with force_mode(Mode.REFERENCE):
        yield torch.device("cpu")


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    """Dynamo begins each test with nothing, and its guards hold no model of an earlier one."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
