"""A graph as SVG, its groups in colours, which the CSS of the surrounding page defines."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from gpukern.fusion.report import formatting
from gpukern.fusion.report.graph_layout import Edge, Layout, Way, layout
from gpukern.fusion.report.values import FusedGroup, GraphNode

#: Groups take turns: as many colours as CSS classes c0, c1, …
COLOURS = 10

#: In pixels: a node, the space between nodes, the distance of lanes, the rim.
_WIDTH, _HEIGHT, _ACROSS, _DOWN, _LANE, _RIM = 190, 22, 22, 16, 11, 8
#: Letters that fit into a node.
_LETTERS = 28
_ROUND = 7

Point = tuple[float, float]


def picture(nodes: Sequence[GraphNode], groups: Sequence[FusedGroup], title: str, prefix: str) -> str:
    """``<svg>`` of a graph: nodes in rows from the input on, those of ``groups`` numbered and coloured, as links.

    A node's tooltip has the module paths. The first node of group n, counted from one, has the id ``prefix`` + n.
    """
    placed = layout(nodes)
    edges = [_edge(edge, placed) for edge in placed.edges]
    seen: set[int] = set()
    boxes = [_node(node, groups, placed.places[node.name], prefix, seen) for node in nodes]
    width, height = _size(placed)
    return (
        f'<svg role="img" aria-label="{escape(formatting.clean(title))}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">{"".join(edges)}{"".join(boxes)}</svg>'
    )


def _size(placed: Layout) -> tuple[int, int]:
    right = [_left(column) + _WIDTH for _, column in placed.places.values()]
    right += [_lane(edge) for edge in placed.edges if edge.way is Way.LANE]
    return max(right, default=0) + _RIM, 2 * _RIM + placed.rows * (_HEIGHT + _DOWN) - _DOWN


def _left(column: int) -> int:
    return _RIM + column * (_WIDTH + _ACROSS)


def _top(row: int) -> int:
    return _RIM + row * (_HEIGHT + _DOWN)


def _lane(edge: Edge) -> int:
    return _left(edge.columns) - _ACROSS + (edge.lane + 1) * _LANE


# ---- nodes ---------------------------------------------------------------------------------------------------------


def _node(
    node: GraphNode,
    groups: Sequence[FusedGroup],
    place: tuple[int, int],
    prefix: str,
    seen: set[int],
) -> str:
    x, y = _left(place[1]), _top(place[0])
    label = formatting.clean(node.label) or formatting.clean(node.name)
    if node.group is None or not 0 <= node.group < len(groups):
        return f"<g>{_box(x, y, label, [label, formatting.clean(node.name)])}</g>"
    group, number = groups[node.group], node.group + 1
    shown = label.replace("batch_norm +", "bn +").replace("+ batch_norm", "+ bn")  # there is little room
    tips = [
        f"{number}. {formatting.clean(group.pattern)}",
        formatting.clean(group.operator),
        *map(formatting.clean, group.modules),
    ]
    anchor = "" if number in seen else f' id="{prefix}{number}"'
    seen.add(number)
    return (
        f'<a href="#g{number}" class="c{node.group % COLOURS}" data-group="{number}"{anchor}>'
        f"{_box(x, y, f'{number} {shown}', tips)}</a>"
    )


def _box(x: int, y: int, label: str, tips: list[str]) -> str:
    shown = label if len(label) <= _LETTERS else label[: _LETTERS - 1] + "…"
    tip = escape("\n".join(dict.fromkeys(tips)))
    return (
        f'<title>{tip}</title><rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="5"/>'
        f'<text x="{x + 9}" y="{y + 15}">{escape(shown)}</text>'
    )


# ---- edges ---------------------------------------------------------------------------------------------------------


def _edge(edge: Edge, placed: Layout) -> str:
    if edge.way is Way.LANE:
        return f'<path class="skip" d="{_rounded(_through_lane(edge, placed))}"/>'
    start, end = placed.places[edge.source], placed.places[edge.target]
    kind = ' class="skip"' if end[0] - start[0] > 1 else ""
    return f'<path{kind} d="{_through_column(start, end, edge.way)}"/>'


def _through_column(start: tuple[int, int], end: tuple[int, int], way: Way) -> str:
    """Straight down, but for the one space between rows in which it changes the column."""
    x, y = _left(start[1]) + _WIDTH // 2, _top(start[0]) + _HEIGHT
    to_x, to_y = _left(end[1]) + _WIDTH // 2, _top(end[0])
    if x == to_x:
        return f"M{x} {y}V{to_y}"
    bend = to_y - _DOWN if way is Way.SOURCE_COLUMN else y
    middle = bend + _DOWN // 2
    return f"M{x} {y}V{bend}C{x} {middle + 4} {to_x} {middle - 4} {to_x} {bend + _DOWN}V{to_y}"


def _through_lane(edge: Edge, placed: Layout) -> list[Point]:
    start, end = placed.places[edge.source], placed.places[edge.target]
    x = _lane(edge)
    # To and from the lane in the line of the node where none stands in the way, else in the space between the rows; in
    # above the middle and out below it, so that one edge does not look like the next one's beginning.
    out: list[Point] = [(_left(start[1]) + _WIDTH, _top(start[0]) + _HEIGHT * 2 / 3)]
    if not _is_last(start, placed):
        middle = _left(start[1]) + _WIDTH / 2
        out = [(middle, _top(start[0]) + _HEIGHT), (middle, _top(start[0]) + _HEIGHT + _DOWN / 2)]
    back: list[Point] = [(_left(end[1]) + _WIDTH, _top(end[0]) + _HEIGHT / 3)]
    if not _is_last(end, placed):
        middle = _left(end[1]) + _WIDTH / 2
        back = [(middle, _top(end[0]) - _DOWN / 2), (middle, _top(end[0]))]
    return [*out, (x, out[-1][1]), (x, back[0][1]), *back]


def _is_last(place: tuple[int, int], placed: Layout) -> bool:
    return not any(row == place[0] and column > place[1] for row, column in placed.places.values())


def _rounded(points: list[Point]) -> str:
    """A path along ``points``, horizontal and vertical in turn, around its corners."""
    parts = [f"M{_pair(points[0])}"]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        parts.append(f"L{_pair(_near(corner, before))}Q{_pair(corner)} {_pair(_near(corner, after))}")
    return "".join([*parts, f"L{_pair(points[-1])}"])


def _near(corner: Point, other: Point) -> Point:
    """Return a point between ``corner`` and ``other``, never past the middle."""
    distance = abs(other[0] - corner[0]) + abs(other[1] - corner[1])
    share = min(_ROUND / distance, 0.5) if distance else 0
    return corner[0] + (other[0] - corner[0]) * share, corner[1] + (other[1] - corner[1]) * share


def _pair(point: Point) -> str:
    return f"{point[0]:.5g} {point[1]:.6g}"
