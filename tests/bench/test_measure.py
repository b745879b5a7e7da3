"""One row: whatever a candidate does, it is shown as that, and the others are measured."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bench import measure as module
from bench.measure import DeviceLost, Method, measure
from bench.results import Row
from bench.timing import WallStopwatch
from tests.bench.tiny import CPU, QUICK, Products, candidate, product, task


def run(*implementations, method: Method = QUICK, device: torch.device = CPU, **others) -> Row:
    return measure(Products(*implementations, **others), task(), method, device)


def status(row: Row) -> dict[str, tuple[str, str]]:
    return {each.name: (each.status, each.message) for each in row.candidates}


def raising(problem: BaseException, after: int = 0):
    """Right for ``after`` calls, then it raises."""
    calls = itertools.count()

    def function(x, w):
        if next(calls) >= after:
            raise problem
        return product(x, w)

    return function


class FakeStopwatch:
    """Logs who is started and stopped; a sample of n-th candidate's m-th round is 1000·n + m µs."""

    way = "fake"
    log: list[tuple[str, int]]

    def __init__(self, calls, target):
        self.number, self.rounds = len({n for _, n in self.log}), itertools.count()
        self.log.append(("make", self.number))

    def start(self):
        self.log.append(("start", self.number))

    def stop(self):
        self.log.append(("stop", self.number))
        return (1000 * self.number + next(self.rounds)) * 1e-6


@pytest.fixture
def watched(monkeypatch) -> list[tuple[str, int]]:
    FakeStopwatch.log = []
    monkeypatch.setattr(module, "stopwatches", lambda device: (FakeStopwatch,))
    return FakeStopwatch.log


# ---- what candidates do --------------------------------------------------------------------------------------------


def test_right_candidates_are_timed():
    row = run()
    assert status(row) == {"gpukern": ("ok", ""), "torch": ("ok", "")}
    assert row.bound == Products().bound(task()) and row.sets == 1
    assert row.flops == 2 * 4 * 9 and row.kind == "float32" and row.footprint == row.bytes
    for each in row.candidates:
        assert set(each.samples) == {"wall"} and 0 <= each.error < row.bound
        assert all(sample > 0 for sample in each.samples["wall"])


def shifted(x, w):
    return product(x, w).roll(1, 0)


