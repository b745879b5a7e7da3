"""Loop detection in disassembled machine code: which instructions repeat, and inside how many other loops.

A backward jump is not always a loop: the slow path of a wait lies after the kernel's end and jumps back into the
middle of the loop it belongs to. So loops are found as compilers find them: a jump from t to h closes one if every path
to t goes through h (h dominates t); its body is everything that reaches t without passing h again.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)$")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"\.L_\w+")


@dataclass(frozen=True)
class Instruction:
    opcode: str  # in full: "HGMMA.64x128x16.F32"
    operands: str
    predicated: bool

    @property
    def name(self) -> str:
        """The opcode's first part."""
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class Body:
    """The instructions of a loop, as indices in the code; ``depth`` is 0 for a loop that lies in no other."""

    indices: tuple[int, ...]
    depth: int

    def within(self, other: Body) -> bool:
        return len(self.indices) < len(other.indices) and set(self.indices) <= set(other.indices)


def parse(code: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of nvdisasm's listing in order, and which of them each label stands before."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(Instruction(found[2], found[3], bool(found[1])))
    return instructions, labels


def loops(instructions: list[Instruction], labels: dict[str, int]) -> list[Body]:
    """Return every loop, in code order. Instructions after its last backward jump, slow paths, are not part of it."""
    blocks, successors = _blocks(instructions, labels)
    reached = _reach(successors, 0, without=-1)
    bodies: dict[int, set[int]] = {}
    for last in sorted(reached):
        for head in successors[last]:
            if head <= last and last not in _reach(successors, 0, without=head):
                bodies.setdefault(head, set()).update(
                    block for block in _body(successors, head, last) if head <= block <= last
                )
    found = [tuple(i for block in sorted(body) for i in blocks[block]) for _, body in sorted(bodies.items())]
    return [Body(body, sum(set(body) < set(other) for other in found)) for body in found]


def shortest_pass(instructions: list[Instruction], labels: dict[str, int], body: Body) -> int:
    """Return the length of the shortest pass through ``body``: every rare case and slow path is left out."""
    blocks, successors = _blocks(instructions, labels)
    inside = {number for number, block in enumerate(blocks) if block.start in set(body.indices)}
    head = min(inside)
    # Dijkstra's algorithm: always take the nearest of the reached blocks.
    waiting, done = [(len(blocks[head]), head)], set()
    while waiting:
        length, block = heapq.heappop(waiting)
        if head in successors[block]:
            return length
        if block not in done:
            done.add(block)
            for follower in inside.intersection(successors[block]):
                heapq.heappush(waiting, (length + len(blocks[follower]), follower))
    raise ValueError("not a loop: nothing in it leads back to where it begins")


def _blocks(instructions: list[Instruction], labels: dict[str, int]) -> tuple[list[range], list[list[int]]]:
    """Basic blocks, entered at the first instruction and left at the last, and the successors of each."""
    starts = {0, *labels.values()}
    starts.update(i + 1 for i, instruction in enumerate(instructions) if _jumps(instruction))
    bounds = [*sorted(start for start in starts if start < len(instructions)), len(instructions)]
    blocks = [range(first, end) for first, end in itertools.pairwise(bounds)]
    number = {block.start: i for i, block in enumerate(blocks)}
    return blocks, [
        [number[start] for start in _next(instructions[block.stop - 1], block.stop, labels) if start in number]
        for block in blocks
    ]


def _jumps(instruction: Instruction) -> bool:
    return instruction.name in ("BRA", "BRX", "JMP", "EXIT", "RET")


def _next(last: Instruction, following: int, labels: dict[str, int]) -> Iterator[int]:
    if _jumps(last):
        # nvdisasm lists the targets of an indirect jump.
        yield from (labels[target] for target in _TARGET.findall(last.operands) if target in labels)
    if not _jumps(last) or last.predicated or _is_conditional(last):
        yield following


def _is_conditional(jump: Instruction) -> bool:
    """Whether a predicate is among the operands: ``BRA.U !UP0, `(.L_x_1)``."""
    return jump.name == "BRA" and re.search(r"\bU?P\d", jump.operands) is not None


def _reach(successors: list[list[int]], first: int, without: int) -> set[int]:
    """Return the blocks reachable from ``first`` on a path that does not pass ``without``."""
    reached: set[int] = set()
    waiting = [first] if first != without else []
    while waiting:
        block = waiting.pop()
        if block not in reached:
            reached.add(block)
            waiting += [follower for follower in successors[block] if follower != without]
    return reached


def _body(successors: list[list[int]], head: int, last: int) -> set[int]:
    """The blocks from which ``last`` can be reached without passing ``head``, both included."""
    body, waiting = {head, last}, [last] if last != head else []
    predecessors: dict[int, list[int]] = {}
    for block, followers in enumerate(successors):
        for follower in followers:
            predecessors.setdefault(follower, []).append(block)
    while waiting:
        for block in predecessors.get(waiting.pop(), []):
            if block not in body:
                body.add(block)
                waiting.append(block)
    return body
