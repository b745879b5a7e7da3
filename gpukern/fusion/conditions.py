"""Conditions for a node to join a match, and the reasons against, in words for the report."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch.fx import Node

from gpukern.fusion.affine import foldable, is_batch_norm
from gpukern.fusion.constants import constant
from gpukern.fusion.match import Match
from gpukern.fusion.products import Product
from gpukern.fusion.program import Program, arguments, aten, is_call, module_path, operation, tensor_of, title, value
from gpukern.runtime.tensors import KERNEL_DTYPES


def skipped_by(node: Node, skip: Sequence[str]) -> str | None:
    """The pattern that names the module of ``node``, or one around it."""
    parts = module_path(node).split(".")
    paths = [".".join(parts[: number + 1]) for number in range(len(parts))]
    return next((pattern for pattern in skip if any(fnmatch.fnmatchcase(path, pattern) for path in paths)), None)


def why_no_product(program: Program, found: Product) -> str | None:
    """Return the reason why a product cannot become a match; None if it can."""
    if constant(program, found.weight) is None:
        return "its weight depends on the input"
    if found.bias is not None and constant(program, found.bias) is None:
        return "its bias depends on the input"
    output = value(found.node)
    if output is None or not output.is_floating_point():
        return f"computes in {output.dtype}" if output is not None else "computes several tensors"
    unbatched = found.kind != "linear" and not found.has_channels
    return "takes one sample without a batch dimension" if unbatched else None


def why_not_foldable(program: Program, node: Node) -> str | None:
    """Return the reason why a batch norm is not a constant scale and shift, in any position; None if it is one."""
    if not is_batch_norm(node):
        return f"{operation(node)} returns its statistics too, and the model uses them"
    given = arguments(node)
    if given["training"] or given["running_mean"] is None:
        return "normalises by statistics of the batch, which differ from call to call"
    return None if foldable(program, node) else "its parameters or statistics depend on the input"


def has_kernel(program: Program, node: Node) -> bool:
    """Whether gpukern::batch_norm can compute a batch norm that was not folded."""
    input = tensor_of(arguments(node)["input"])
    return foldable(program, node) and input.dim() in (2, 3, 4) and input.dtype in KERNEL_DTYPES


def other_operand(add: Node, one: Node) -> Node | None:
    first, second = add.args[:2]
    other = second if first is one else first
    return other if isinstance(other, Node) and other is not one else None


def why_no_residual(add: Node, one: Node) -> str | None:
    """Return the reason why an epilogue cannot compute ``one + other``; None if it can."""
    if not is_call(add, aten.add.Tensor):
        return "not an addition of tensors"
    other = other_operand(add, one)
    if other is None or value(other) is None:
        return "not an addition of two different tensors"
    alpha = arguments(add)["alpha"]
    if alpha != 1:
        return f"alpha = {alpha}"
    mine, theirs = tensor_of(one), tensor_of(other)
    if tuple(mine.shape) != tuple(theirs.shape):
        return "broadcasts"
    if mine.dtype != theirs.dtype or tensor_of(add).dtype != mine.dtype:
        return "adds tensors of different dtypes"
    return None


def why_not_next(node: Node, source: Node, match: Match | None) -> str:
    """Return why ``node`` is not in ``match``, whose output ``source`` it takes, or why there is no match."""
    called = title(source)
    others = [user for user in source.users if user is not node]
    if any(user.op == "output" for user in others):
        return f"{called} before it is an output of the model"
    if others:
        return f"the result of {called} has other users: {', '.join(title(user) for user in others)}"
    if match is None:
        return f"{called} before it was left as it is"
    return _why_no_epilogue(node, source, match)


def _why_no_epilogue(node: Node, source: Node, match: Match) -> str:
    if is_batch_norm(node):
        if not match.own_product.has_channels:
            rank = tensor_of(source).dim()
            return f"normalises dimension 1 of {rank}, while the features of {title(source)} are the last"
        return f"{operation(source)}, {title(source)}, comes between it and the {match.own_product.kind}"
    if is_call(node, aten.add.Tensor):
        why = why_no_residual(node, source)
        if why:
            return why
        if match.residual is not None:
            return f"the kernel of {title(match.core)} adds {title(match.residual)} already"
    if match.activated is not None:
        return f"follows an activation, {title(match.activated)}"
    return f"{match.operator} has no epilogue for it"
