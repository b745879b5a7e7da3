"""Where nodes and edges go, and the SVG of them."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest

from gpukern.fusion.report import GraphNode
from gpukern.fusion.report.graph_layout import Way, layout
from gpukern.fusion.report.svg import COLOURS, picture
from models.resnet import resnet50
from tests.fusion.made_up import group, of_network, report


def graph(**inputs: str) -> list[GraphNode]:
    return [GraphNode(name, name, None, tuple(sources.split())) for name, sources in inputs.items()]


def drawn(nodes, groups=()) -> ElementTree.Element:
    return ElementTree.fromstring(picture(nodes, groups, "a graph", "b"))


def test_a_chain_is_one_column():
    placed = layout(graph(x="", conv="x", bn="conv", relu="bn"))
    assert list(placed.places.values()) == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert {edge.way for edge in placed.edges} == {Way.SOURCE_COLUMN}


def test_a_skip_connection_goes_in_a_lane_and_a_branch_in_a_column():
    placed = layout(graph(x="", conv="x", bn="conv", add="bn x", down="add", a="add", b="a", sum="b down"))
    ways = {(edge.source, edge.target): edge.way for edge in placed.edges}
    assert ways["x", "add"] is Way.LANE and placed.places["add"] == (3, 0)
    # The longer branch goes straight on, the shorter one beside it, whatever came first.
    assert placed.places["a"] == (4, 0) and placed.places["down"] == (4, 1)
    assert ways["down", "sum"] is Way.SOURCE_COLUMN


def test_lanes_do_not_overlap_and_the_short_ones_are_inside():
    names = ["x", *(f"n{number}" for number in range(8))]
    inputs = {name: before for before, name in itertools.pairwise(names)}
    nodes = graph(**{"x": "", **inputs, "n7": "n6 n0 x", "n5": "n4 n2"})
    lanes = {(edge.source, edge.target): edge.lane for edge in layout(nodes).edges if edge.way is Way.LANE}
    assert lanes == {("n2", "n5"): 0, ("n0", "n7"): 1, ("x", "n7"): 2}


def test_long_edges_of_one_node_share_a_lane():
    placed = layout(graph(x="", a="x", b="a x", c="b x", d="c x"))
    assert {edge.lane for edge in placed.edges if edge.way is Way.LANE} == {0}


def test_a_node_without_inputs_stands_above_its_user():
    placed = layout(graph(x="", a="x", b="a", scale="", c="b scale"))
    assert placed.places["scale"] == (2, 1) and placed.rows == 4


def test_inputs_that_do_not_come_before_are_left_out():
    placed = layout(graph(a="b a nowhere", b="a"))
    assert [(edge.source, edge.target) for edge in placed.edges] == [("a", "b")]
    assert layout([]).rows == 0 and drawn([]).tag == "svg"


@pytest.fixture(scope="module")
def resnet():
    return of_network(resnet50())


def test_no_two_nodes_are_at_one_place_and_edges_go_down(resnet):
    for nodes in (resnet.graph_before, resnet.graph_after):
        placed = layout(nodes)
        assert len(set(placed.places.values())) == len(nodes)
        assert all(placed.places[edge.source][0] < placed.places[edge.target][0] for edge in placed.edges)
        assert len(placed.edges) == sum(len(set(node.inputs)) for node in nodes)
        # 16 blocks: 12 skip connections, 4 with a convolution beside the others.
        assert sum(edge.way is Way.LANE for edge in placed.edges) == 12


def test_every_node_is_drawn_inside_with_its_group(resnet):
    nodes = resnet.graph_before
    svg = drawn(nodes, resnet.fused)
    width, height = float(svg.get("width")), float(svg.get("height"))
    boxes = [{name: float(rect.get(name)) for name in ("x", "y", "width", "height")} for rect in svg.iter("rect")]
    assert len(boxes) == len(nodes)
    assert all(box["x"] > 0 and box["x"] + box["width"] < width for box in boxes)
    assert all(box["y"] > 0 and box["y"] + box["height"] < height for box in boxes)
    for path in svg.iter("path"):
        numbers = [float(number) for number in re.findall(r"[\d.]+", path.get("d"))]
        assert max(numbers) < height
    links = list(svg.iter("a"))
    assert len(links) == sum(node.group is not None for node in nodes)
    assert [link.get("id") for link in links if link.get("id")] == [f"b{n + 1}" for n in range(len(resnet.fused))]
    # Both pictures give a group its colour.
    colours = [
        {a.get("data-group"): a.get("class") for a in drawn(each, resnet.fused).iter("a")}
        for each in (nodes, resnet.graph_after)
    ]
    assert colours[0] == colours[1] and len(set(colours[0].values())) == COLOURS


def test_tooltips_have_module_paths_and_text_is_escaped():
    hostile = '</title><script>alert("x")</script>\x1b'
    nodes = [GraphNode(hostile, hostile, 0, ()), GraphNode("b", hostile, None, (hostile,))]
    text = picture(nodes, [group(hostile, "layer1.bn", pattern=hostile)], hostile, "b")
    assert "<script>" not in text and "\x1b" not in text
    tips = [title.text for title in ElementTree.fromstring(text).iter("title")]
    assert "layer1.bn" in tips[0] and "<script>" in tips[0]


def test_a_group_that_is_not_there_is_no_group():
    made = report()
    assert not list(drawn([GraphNode("a", "a", 99, ())], made.fused).iter("a"))


def test_long_labels_are_cut():
    svg = drawn([GraphNode("a", "convolution" * 9, None, ())])
    (label,) = [text.text for text in svg.iter("text")]
    assert len(label) < 30 and label.endswith("…") and "convolution" * 9 in next(svg.iter("title")).text
