"""One row: every candidate checked first, then timed in turns."""

from __future__ import annotations

import contextlib
import functools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from bench.accuracy import relative_error
from bench.peers import forget_compiled, torch_at_its_best, without_cudnn
from bench.results import Candidate, Row
from bench.suite import Implementation, Suite, Task, Tensors
from bench.timing import Calls, Stopwatch, stopwatches, target_seconds
from gpukern.tune.measurement import is_lost, reason_of

#: Begins the message of a candidate whom another one kept from being measured.
NOT_TRIED = "not tried: "


@dataclass(frozen=True)
class Method:
    """Method by which rows are measured; part of every results file."""

    peers: tuple[str, ...]
    #: Seconds of timing per candidate of a row, and the minimum and maximum of rounds.
    seconds: float = 0.3
    least_rounds: int = 10
    most_rounds: int = 100
    #: The sets of tensors together are at least this many times the L2 cache (cold); 0 means one set (warm).
    cold: float = 3.0
    most_sets: int = 256
    seed: int = 0


class DeviceLost(Exception):
    """A candidate broke the device for the whole process; ``row`` names it."""

    def __init__(self, row: Row) -> None:
        super().__init__(f"the device was lost on {row.case.key}")
        self.row = row


def measure(
    suite: Suite,
    task: Task,
    method: Method,
    device: torch.device,
    *,
    spared: Sequence[Candidate] = (),
    on_try: Callable[[Implementation], None] = lambda implementation: None,
    on_candidate: Callable[[Row], None] = lambda row: None,
) -> Row:
    """Measure ``task``. Whatever a candidate raises becomes its status; KeyboardInterrupt passes.

    ``on_try`` gets each candidate before it runs for the first time, ``on_candidate`` gets the row as it is after
    each check and after each way of timing: an "ok" without samples was checked and not timed. Those that compile for
    long come when the others are timed; then all are timed together once more, since a ratio is of samples that were
    taken side by side. Candidates ``spared`` are not run: they stand in the row as they are.
    """
    torch.manual_seed(method.seed)
    work = suite.work(task)
    number = _sets(suite, work.bytes, method, device)
    row = Row(task.case, work.flops, work.bytes, work.kind, suite.bound(task), number, int(number * work.bytes), ())
    contest = _Contest(suite, row.bound, device, on_try, lambda found: on_candidate(replace(row, candidates=found)))
    forget_compiled()
    with torch_at_its_best(task.case.dtype):
        implementations = suite.implementations(task, method.peers, device)
        try:
            sets = [suite.tensors(task, device) for _ in range(number)]
            with without_cudnn():
                reference = suite.reference(task, sets[0])
        except Exception as problem:
            contest.fail(implementations, f"no reference to check against: {reason_of(problem)[:300]}")
        else:
            contest.run(implementations, sets, reference, method, {each.name: each for each in spared})
    row = replace(row, candidates=contest.candidates)
    if contest.lost:
        raise DeviceLost(row)
    return row


def _sets(suite: Suite, set_bytes: float, method: Method, device: torch.device) -> int:
    if not suite.cold or not method.cold or device.type != "cuda":
        return 1
    wanted = method.cold * torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(round(wanted / max(set_bytes, 1)), method.most_sets))


