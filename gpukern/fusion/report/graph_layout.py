"""Layout of a graph's nodes and edges in a picture read from top to bottom. Pure Python.

A node's row is the longest path to it, so that every edge goes down. Its column is that of its input where nothing else
took it: a chain is a straight line. An edge over many rows goes down the column of one of its ends where that is free,
and else in a lane beside the columns, which all long edges of one node share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from gpukern.fusion.report.values import GraphNode


class Way(Enum):
    """Route of an edge from its source to its target."""

    SOURCE_COLUMN = "down the source's column, then across"
    TARGET_COLUMN = "across, then down the target's column"
    LANE = "in a lane beside the columns"


@dataclass(frozen=True)
class Edge:
    """``lane`` and ``columns``, how many columns the lane must clear, are those of :attr:`Way.LANE`."""

    source: str
    target: str
    way: Way
    lane: int = 0
    columns: int = 0


@dataclass(frozen=True)
class Layout:
    """(row, column) of each node by its name, and the edges."""

    places: dict[str, tuple[int, int]]
    edges: tuple[Edge, ...]

    @property
    def rows(self) -> int:
        return 1 + max((row for row, _ in self.places.values()), default=-1)


def layout(nodes: Sequence[GraphNode]) -> Layout:
    """Lay out nodes in topological order; inputs that do not come before their users are left out."""
    inputs = _inputs(nodes)
    rows = _rows(inputs)
    columns = _columns(inputs, rows)
    places = {name: (rows[name], columns[name]) for name in inputs}
    return Layout(places, tuple(_edges(inputs, places)))


def _inputs(nodes: Sequence[GraphNode]) -> dict[str, tuple[str, ...]]:
    known: dict[str, tuple[str, ...]] = {}
    for node in nodes:
        known[node.name] = tuple(dict.fromkeys(name for name in node.inputs if name in known and name != node.name))
    return known


def _users(inputs: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
    users: dict[str, list[str]] = {name: [] for name in inputs}
    for name, sources in inputs.items():
        for source in sources:
            users[source].append(name)
    return users


def _rows(inputs: dict[str, tuple[str, ...]]) -> dict[str, int]:
    """The longest path from the top; but a node without inputs stands right above its first user."""
    rows: dict[str, int] = {}
    for name, sources in inputs.items():
        rows[name] = max((rows[source] + 1 for source in sources), default=0)
    for name, users in _users(inputs).items():
        if not inputs[name] and users:
            rows[name] = min(rows[user] for user in users) - 1
    return rows


def _heights(inputs: dict[str, tuple[str, ...]]) -> dict[str, int]:
    """The longest path to the bottom."""
    users = _users(inputs)
    heights: dict[str, int] = {}
    for name in reversed(inputs):
        heights[name] = max((heights[user] + 1 for user in users[name]), default=0)
    return heights


def _columns(inputs: dict[str, tuple[str, ...]], rows: dict[str, int]) -> dict[str, int]:
    """The leftmost column of its inputs, or the nearest free one right of it; what goes on longest chooses first."""
    heights = _heights(inputs)
    by_row: dict[int, list[str]] = defaultdict(list)
    for name in inputs:
        by_row[rows[name]].append(name)
    columns: dict[str, int] = {}
    for row in sorted(by_row):
        taken: set[int] = set()
        for name in sorted(by_row[row], key=lambda name: -heights[name]):
            column = min((columns[source] for source in inputs[name]), default=0)
            while column in taken:
                column += 1
            columns[name] = column
            taken.add(column)
    return columns


def _edges(inputs: dict[str, tuple[str, ...]], places: dict[str, tuple[int, int]]) -> list[Edge]:
    taken = set(places.values())
    edges, long = [], defaultdict(list)
    for target, sources in inputs.items():
        for source in sources:
            way = _way(places[source], places[target], taken)
            if way is Way.LANE:
                long[source].append(target)
            else:
                edges.append(Edge(source, target, way))
    return edges + _in_lanes(long, places)


def _way(start: tuple[int, int], end: tuple[int, int], taken: set[tuple[int, int]]) -> Way:
    for way, column in ((Way.SOURCE_COLUMN, start[1]), (Way.TARGET_COLUMN, end[1])):
        if not any((row, column) in taken for row in range(start[0] + 1, end[0])):
            return way
    return Way.LANE


def _in_lanes(long: dict[str, list[str]], places: dict[str, tuple[int, int]]) -> list[Edge]:
    """Short ones inside, long ones outside, none over another."""
    widths: dict[int, int] = defaultdict(int)
    for row, column in places.values():
        widths[row] = max(widths[row], column + 1)
    lanes: list[list[tuple[int, int]]] = []
    edges = []
    for source, targets in sorted(long.items(), key=lambda item: _reach(item, places)):
        top, bottom = places[source][0], max(places[target][0] for target in targets)
        columns = max(widths[row] for row in range(top, bottom + 1))
        lane = _free_lane(lanes, top, bottom)
        lanes[lane].append((top, bottom))
        edges += [Edge(source, target, Way.LANE, lane, columns) for target in targets]
    return edges


def _reach(item: tuple[str, list[str]], places: dict[str, tuple[int, int]]) -> int:
    source, targets = item
    return max(places[target][0] for target in targets) - places[source][0]


def _free_lane(lanes: list[list[tuple[int, int]]], top: int, bottom: int) -> int:
    """The first in which no edge has a row in common but an end."""
    for number, lane in enumerate(lanes):
        if all(bottom <= other_top or other_bottom <= top for other_top, other_bottom in lane):
            return number
    lanes.append([])
    return len(lanes) - 1