WRONG = {
    "raises": (lambda: raising(ValueError("no\nsecond line")), "failed", "ValueError: no"),
    "raises without words": (lambda: raising(NotImplementedError()), "failed", "NotImplementedError"),
    "wrong values": (lambda: shifted, "wrong", "error "),
    "NaN": (lambda: lambda x, w: product(x, w) * math.nan, "wrong", "not finite, or of another shape"),
    "one infinity": (
        lambda: lambda x, w: product(x, w).index_fill(0, torch.tensor(0), math.inf),
        "wrong",
        "not finite",
    ),
    "another shape": (lambda: lambda x, w: product(x, w)[None], "wrong", "not finite, or of another shape"),
    "nothing": (lambda: lambda x, w: None, "failed", "AttributeError"),
    "out of memory": (
        lambda: raising(torch.OutOfMemoryError("CUDA out of memory. Tried")),
        "failed",
        "OutOfMemoryError: CUDA",
    ),
    "the first time timed": (
        lambda: raising(RuntimeError("later"), after=1),
        "failed",
        "no wall timing: RuntimeError: later",
    ),
    "while timed": (lambda: raising(RuntimeError("last"), after=40), "failed", "no wall timing: RuntimeError: last"),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("what", WRONG)
def test_one_that_goes_wrong_is_shown_as_that_and_the_others_are_timed(what, place, monkeypatch):
    # Few and equally many calls a sample, so that the one that fails at the fortieth does so while it is timed.
    monkeypatch.setattr(module, "target_seconds", lambda device: 0.0)
    make, expected, message = WRONG[what]
    function = make()
    good = [candidate("first", product), candidate("second", product)]
    row = run(*good[:place], candidate("bad", function), *good[place:], method=Method(("library",), 0.0, 50, 50))
    found = status(row)
    assert list(found) == [*["first", "second"][:place], "bad", *["first", "second"][place:]]
    assert found["bad"][0] == expected and found["bad"][1].startswith(message) and "\n" not in found["bad"][1]
    assert found["first"] == found["second"] == ("ok", "")
    for each in row.candidates:
        assert len(each.samples.get("wall", [])) == (0 if each.name == "bad" else 50)
    (bad,) = (each for each in row.candidates if each.name == "bad")
    if what == "wrong values":
        assert bad.error > row.bound and bad.message == f"error {bad.error:.2g}, more than {row.bound:.2g}"
    elif expected == "wrong":
        assert bad.error is None  # JSON has no infinity


def test_a_missing_one_is_shown_and_never_called():
    row = run(candidate("gpukern", product), candidate("other", raising(AssertionError()), missing="not installed"))
    assert status(row)["other"] == ("missing", "not installed")


def test_one_whose_preparation_raises_has_failed():
    def prepare(tensors):
        raise RuntimeError("no such layout")

    row = run(candidate("gpukern", product), candidate("other", product, prepare=prepare))
    assert status(row) == {"gpukern": ("ok", ""), "other": ("failed", "RuntimeError: no such layout")}


def test_preparation_is_not_timed_and_happens_once(watched):
    prepared = []

    def prepare(tensors):
        prepared.append(tensors)
        return tensors

    run(candidate("gpukern", product, prepare=prepare))
    assert len(prepared) == 1


def test_cudnn_is_at_its_best_and_no_judge():
    cudnn, seen = torch.backends.cudnn, []

    class Recording(Products):
        def reference(self, task, tensors):
            seen.append(cudnn.enabled)
            return super().reference(task, tensors)

    def recorded(x, w):
        seen.append((cudnn.enabled, cudnn.benchmark, cudnn.deterministic))
        return product(x, w)

    measure(Recording(candidate("gpukern", recorded)), task(), QUICK, CPU)
    assert seen[0] is False and set(seen[1:]) == {(True, True, False)}
    assert cudnn.enabled


def test_without_a_reference_nobody_is_right():
    class Large(Products):
        def reference(self, task, tensors):
            raise torch.OutOfMemoryError("too large")

    given = candidate("gpukern", product), candidate("torch", product), candidate("other", product, missing="not here")
    found = status(measure(Large(*given), task(), QUICK, CPU))
    why = "no reference to check against: OutOfMemoryError: too large"
    assert found == {"gpukern": ("failed", why), "torch": ("failed", why), "other": ("missing", "not here")}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_nobody_s_failure(stop):
    with pytest.raises(stop):
        run(candidate("gpukern", product), candidate("torch", raising(stop())))


# ---- candidates and each other's memory ----------------------------------------------------------------------------


def test_one_that_changes_its_operands_is_wrong_and_spoils_nobody_else():
    def in_place(x, w):
        result = product(x, w)
        x.zero_()
        return result

    def negates_in_place(x, w):  # which no norm would show
        result = product(x, w)
        w.neg_()
        return result

    row = run(candidate("a", in_place), candidate("b", negates_in_place), candidate("c", product))
    assert status(row) == {
        "a": ("wrong", "changes its operands"), "b": ("wrong", "changes its operands"), "c": ("ok", "")
    }  # fmt: skip


def test_one_that_raises_after_it_changed_its_operands_spoils_nobody_else():
    def half_way(x, w):
        x.zero_()
        raise RuntimeError("half way")

    assert status(run(candidate("a", half_way), candidate("b", product)))["b"] == ("ok", "")


def test_one_that_writes_nothing_is_not_saved_by_the_memory_of_the_one_before():
    memory = []

    def right(x, w):
        memory.append(product(x, w))
        return memory[-1]

    row = run(candidate("a", right), candidate("b", lambda x, w: memory[0]))
    assert status(row) == {"a": ("ok", ""), "b": ("wrong", "not finite, or of another shape")}


def test_results_that_are_views_of_one_element_are_checked_too():
    row = run(candidate("a", lambda x, w: torch.zeros(()).expand(4, 3)), candidate("b", product))
    assert status(row)["a"][1].startswith("error 1,") and status(row)["b"] == ("ok", "")


# ---- rounds --------------------------------------------------------------------------------------------------------


def test_candidates_take_turns_in_an_order_that_changes(watched):
    method = Method(("library",), seconds=0.0, least_rounds=20, most_rounds=30)
    row = run(*(candidate(str(i), product) for i in range(3)), method=method)
    assert watched[:3] == [("make", 0), ("make", 1), ("make", 2)]
    rounds = [watched[i : i + 6] for i in range(3, len(watched), 6)]
    assert len(rounds) == 21  # with the warm-up
    orders = []
    for each in rounds:
        order = [number for act, number in each if act == "start"]
        # All start before any is read, and are read in the same order.
        assert each == [("start", n) for n in order] + [("stop", n) for n in order]
        assert sorted(order) == [0, 1, 2]
        orders.append(tuple(order))
    assert len(set(orders)) > 3
    # The warm-up round is thrown away; the same index is the same round.
    for number, each in enumerate(row.candidates):
        assert each.samples == {"fake": [1000.0 * number + m for m in range(1, 21)]}


@pytest.mark.parametrize(
    "seconds, least, most, rounds", [(0.0, 4, 9, 4), (1e9, 4, 9, 9), (2.0, 2, 99, 6), (2.0, 6, 99, 10)]
)
def test_the_number_of_rounds(seconds, least, most, rounds, watched, monkeypatch):
    """Of two candidates, on a clock that goes on by a second when it is read: ``seconds`` is for each."""
    now = itertools.count()
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(now)))
    row = run(method=Method(("library",), seconds=seconds, least_rounds=least, most_rounds=most))
    found = {len(each.samples["fake"]) for each in row.candidates}
    # The clock is read before the first round and then once a round from ``least`` on, until more than 4 s have passed.
    assert found == {rounds}


