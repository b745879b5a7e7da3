"""The stopwatches: how often they call, in which order, and what a sample is divided by."""

from __future__ import annotations

import pytest
import torch

from bench import timing
from bench.timing import EagerStopwatch, GraphStopwatch, WallStopwatch, stopwatches, target_seconds

#: Of one call of the made-up candidates, in seconds.
CALL = 20e-6


class FakeClock:
    """Advances by ``CALL`` with each call."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[int] = []

    def candidate(self, sets: int, seconds: float = CALL):
        def call(index: int):
            self.calls.append(index)
            self.now += seconds
            return index

        return [lambda index=index: call(index) for index in range(sets)]


@pytest.fixture
def clock(monkeypatch) -> FakeClock:
    made = FakeClock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: made.now)
    return made


@pytest.mark.parametrize("sets, target, passes", [(1, 2e-3, 100), (4, 2e-3, 25), (4, 1e-6, 1), (1, 30e-6, 2)])
def test_a_wall_sample_is_as_long_as_the_target(clock, sets, target, passes):
    watch = WallStopwatch(clock.candidate(sets), target)
    assert clock.calls == list(range(sets))  # one pass to calibrate
    clock.calls.clear()
    watch.start()
    assert clock.calls == list(range(sets)) * passes
    assert watch.stop() == pytest.approx(CALL)


def test_calls_of_no_time_end(clock):
    watch = WallStopwatch(clock.candidate(1, 0.0), 1e-6)
    watch.start()
    assert watch.stop() == 0.0 and len(clock.calls) == 1 + 1000


class FakeCuda:
    """What the stopwatches use of torch.cuda, on a device that takes ``CALL`` a call and does it when told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.stream, self.capturing = "default", None
        self.fail_in_capture: Exception | None = None

    def call(self, name: str = "call") -> object:
        if self.capturing is not None:
            if self.fail_in_capture:
                raise self.fail_in_capture
            self.capturing.append(name)
        else:
            self.now += CALL
        self.log.append(f"{name} on {self.stream}{' captured' if self.capturing is not None else ''}")
        return object()

    def install(self, monkeypatch) -> FakeCuda:
        cuda = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing  # elapsed_time raises otherwise
                self.at = None

            def record(self):
                assert cuda.capturing is None
                self.at = cuda.now
                cuda.log.append("record")

            def synchronize(self):
                cuda.log.append("wait")

            def elapsed_time(self, end):
                assert "wait" in cuda.log
                return (end.at - self.at) * 1e3  # milliseconds

        class Stream:
            def __init__(self, name="side"):
                self.name = name

            def wait_stream(self, other):
                cuda.log.append(f"{self.name} waits for {other.name}")

        class Graph:
            def __init__(self):
                self.nodes = []

            def replay(self):
                cuda.now += CALL * len(self.nodes)
                cuda.log.append(f"replay {len(self.nodes)}")

        class Restoring:
            def __init__(self, to):
                self.to = to

            def __enter__(self):
                self.before, cuda.stream = cuda.stream, self.to.name

            def __exit__(self, *error):
                cuda.stream = self.before

        class Capture:
            """torch.cuda.graph: where ending the capture raises, its stream stays the current one."""

            def __init__(self, graph):
                self.graph = graph

            def __enter__(self):
                self.before, cuda.stream, cuda.capturing = cuda.stream, "capture", self.graph.nodes

            def __exit__(self, kind, error, trace):
                cuda.capturing = None
                if error is not None:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
                cuda.stream = self.before

        fakes = {
            "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "stream": Restoring, "graph": Capture,
            "current_stream": lambda: Stream(cuda.stream), "synchronize": lambda: cuda.log.append("synchronize"),
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        return self


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    return FakeCuda().install(monkeypatch)


def test_calls_from_python_begin_on_an_idle_device(cuda):
    watch = EagerStopwatch([cuda.call, cuda.call], 10 * CALL)
    cuda.log.clear()
    watch.start()
    assert cuda.log == ["synchronize", "record", *["call on default"] * 10, "record"]
    assert watch.stop() == pytest.approx(CALL)
    assert cuda.log[-1] == "wait"


def test_the_first_call_from_python_does_not_decide_how_many_make_a_sample(cuda):
    """It may compile, or capture a CUDA graph: a hundred times as long here."""
    slow = iter([True])

    def call():
        for _ in range(100 if next(slow, False) else 1):
            cuda.call()

    watch = EagerStopwatch([call], 10 * CALL)
    cuda.log.clear()
    watch.start()
    assert cuda.log.count("call on default") == 10


def test_a_graph_is_warmed_up_captured_and_captured_again_for_the_target(cuda):
    watch = GraphStopwatch([cuda.call] * 3, 12 * CALL)
    warm_up = ["side waits for default", "call on side", "call on side", "default waits for side"]
    replay = ["record", "replay 3", "record", "wait"]
    captured = ["call on capture captured"] * 3
    longer = ["record", "replay 12", "record", "wait"]
    assert cuda.log == [*warm_up, *captured, *replay, *replay, *warm_up, *captured * 4, *longer]
    watch.start()
    assert watch.stop() == pytest.approx(CALL)
    assert cuda.log[-4:] == longer and cuda.stream == "default"


def test_a_call_that_fills_the_target_is_captured_once(cuda):
    GraphStopwatch([cuda.call], CALL)
    assert sum("captured" in line for line in cuda.log) == 1


def test_a_graph_has_no_more_than_so_many_calls(cuda):
    watch = GraphStopwatch([cuda.call] * 300, 1.0)
    assert cuda.log.count("replay 1800") == 1  # six passes of 300, not seven
    watch.start()
    assert watch.stop() == pytest.approx(CALL)


def test_outputs_are_held_through_a_pass_and_dropped_after_it(cuda):
    """So that every call of a pass writes memory of its own."""
    alive, most = set(), 0

    class Output:
        def __init__(self):
            nonlocal most
            alive.add(id(self))
            most = max(most, len(alive))

        def __del__(self):
            alive.discard(id(self))

    def call():
        cuda.call()
        return Output()

    GraphStopwatch([call] * 5, 20 * CALL)
    assert most == 5 and not alive


def test_a_capture_that_fails_says_why_and_leaves_the_stream(cuda):
    cuda.fail_in_capture = ValueError("this operation waits for the device")
    with pytest.raises(ValueError, match="waits for the device"):
        GraphStopwatch([cuda.call], CALL)
    assert cuda.stream == "default"


def test_the_ways_of_timing():
    assert [way.way for way in stopwatches(torch.device("cuda"))] == ["graph", "eager"]
    assert [way.way for way in stopwatches(torch.device("cpu"))] == ["wall"]
    assert target_seconds(torch.device("cuda")) == 1e-3
