"""Why something that users look for, a batch norm, an addition or an activation, stayed as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from gpukern.fusion.affine import foldable, is_any_batch_norm, is_batch_norm
from gpukern.fusion.constants import constant
from gpukern.fusion.errors import FusionError
from gpukern.fusion.match import Match, skipped_by, why_no_residual
from gpukern.fusion.moving import PART_OF
from gpukern.fusion.products import activation, is_product, product
from gpukern.fusion.program import Program, arguments, aten, is_call, operation, title, value
from gpukern.fusion.report import NotFused
from gpukern.fusion.settle import downward, upward


@dataclass(frozen=True)
class Left:
    """``asked`` where the caller wanted it so; ``follows`` where it takes what a convolution or linear layer made."""

    node: Node
    told: NotFused
    follows: bool
    asked: bool


def left(program: Program, matches: Sequence[Match], skip: Sequence[str]) -> list[Left]:
    """All that could have been fused and was not, in the order of the computation."""
    inside = {node: match for match in matches for node in match.nodes}
    # A batch norm that is alone in its match was not fused with anything.
    fused = {node for node, match in inside.items() if match.fuses}
    found = []
    for node in program.graph.nodes:
        if node in fused or not _interesting(node, inside):
            continue
        asked = skipped_by(node, skip)
        source = _source(node, inside)
        if asked is None and source is not None and skipped_by(source, skip) is not None:
            asked = skipped_by(source, skip)
        reason = f"skipped, by {asked!r}" if asked else _reason(program, node, source, inside, skip)
        found.append(Left(node, NotFused(title(node), reason), _follows(source, inside), asked is not None))
    for node in _in_branches(program):
        if is_any_batch_norm(node):
            found.append(Left(node, NotFused(title(node), "inside a branch of control flow"), False, False))
    return found


def require_account(evaluated: Program, program: Program, matches: Sequence[Match], unfused: Sequence[Left]) -> None:
    """FusionError unless each batch norm of ``evaluated``, which became ``program``, is in a group or told of."""
    accounted = {node for match in matches if match.fuses for node in match.nodes} | {each.node for each in unfused}
    known = [*program.graph.nodes, *_in_branches(program)]
    silent = {node.meta.get(PART_OF, node.name) for node in known if is_any_batch_norm(node) and node not in accounted}
    kept = {node.meta.get(PART_OF, node.name) for node in known}
    lost = {node.name for node in evaluated.graph.nodes if is_any_batch_norm(node)} - kept
    if silent or lost:
        names = ", ".join(sorted(silent | lost))
        raise FusionError(f"of the batch norms {names} nothing can be said: they are neither fused nor left")


def _in_branches(program: Program) -> Iterator[Node]:
    """The nodes of graphs that control flow chooses from."""
    for module in program.modules.values():
        for inner in module.modules():
            if isinstance(inner, GraphModule):
                yield from inner.graph.nodes


def _interesting(node: Node, inside: dict[Node, Match]) -> bool:
    if is_any_batch_norm(node) or activation(node) is not None:
        return True
    if is_product(node):
        return node not in inside
    # Of additions only those that take what a product computes.
    return is_call(node, aten.add.Tensor) and _follows(_source(node, inside), inside)


def _source(node: Node, inside: dict[Node, Match]) -> Node | None:
    """The operand that a fusion would have started from."""
    operands = [each for each in node.all_input_nodes if value(each) is not None and each.op != "get_attr"]
    return next((each for each in operands if _follows(each, inside)), operands[0] if operands else None)


def _follows(source: Node | None, inside: dict[Node, Match]) -> bool:
    if source is None:
        return False
    match = inside.get(source)
    # What follows the pool of a match would have followed a pool without it too.
    return is_product(source) or (match is not None and match.product is not None and match.pool is None)


def _reason(program: Program, node: Node, source: Node | None, inside: dict[Node, Match], skip: Sequence[str]) -> str:
    if is_product(node):
        return _why_no_match(program, node)
    if is_any_batch_norm(node):
        why = _why_batch_norm(program, node)
        if why:
            return why
        # Both ways: neither into what comes before it nor into what follows.
        before = upward(program, node, skip) or _why_not_after(node, source, inside)
        after = downward(program, node, skip)
        return f"{before}; {after}" if isinstance(after, str) else str(before)
    return _why_not_after(node, source, inside)


def _why_not_after(node: Node, source: Node | None, inside: dict[Node, Match]) -> str:
    if source is None or source.op == "placeholder":
        return "follows the model's input"
    called = title(source)
    if not _follows(source, inside):
        return f"follows {operation(source)}, {called}: no convolution or linear layer"
    others = [user for user in source.users if user is not node]
    if any(user.op == "output" for user in source.users):
        return f"{called} before it is an output of the model"
    if others:
        return f"the result of {called} has other users: {', '.join(title(user) for user in others)}"
    return _why_not_epilogue(node, source, inside)


def _why_batch_norm(program: Program, node: Node) -> str | None:
    if not is_batch_norm(node):
        return f"{operation(node)} returns its statistics too, and the model uses them"
    given = arguments(node)
    if given["training"] or given["running_mean"] is None:
        return "normalises by statistics of the batch, which differ from call to call"
    if not foldable(program, node):
        return "its parameters or statistics depend on the input"
    return None


def _why_no_match(program: Program, node: Node) -> str:
    found = product(node)
    if constant(program, found.weight) is None:
        return "its weight depends on the input"
    if found.bias is not None and constant(program, found.bias) is None:
        return "its bias depends on the input"
    if not value(node).is_floating_point():
        return f"computes in {value(node).dtype}"
    return "takes one sample without a batch dimension"


def _why_not_epilogue(node: Node, source: Node, inside: dict[Node, Match]) -> str:
    match = inside.get(source)
    if match is None:
        return f"{title(source)} before it was left as it is"
    kind = match.product.kind
    if is_batch_norm(node):
        if not match.product.has_channels:
            rank = value(source).dim()
            return f"normalises dimension 1 of {rank}, while the features of {title(source)} are the last"
        return f"{operation(source)}, {title(source)}, comes between it and the {kind}"
    if is_call(node, aten.add.Tensor):
        why = why_no_residual(node, source)
        if why:
            return why
        if match.add is not None:
            return f"the kernel of {title(match.core)} adds {title(match.residual)} already"
    if match.activated is not None:
        return f"follows an activation, {title(match.activated)}"
    return f"{match.operator} has no epilogue for it"
