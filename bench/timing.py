"""Timing of calls: on a GPU by CUDA events around graph replays, on a CPU by the wall clock.

A stopwatch is made once from the calls of one candidate, one call for each set of tensors, and then takes a sample when
asked to: candidates take turns, round by round. A sample runs all calls as often as fills ``target`` seconds, so that
the cost of starting it does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Calls = Sequence[Callable[[], Any]]

#: Nodes of one CUDA graph; capturing more takes longer than it teaches.
_MAX_GRAPH_CALLS = 2000


class Stopwatch(Protocol):
    #: Key of :attr:`bench.results.Candidate.samples`.
    way: str

    def __init__(self, calls: Calls, target: float) -> None:
        """``target``: seconds of a sample."""

    def start(self) -> None:
        """Begin a sample."""

    def stop(self) -> float:
        """End it: seconds a call."""


class WallStopwatch:
    """A stopwatch for the CPU, where a call is over when it returns."""

    way = "wall"

    def __init__(self, calls: Calls, target: float) -> None:
        self._calls = calls
        seconds = _timed(calls)
        self._passes = max(1, round(target / max(seconds, 1e-9)))
        self._seconds = 0.0

    def start(self) -> None:
        self._seconds = sum(_timed(self._calls) for _ in range(self._passes))

    def stop(self) -> float:
        return self._seconds / (self._passes * len(self._calls))


def _timed(calls: Calls) -> float:
    begin = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - begin


class EagerStopwatch:
    """CUDA events around calls from Python: the device's time, and its waiting for Python where that is slower."""

    way = "eager"

    def __init__(self, calls: Calls, target: float) -> None:
        self._calls = calls
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._passes = 1
        self.start()
        self.stop()  # a function that replays a CUDA graph of its own may capture it at its second call
        self.start()
        self._passes = _passes(self.stop(), len(calls), target)

    def start(self) -> None:
        # While the device still works on the candidate before, Python would get ahead and its gaps would not show.
        torch.cuda.synchronize()
        self._begin.record()
        for _ in range(self._passes):
            for call in self._calls:
                call()
        self._end.record()

    def stop(self) -> float:
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) * 1e-3 / (self._passes * len(self._calls))


class GraphStopwatch:
    """CUDA events around the replay of a graph of the calls: the device's time alone.

    Outputs of one pass over the sets are kept until the pass is over, so that each call writes memory of its own and
    the rotation cools the L2 cache for outputs too.
    """

    way = "graph"

    def __init__(self, calls: Calls, target: float) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._captured = len(calls)
        self._graph = self._capture(calls, 1)
        self.start()
        self.stop()  # the first replay uploads the graph
        self.start()
        passes = _passes(self.stop(), len(calls), target)
        if passes > 1:
            del self._graph  # frees its memory before the longer one takes as much again
            self._captured = passes * len(calls)
            self._graph = self._capture(calls, passes)
            self.start()
            self.stop()

    @staticmethod
    def _capture(calls: Calls, passes: int) -> torch.cuda.CUDAGraph:
        # Lazy initialisation (handles, workspaces, compilation) must happen before the capture, on another stream.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph, failures = torch.cuda.CUDAGraph(), []
        try:
            # The outer context: torch.cuda.graph leaves its own stream current when a capture fails.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                try:
                    for _ in range(passes):
                        outputs = [call() for call in calls]
                        del outputs
                except Exception as problem:
                    failures.append(problem)
                    raise
        except Exception as problem:
            # Ending a failed capture raises again, with less information than the original error.
            raise (*failures, problem)[0] from None
        return graph

    def start(self) -> None:
        self._begin.record()
        self._graph.replay()
        self._end.record()

    def stop(self) -> float:
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) * 1e-3 / self._captured


def _passes(seconds: float, calls: int, target: float) -> int:
    wanted = round(target / max(seconds * calls, 1e-9))
    return max(1, min(wanted, _MAX_GRAPH_CALLS // calls))


def stopwatches(device: torch.device) -> tuple[type[Stopwatch], ...]:
    """The ways of timing on ``device``, the most telling first."""
    return (GraphStopwatch, EagerStopwatch) if device.type == "cuda" else (WallStopwatch,)


def target_seconds(device: torch.device) -> float:
    """Return a sample's target duration: long against the cost of starting it, about 10 µs on a GPU."""
    return 1e-3 if device.type == "cuda" else 2e-3
