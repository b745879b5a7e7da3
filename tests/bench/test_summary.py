"""What is made of the samples, on rows small enough to reckon by hand."""

from __future__ import annotations

import dataclasses

import pytest

from bench.report.summary import BEST, summarize
from bench.results import Ceilings, Row, Use
from tests.bench import made_up
from tests.bench.made_up import case, results, row

TEN = [10.0] * 8
#: Around 10, and never far from it.
UNSURE = [9.0, 11.0] * 4


def only_line(*rows: Row):
    (group,) = summarize(results(rows))
    (line,) = group.lines
    return line


def tally(group, name: str):
    return next(tally for tally in group.tallies if tally.name == name)


def test_a_ratio_is_the_peers_time_over_ours_round_by_round():
    drifting = [10.0, 20.0, 40.0, 80.0, 160.0, 320.0]
    line = only_line(row({"graph": drifting}, {"peer": {"graph": [1.5 * t for t in drifting]}}))
    (peer,) = line.peers
    assert (peer.ratio.low, peer.ratio.median, peer.ratio.high) == (1.5, 1.5, 1.5)
    assert (line.time.median, peer.time.median, peer.outcome) == (60.0, 90.0, "win")


def test_our_own_other_ways_are_no_peers():
    line = only_line(row({"graph": TEN}, {"peer": {"graph": [20.0] * 8}, "gpukern compiled": {"graph": [5.0] * 8}}))
    assert line.best.candidate.name == "peer" and len(line.peers) == 2


@pytest.mark.parametrize(
    "theirs, outcome",
    [
        ([9.9] * 8, "loss"),
        ([9.5] * 7 + [10.5], "tie"),
        (UNSURE, "tie"),
        (TEN, "tie"),
        ([9.5] + [10.5] * 7, "tie"),
        ([10.1] * 8, "win"),
    ],
    ids=["loss", "rather a loss", "unsure", "equal", "rather a win", "win"],
)
def test_a_tie_is_an_interval_that_holds_one(theirs, outcome):
    assert only_line(row({"graph": TEN}, {"peer": {"graph": theirs}})).peers[0].outcome == outcome


@pytest.mark.parametrize(
    "ours, theirs, timing, ratio",
    [
        ({"graph": TEN, "eager": [30.0] * 8}, {"graph": [20.0] * 8, "eager": [40.0] * 8}, "graph", 2.0),
        ({"graph": TEN, "eager": [30.0] * 8}, {"eager": [45.0] * 8}, "eager", 1.5),
        ({"wall": TEN}, {"wall": [30.0] * 8}, "wall", 3.0),
        ({"graph": TEN, "eager": [30.0] * 8}, {"graph": [], "eager": [15.0] * 8}, "eager", 0.5),
    ],
)
def test_both_are_timed_the_same_way(ours, theirs, timing, ratio):
    (peer,) = only_line(row(ours, {"peer": theirs})).peers
    assert (peer.timing, peer.ratio.median) == (timing, ratio)


@pytest.mark.parametrize("theirs", [{"eager": TEN}, {"graph": TEN[:7]}], ids=["other timing", "other rounds"])
def test_without_pairs_there_is_a_time_but_no_ratio(theirs):
    line = only_line(row({"graph": TEN}, {"peer": theirs}))
    assert line.peers[0].time.median == 10 and line.peers[0].ratio is None
    assert line.best is None and line.peers[0].outcome is None


def test_the_best_peer_is_the_fastest_that_is_ok():
    line = only_line(row(10.0, {"slow": 30.0, "wrong": "wrong", "fast": 11.0, "failed": "failed"}))
    assert line.best.candidate.name == "fast"


@pytest.mark.parametrize(
    "flops, moved, floor, bound, share",
    [(1e9, 1e6, 10.0, "compute", 0.5), (1e6, 5e6, 5.0, "memory", 0.25), (0.0, 5e6, 5.0, "memory", 0.25)],
)
def test_the_limit_is_the_larger_of_two_floors(flops, moved, floor, bound, share):
    line = only_line(row({"graph": [20.0] * 8}, flops=flops, bytes_=moved))
    assert (line.floor_us, line.bound, line.share) == (pytest.approx(floor), bound, pytest.approx(share))
    assert line.flops_rate == (pytest.approx(flops / 20e-6) if flops else None)
    assert line.bandwidth == pytest.approx(moved / 20e-6)


def test_without_a_measured_rate_there_is_no_limit():
    made = row(10.0, dtype="float32")
    found = results([made])
    (group,) = summarize(type(found)(found.environment, Ceilings(1e12, {"float16": 1e14}), {}, found.rows))
    assert (group.lines[0].floor_us, group.lines[0].bound, group.lines[0].share) == (None, None, None)


def test_groups_are_by_what_can_be_compared():
    apart = [
        {"suite": "pool"},
        {"computation": "weight gradient"},
        {"dtype": "float32"},
        {"layout": "NCHW"},
        {"batch": 1},
    ]
    rows = [row(10.0, {"peer": 20.0}, problem="a"), row(10.0, {"peer": 20.0}, problem="b")]
    groups = summarize(results([*rows, *(row(10.0, {"peer": 20.0}, **change) for change in apart)]))
    assert sorted(len(group.lines) for group in groups) == [1, 1, 1, 1, 1, 2]


