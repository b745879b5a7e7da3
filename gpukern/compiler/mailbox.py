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

import torch
from torch._dynamo import compiled_autograd

_current_pass = torch._C._current_graph_task_id


class Mailbox:
    """What the users of one tensor leave for each other during one backward pass.

    ``users``: how many there are. A pass that stops early (gradients of some inputs only) must not leave anything to
    the next one, so everything is forgotten when another pass begins. ``broken`` if a user's forward found that it
    cannot take part (its operand was converted to another dtype): then each returns its own gradient.
    """

    __slots__ = ("_arrived", "_made", "_pass", "broken", "gradient", "sums", "users")

    def __init__(self, users: int) -> None:
        self.users = users
        self.broken = False
        self._pass = -1
        self._reset()

    def _reset(self) -> None:
        self._arrived = 0
        self.gradient: torch.Tensor | None = None
        self.sums: torch.Tensor | None = None
        self._made: torch.Tensor | None = None

    @property
    def made(self) -> torch.Tensor | None:
        """The tensor itself, where somebody computed it once more in this pass."""
        return self._made if self._pass == _current_pass() else None

    @made.setter
    def made(self, tensor: torch.Tensor) -> None:
        self._enter()
        self._made = tensor

    def _enter(self) -> None:
        number = _current_pass()
        if number != self._pass:
            self._reset()
            self._pass = number

    def is_open(self) -> bool:
        """Whether gradients are left here in this pass.

        A pass that is recorded, for derivatives of derivatives, ends it: what it records uses the tensor too, and the
        gradients that it will have by that go to autograd alone. So does a compiled backward pass, which adds what the
        users return, None too.
        """
        self.broken = self.broken or torch.is_grad_enabled() or compiled_autograd.in_compiled_autograd_region
        return not self.broken

    def is_last(self) -> bool:
        """Note that a user has arrived in this pass; whether all others have."""
        self._enter()
        self._arrived += 1
        return self._arrived == self.users

    def leave(self, gradient: torch.Tensor) -> torch.Tensor | None:
        """For users that are no convolution: leave ``gradient``, or return the whole of it if all have arrived."""
        last = self.is_last()
        total = gradient if self.gradient is None else self.gradient + gradient
        self.gradient = None if last else total
        return total if last else None

    def collect(self, gradient: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """For y's own backward: (the gradient, its sums fp32 [2, C] if it is g already).

        Where the last user never came, a part of the gradient was left and is added here.
        """
        if _current_pass() != self._pass:
            return gradient, None
        left, sums = self.gradient, self.sums
        self._reset()
        if left is not None:
            gradient = left if gradient is None else gradient + left
        return gradient, sums