def test_one_that_drops_out_takes_no_sample_along(watched, monkeypatch):
    class Failing(FakeStopwatch):
        def stop(self):
            seconds = super().stop()
            if self.number == 1 and seconds * 1e6 >= 1002:
                raise RuntimeError("in the third round")
            return seconds

    monkeypatch.setattr(module, "stopwatches", lambda device: (Failing, WallStopwatch))
    row = run(*(candidate(str(i), product) for i in range(3)), method=Method(("library",), 0.0, 6, 6))
    assert [len(c.samples.get("fake", [])) for c in row.candidates] == [6, 0, 6]
    # The other way of timing still works, so it is right and says what is missing.
    assert [len(c.samples["wall"]) for c in row.candidates] == [6, 6, 6]
    assert status(row)["1"] == ("ok", "no fake timing: RuntimeError: in the third round")


# ---- from Python -----------------------------------------------------------------------------------------------------


def in_two_ways(from_python, monkeypatch):
    """One candidate that is called in another way from Python, and one that is not; what was called in each way."""
    called = []

    class Graph(WallStopwatch):
        way = "graph"

        def __init__(self, calls, target):
            called.append((self.way, [call.func for call in calls]))
            super().__init__(calls, target)

    class Eager(Graph):
        way = "eager"

    monkeypatch.setattr(module, "stopwatches", lambda device: (Graph, Eager))
    return run(candidate("gpukern", product, from_python=from_python), candidate("torch", product)), called


