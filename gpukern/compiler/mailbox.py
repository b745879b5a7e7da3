"""Gradients of one tensor, handed on so that the last of its users finishes them.

y = act(batch_norm(z) + residual) is read by convolutions, and as a residual by the batch norm of a later block. In the
backward pass autograd would add up what they return and give the sum to y's batch norm, which then needs a pass over
memory for act′ and its two sums. The users of y share a :class:`Mailbox` instead: all but the last to arrive leave
their gradient in it and return None; the last one, if it is a convolution, computes

    g = (its input gradient + what was left) · act′,   Σ g,   Σ g·x̂

in the epilogue of one kernel, returns g and leaves the sums. Only a compiled graph can promise that no other user of y
exists, so only graphs make mailboxes.
"""

from __future__ import annotations

import weakref

import torch
from torch._dynamo import compiled_autograd
from torch.autograd import Variable

_current_pass = torch._C._current_graph_task_id


class Left:
    """What was left in one backward pass: ``arrived`` users' ``gradient``, the ``sums`` of the last one, the tensor
    itself where somebody ``made`` it once more."""

    __slots__ = ("arrived", "gradient", "made", "sums")

    def __init__(self) -> None:
        self.arrived = 0
        self.gradient: torch.Tensor | None = None
        self.sums: torch.Tensor | None = None
        self.made: torch.Tensor | None = None


class Mailbox:
    """What the users of one tensor leave for each other during a backward pass.

    ``users``: how many there are. ``broken`` if a user's forward found that it cannot take part (its operand was
    converted to another dtype): then each returns its own gradient.

    Passes are kept apart by autograd's number of them: one over the same graph may run inside another, from a hook, or
    beside it, in another thread. The tensor's own backward, which comes last, empties the box; what a failed pass left
    is read by no other.
    """

    __slots__ = ("__weakref__", "_passes", "broken", "users")

    def __init__(self, users: int) -> None:
        self.users = users
        self.broken = False
        self._passes: dict[int, Left] = {}

    @property
    def made(self) -> torch.Tensor | None:
        """The tensor itself, where somebody computed it once more in this pass."""
        left = self._passes.get(_current_pass())
        return None if left is None else left.made

    @made.setter
    def made(self, tensor: torch.Tensor) -> None:
        left, number, box = self._left(), _current_pass(), weakref.ref(self)
        left.made = tensor

        def forget() -> None:
            if (this := box()) is not None:
                this._passes.pop(number, None)

        # The tensor's own backward may be no part of the pass, where only gradients of later weights are wanted.
        Variable._execution_engine.queue_callback(forget)

    def _left(self) -> Left:
        return self._passes.setdefault(_current_pass(), Left())

    def is_open(self) -> bool:
        """Whether gradients are left here in this pass.

        A pass that is recorded, for derivatives of derivatives, ends it: what it records uses the tensor too, and the
        gradients that it will have by that go to autograd alone. So does a compiled backward pass, which adds what the
        users return, None too. A pass that has left something here goes on, as the rest of it is collected here.
        """
        if _current_pass() in self._passes:
            return True
        self.broken = self.broken or torch.is_grad_enabled() or compiled_autograd.in_compiled_autograd_region
        return not self.broken

    def arrive(self) -> Left:
        """Note that a user has arrived in this pass; return what the others have left."""
        left = self._left()
        left.arrived += 1
        return left

    def leave(self, gradient: torch.Tensor) -> torch.Tensor | None:
        """For users that are no convolution: leave ``gradient``, or return the whole of it if all have arrived."""
        left = self.arrive()
        total = gradient if left.gradient is None else left.gradient + gradient
        last = left.arrived == self.users
        left.gradient = None if last else total
        return total if last else None

    def collect(self, gradient: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """For y's own backward: (the gradient, its sums fp32 [2, C] if it is g already).

        Where the last user never came, a part of the gradient was left and is added here.
        """
        left = self._passes.pop(_current_pass(), None)
        if left is None:
            return gradient, None
        if left.gradient is not None:
            gradient = left.gradient if gradient is None else gradient + left.gradient
        return gradient, left.sums