def test_losers_first_and_what_is_not_ok_before_them():
    def ratio(value: float | str, name: str):
        theirs = {"graph": [10 * value] * 8} if isinstance(value, float) else value
        return row({"graph": TEN}, {"peer": theirs}, problem=name)

    rows = [
        ratio(2.0, "2"),
        ratio("failed", "alone"),
        ratio(0.5, "0.5"),
        row("wrong", {"peer": 5.0}, problem="bad"),
        ratio(1.0, "1"),
    ]
    (group,) = summarize(results(rows))
    assert [line.row.case.problem for line in group.lines] == ["bad", "0.5", "1", "2", "alone"]
    assert (group.ok, group.broken) == (4, 1)


def test_the_worst_group_first():
    slow, fast = (row({"graph": TEN}, {"peer": {"graph": [t] * 8}}, batch=int(t)) for t in (5.0, 20.0))
    assert [group.key.batch for group in summarize(results([fast, slow]))] == [5, 20]


def test_means_are_geometric_and_count_only_what_is_ok():
    rows = [
        row({"graph": TEN}, {"a": {"graph": [5.0] * 8}, "b": {"graph": [20.0] * 8}}, problem="1"),
        row({"graph": TEN}, {"a": {"graph": [80.0] * 8}, "b": "failed"}, problem="2"),
        row("wrong", {"a": 1.0, "b": 1.0}, problem="3"),
    ]  # fmt: skip
    (group,) = summarize(results(rows))
    assert [t.name for t in group.tallies] == [BEST, "a", "b"]
    a, b, best = tally(group, "a"), tally(group, "b"), tally(group, BEST)
    assert (a.mean, a.wins, a.losses, a.ties, a.absent) == (pytest.approx(2.0), 1, 1, 0, 0)
    assert (b.mean, b.wins, b.losses, b.ties, b.absent) == (pytest.approx(2.0), 1, 0, 0, 1)
    assert (best.mean, best.rows, best.absent) == (pytest.approx(2.0), 2, 0)


def test_totals_count_each_layer_of_a_network_as_often_as_it_is_there():
    def layer(name, count, ours, theirs):
        uses = (Use("net", name, count), Use("other", name, 1))
        peers = {"peer": {"graph": [theirs] * 8} if theirs else "failed"}
        return row({"graph": [ours] * 8}, peers, of=case(name, uses=uses))

    (group,) = summarize(results([layer("a", 3, 10.0, 20.0), layer("b", 2, 5.0, 1.0), layer("c", 4, 100.0, None)]))
    net = group.totals_of("net")["peer"]
    assert (net.layers, net.covered, net.ours_us, net.peer_us) == (9, 5, 40.0, 62.0)
    assert group.totals_of("other")["peer"].ours_us == 15.0 and group.networks == ["net", "other"]


def test_problems_are_told_once_with_their_rows():
    rows = [row(10.0, {"gone": "missing", "odd": "wrong"}, problem=str(i)) for i in range(3)]
    rows.append(row("wrong", problem="3"))
    noted = dataclasses.replace(rows[0].candidates[0], message="but slowly")
    rows[0] = dataclasses.replace(rows[0], candidates=(noted, *rows[0].candidates[1:]))
    (group,) = summarize(results(rows))
    ours = {problem.status: problem for problem in group.problems if problem.name == "gpukern"}
    assert ours["wrong"].ours and not ours["note"].ours and ours["note"].reason == "but slowly"
    found = {problem.name: problem for problem in group.problems}
    assert found["gone"].status == "missing" and len(found["gone"].cases) == 3
    assert found["odd"].reason == "error 2.5e-01, bound 1.0e-03"


def test_ok_without_samples_is_not_taken_for_a_time():
    (group,) = summarize(results([row({"graph": []}, {"peer": 10.0})]))
    assert group.broken == 1 and group.problems[0].status == "not timed"


def test_nothing_to_sum_up():
    assert summarize(results([])) == []
    (group,) = summarize(results([row("failed"), row(10.0, problem="b")]))
    assert (group.tallies[0].mean, group.totals, group.timing) == (None, (), "graph")


def test_the_made_up_run_has_everything():
    groups = summarize(made_up.run())
    assert len({group.key.suite for group in groups}) == 3
    assert {problem.status for group in groups for problem in group.problems} == {"wrong", "failed", "missing", "note"}
    outcomes = {line.best.outcome for group in groups for line in group.lines if line.best}
    assert outcomes == {"win", "loss", "tie"}


def test_times_of_layers_add_up_and_those_of_steps_do_not():
    uses = (made_up.Use("resnet50", "plain", 1),)
    layer = made_up.row(10.0, {"peer": 20.0}, uses=uses)
    step = made_up.row(10.0, {"peer": 20.0}, uses=uses, suite="optimizer", sizes={"parameters": 9})
    totals = {group.key.suite: len(group.totals) for group in summarize(made_up.results([layer, step]))}
    assert totals == {"conv": 1, "optimizer": 0}