def test_calls_from_python_may_be_of_another_function(monkeypatch):
    def replayed(x, w):
        return product(x, w)

    row, called = in_two_ways(replayed, monkeypatch)
    assert called == [("graph", [product]), ("graph", [product]), ("eager", [replayed]), ("eager", [product])]
    assert all(set(each.samples) == {"graph", "eager"} for each in row.candidates)


def test_what_python_calls_is_checked_too(monkeypatch):
    row, called = in_two_ways(shifted, monkeypatch)
    (name, (state, message)), other = status(row).items()
    assert (name, state) == ("gpukern", "wrong") and message.startswith("from Python: error ")
    assert other == ("torch", ("ok", "")) and row.candidates[0].samples == {}
    assert [functions for _, functions in called] == [[product], [product]]


def test_where_that_fails_only_the_calls_from_python_are_missing(monkeypatch):
    row, _ = in_two_ways(raising(RuntimeError("no graph")), monkeypatch)
    assert status(row)["gpukern"] == ("ok", "no eager timing: RuntimeError: no graph")
    assert [set(each.samples) for each in row.candidates] == [{"graph"}, {"graph", "eager"}]


# ---- a device that breaks ------------------------------------------------------------------------------------------


class Device:
    """A made-up one that fails for good once a candidate broke it."""

    type = "cuda"
    broken = False

    def synchronize(self, device) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def breaking(self, after: int = 0):
        calls = itertools.count()

        def function(x, w):
            self.broken = self.broken or next(calls) >= after
            self.synchronize(None)
            return product(x, w)

        return function


class Here(Products):
    """Its tensors are on the CPU whatever the device."""

    def tensors(self, task, device):
        return super().tensors(task, CPU)


@pytest.fixture
def gpu(monkeypatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    monkeypatch.setattr(module, "_sets", lambda *_: 2)
    monkeypatch.setattr(module, "stopwatches", lambda device: (WallStopwatch,))
    return made


@pytest.mark.parametrize("after", [0, 1, 30])
@pytest.mark.parametrize("place", [0, 1])
def test_a_lost_device_ends_the_run_with_a_complete_row(gpu, place, after, monkeypatch):
    monkeypatch.setattr(module, "target_seconds", lambda device: 0.0)
    names = ["a", "b", "c"]
    given = [candidate(name, gpu.breaking(after) if i == place else product) for i, name in enumerate(names)]
    with pytest.raises(DeviceLost, match="the device was lost on tiny/forward") as lost:
        measure(Here(*given), task(), Method(("library",), 0.0, 50, 50), gpu)
    found = status(lost.value.row)
    assert list(found) == names
    assert "illegal memory access" in found[names[place]][1] and found[names[place]][0] == "failed"
    for name in names:
        # None of them is shown as timed: what was measured before the device broke may be anything.
        assert found[name][0] == "failed" and found[name][1], name
    if after == 0:
        assert found["c"] == ("failed", f"not tried: {names[place]} broke the device")


def test_a_failure_that_leaves_the_device_alive_does_not_end_the_run(gpu):
    row = measure(Here(candidate("a", raising(ValueError("no"))), candidate("b", product)), task(), QUICK, gpu)
    assert status(row) == {"a": ("failed", "ValueError: no"), "b": ("ok", "")} and row.sets == 2


@pytest.mark.parametrize(
    "bytes_, cold, suite_is_cold, sets", [(1e6, 3.0, True, 150), (1e9, 3.0, True, 1), (1.0, 3.0, True, 256),
     (1e6, 0.0, True, 1), (1e6, 3.0, False, 1)],
)  # fmt: skip
def test_sets_of_tensors_fill_the_cache_three_times(bytes_, cold, suite_is_cold, sets, monkeypatch):
    properties = type("Properties", (), {"L2_cache_size": 50_000_000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    suite = Products()
    suite.cold = suite_is_cold
    method = Method((), cold=cold)
    assert module._sets(suite, bytes_, method, torch.device("cuda")) == sets
    assert module._sets(suite, bytes_, method, CPU) == 1