class _Contest:
    """The candidates of one row."""

    def __init__(
        self,
        suite: Suite,
        bound: float,
        device: torch.device,
        on_try: Callable[[Implementation], None],
        on_change: Callable[[tuple[Candidate, ...]], None],
    ) -> None:
        self._suite, self._bound, self._device = suite, bound, device
        self._on_try, self._on_change = on_try, on_change
        self._ways = [way for way in stopwatches(device) if suite.graphs or way.way != "graph"]
        #: By their place in the row.
        self._found: dict[int, Candidate] = {}
        self._calls: dict[int, Calls] = {}
        #: From Python, of those that are called in another way there; none where that fails.
        self._from_python: dict[int, Calls | None] = {}
        #: Whether a candidate has broken the device for this process.
        self.lost = False

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The candidates tried so far, in the order of the row."""
        return tuple(self._found[index] for index in sorted(self._found))

    def fail(self, implementations: Sequence[Implementation], why: str) -> None:
        """Mark untried candidates as missing or failed: they cannot run, or their results cannot be trusted."""
        for index, each in enumerate(implementations):
            if index not in self._found:
                status: Literal["missing", "failed"] = "missing" if each.missing else "failed"
                self._found[index] = Candidate(each.name, each.setting, status, each.missing or why)
        self._see_whether_lost()

    def run(
        self,
        implementations: Sequence[Implementation],
        sets: Sequence[Tensors],
        reference: torch.Tensor,
        method: Method,
        spared: dict[str, Candidate],
    ) -> None:
        """Check each, then time those that are right; the slow ones one by one after that."""
        self._found = {i: spared[each.name] for i, each in enumerate(implementations) if each.name in spared}
        if spared:
            self._on_change(self.candidates)
        for together in _by_turns(implementations):
            before = set(self._calls)
            for index in together:
                each = implementations[index]
                if index in self._found:
                    continue
                self._on_try(each)
                self._check(index, each, sets, reference)
                if self.lost:
                    self.fail(implementations, f"{NOT_TRIED}{each.name} broke the device")
                    break
                self._on_change(self.candidates)
            for way in self._ways if not self.lost and set(self._calls) != before else ():
                self._time(way, method)
                self._on_change(self.candidates)
            if self.lost:
                self.fail(implementations, f"{NOT_TRIED}the device was lost")
                break
        for index in self._calls:
            candidate = self._found[index]
            if not candidate.samples:
                message = candidate.message or f"{NOT_TRIED}the device was lost while others were timed"
                self._found[index] = replace(candidate, status="failed", message=message)

    def _check(
        self, index: int, implementation: Implementation, sets: Sequence[Tensors], reference: torch.Tensor
    ) -> None:
        """Run a candidate once and compare the result with the reference."""
        candidate = Candidate(implementation.name, implementation.setting, "ok")
        if implementation.missing:
            self._found[index] = replace(candidate, status="missing", message=implementation.missing)
            return
        try:
            operands = [implementation.prepare(tensors) for tensors in sets]
            judge = functools.partial(self._judged, reference=reference, bound=implementation.bound or self._bound)
            self._found[index] = judge(candidate, implementation.function, operands[0])
        except Exception as problem:
            self._found[index] = replace(candidate, status="failed", message=reason_of(problem)[:300])
            self._see_whether_lost()
            return
        if self._found[index].status == "ok":
            self._calls[index] = [partial(implementation.function, *each) for each in operands]
            if implementation.from_python is not None:
                self._check_from_python(index, implementation.from_python, operands, judge)

    def _check_from_python(
        self, index: int, function: Callable[..., Any], operands: Sequence[Tensors], judge: Callable[..., Candidate]
    ) -> None:
        """If this raises, the candidate is not timed from Python; if it is wrong, so is the candidate."""
        self._from_python[index] = None
        try:
            judged = judge(self._found[index], function, operands[0])
        except Exception as problem:
            self._note(index, f"no eager timing: {reason_of(problem)[:300]}")
            self._see_whether_lost()
            return
        if judged.status == "ok":
            self._from_python[index] = [partial(function, *each) for each in operands]
        else:
            self._found[index] = replace(judged, message=f"from Python: {judged.message}")
            del self._calls[index]

    def _judged(
        self,
        candidate: Candidate,
        function: Callable[..., Any],
        operands: Tensors,
        reference: torch.Tensor,
        bound: float,
    ) -> Candidate:
        """``candidate`` with what is to be said of ``function``; it raises what that raises."""
        with _kept(operands) as changed:
            output = function(*operands)
            error = relative_error(self._suite.result(output), reference)
            spoiled = changed()
            _spoil(output)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if spoiled:
            return replace(candidate, status="wrong", message="changes its operands")
        if error <= bound:
            return replace(candidate, error=max(error, candidate.error or 0.0))
        if math.isfinite(error):
            message = f"error {error:.2g}, more than {bound:.2g}"
            return replace(candidate, status="wrong", message=message, error=error)
        return replace(candidate, status="wrong", message="not finite, or of another shape")

    def _time(self, way: type[Stopwatch], method: Method) -> None:
        """Take the samples of all candidates that are right, in one way of timing."""
        contestants = self._calls | self._from_python if way.way == "eager" else self._calls
        contestants = {index: calls for index, calls in contestants.items() if calls and index in self._calls}
        # Filled with None first: one that raises while its stopwatch is made drops out as later ones do.
        watches: dict[int, Any] = dict.fromkeys(contestants)
        for index, calls in contestants.items():
            with self._dropping_out(index, watches, way):
                if index in watches:
                    watches[index] = way(calls, target_seconds(self._device))
        taken = self._take_turns(watches, method, way)
        # Samples of an earlier round have no counterparts now; a lost device discards none.
        for index in contestants if not self.lost else ():
            samples = {name: kept for name, kept in self._found[index].samples.items() if name != way.way}
            if index in taken:
                samples[way.way] = [round(s * 1e6, 4) for s in taken[index]]
            self._found[index] = replace(self._found[index], samples=samples)

    def _take_turns(
        self, watches: dict[int, Stopwatch], method: Method, way: type[Stopwatch]
    ) -> dict[int, list[float]]:
        """Samples in seconds a call by candidate, one a round, in an order that changes."""
        samples: dict[int, list[float]] = {index: [] for index in watches}
        shuffled, budget = random.Random(method.seed), method.seconds * len(watches)
        self._round(watches, list(watches), way)  # warm-up
        begin = time.perf_counter()
        for done in range(method.most_rounds):
            if not watches or (done >= method.least_rounds and time.perf_counter() - begin > budget):
                break
            order = list(watches)
            shuffled.shuffle(order)
            for index, seconds in self._round(watches, order, way).items():
                samples[index].append(seconds)
        return {index: samples[index] for index in watches}

    def _round(self, watches: dict[int, Stopwatch], order: Sequence[int], way: type[Stopwatch]) -> dict[int, float]:
        seconds = {}
        # All begin before any is read: on a GPU graphs then follow one another without a gap.
        for index in order:
            with self._dropping_out(index, watches, way):
                if index in watches:
                    watches[index].start()
        for index in order:
            with self._dropping_out(index, watches, way):
                if index in watches:
                    seconds[index] = watches[index].stop()
        return seconds

    @contextlib.contextmanager
    def _dropping_out(self, index: int, watches: dict[int, Stopwatch], way: type[Stopwatch]) -> Iterator[None]:
        """A candidate that raises is timed no more and the others go on; none does without a device."""
        try:
            yield
        except Exception as problem:
            del watches[index]
            self._note(index, f"no {way.way} timing: {reason_of(problem)[:300]}")
            self._see_whether_lost()
            if self.lost:
                watches.clear()

    def _note(self, index: int, message: str) -> None:
        candidate = self._found[index]
        said = dict.fromkeys((candidate.message, message))  # the same again when it was timed again
        self._found[index] = replace(candidate, message="; ".join(filter(None, said)))

    def _see_whether_lost(self) -> None:
        self.lost = self.lost or is_lost(self._device)


def _by_turns(implementations: Sequence[Implementation]) -> list[list[int]]:
    """Their numbers: of all that are quick, then of each slow one alone."""
    quick = [index for index, each in enumerate(implementations) if not each.slow]
    return [quick, *([index] for index, each in enumerate(implementations) if each.slow)]


@contextlib.contextmanager
def _kept(operands: Tensors) -> Iterator[Callable[[], bool]]:
    """Yields whether they were changed; afterwards they are as before, for the candidates that share them."""
    before = [(tensor, tensor.clone()) for tensor in operands if isinstance(tensor, torch.Tensor)]
    try:
        yield lambda: not all(torch.equal(tensor, kept) for tensor, kept in before)
    finally:
        for tensor, kept in before:
            tensor.copy_(kept)


def _spoil(output: Any) -> None:
    """NaN for a result that was checked: the next candidate may get its memory, and must not pass by leaving it be."""
    for tensor in output if isinstance(output, (tuple, list)) else (output,):
        # A view that has an element twice cannot be filled.
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            with contextlib.suppress(RuntimeError):
                tensor.detach().fill_(math.nan)
