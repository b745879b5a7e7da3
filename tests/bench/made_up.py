"""Runs that nobody made, for the tests of what is read of one. Every figure is invented."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence

from bench.results import Candidate, Case, Ceilings, Environment, Results, Row, Use

DEVICE = "Made-up GPU"
#: What a compiler may print: markup of HTML, Markdown and rich, and several lines.
MESSAGE = 'BackendError: <script>alert("no")</script> | [bold]**x**[/bold] `y`\n  at line 1\n'
CEILINGS = Ceilings(bandwidth=1e12, matrix_rates={"float16": 100e12, "float32": 10e12})
OLD, NEW = "1111111aaaa", "2222222bbbb"


def environment(**changes) -> Environment:
    made_up = Environment(
        device=DEVICE, device_type="cuda", python="3.0.0", torch="0.0.1", triton="0.0.2", gpukern="0.0.3",
        source="0123456789abcdef", commit=NEW, modified=False, date="2001-01-02T00:00:00+00:00", platform="Made-up OS",
        compute_capability="0.1", sm_count=10, l2_cache=2**20, memory=2**30, driver="0.4", cuda="0.5", cudnn="0.6",
        flags={"cudnn.benchmark": True, "cudnn.allow_tf32": False},
    )  # fmt: skip
    return dataclasses.replace(made_up, **changes)


def samples(median: float, who: str = "", spread: float = 0.02, rounds: int = 21) -> list[float]:
    """Around ``median``, the same in every call with the same arguments."""
    draw = random.Random(f"{median:.6g} {who}")
    return [round(median * (1 + draw.uniform(-spread, spread)), 4) for _ in range(rounds)]


def case(problem: str = "a problem", **changes) -> Case:
    made_up = Case(
        suite="conv", computation="forward", problem=problem, sizes={"N": 32}, batch=32, dtype="float16",
        layout="channels_last", uses=(),
    )  # fmt: skip
    return dataclasses.replace(made_up, **changes)


def candidate(name: str, times: Mapping[str, Sequence[float]] | float | str, message: str = "") -> Candidate:
    """``times``: samples by timing, a median of graph samples, or a status other than ok."""
    if isinstance(times, str):
        return Candidate(name, "as it is", times, message, error=0.25 if times == "wrong" else None)
    found = {name: list(values) for name, values in times.items()} if isinstance(times, Mapping) else None
    return Candidate(name, "as it is", "ok", error=1e-4, samples=found or {"graph": samples(times)})


def row(ours, peers: Mapping[str, object] | None = None, flops: float = 1e9, bytes_: float = 1e6, **changes) -> Row:
    candidates = [candidate("gpukern", ours), *(candidate(name, times) for name, times in (peers or {}).items())]
    of = changes.pop("of", None) or case(**changes)
    kind = "float16" if of.dtype == "float16" else "float32"
    return Row(of, flops, bytes_, kind, bound=1e-3, sets=4, footprint=10**8, candidates=tuple(candidates))


def results(rows: Sequence[Row], **changes) -> Results:
    return Results(environment(**changes), CEILINGS, {"rounds": 21, "warm-up": "a second"}, tuple(rows))


def run(speed: float = 1.0, **changes) -> Results:
    """A whole one: wins, losses, ties, and everything that can go wrong. ``speed`` of gpukern alone."""
    return results([*_convolutions(speed), *_pools(speed), *_networks(speed)], **changes)


def _convolutions(speed: float) -> list[Row]:
    draw, rows = random.Random(7), []
    for computation in ("forward", "weight gradient"):
        for i in range(16):
            channels, size = (64 << i // 4) + 8 * (i % 4), 56 >> i // 4
            kernel = 1 if i % 2 else 3
            uses = [Use("resnet50", f"layer{i // 4 + 1}.{i % 4}.conv{i % 3 + 1}", 1 + i % 3)]
            if i % 5 == 0:
                uses.append(Use("a network of a rather long name", "features.denseblock1.denselayer12.conv2", 2))
            problem = f"32×{channels}×{size}×{size}, {channels}×{kernel}×{kernel}, padding {kernel // 2}"
            of = case(problem, computation=computation, uses=tuple(uses))
            flops, moved = 2.0 * 32 * size**2 * channels**2 * kernel**2, 4.0 * 32 * size**2 * channels
            floor = max(flops / 100e12, moved / 1e12) * 1e6
            best = floor * draw.uniform(1.9, 2.6)
            ours = best / draw.choice((0.72, 0.93, 1.002, 1.04, 1.12, 1.3, 1.75)) / speed
            nchw = best * draw.uniform(1.1, 1.9)
            peers = {
                "cuDNN channels_last": _timed(best), "cuDNN NCHW": _timed(nchw),
                "torch.compile": {"eager": samples(best * 1.02 + 9)}, "FlagGems": "missing",
            }  # fmt: skip
            if i == 3:
                peers["torch.compile"] = "failed"
            made = row(_timed(ours, "ours"), peers, flops, moved, of=of)
            rows.append(dataclasses.replace(made, candidates=tuple(_explained(c) for c in made.candidates)))
    rows[5] = _broken(rows[5], "wrong", "")
    rows[22] = _broken(rows[22], "failed", MESSAGE)
    return rows


def _timed(median: float, who: str = "peer") -> dict[str, list[float]]:
    return {"graph": samples(median, who), "eager": samples(median + 9, who)}


def _explained(made: Candidate) -> Candidate:
    messages = {"missing": "flag_gems is not installed", "failed": MESSAGE}
    if made.status == "ok" and "graph" not in made.samples:
        messages["ok"] = "no graph timing: made up"
    return dataclasses.replace(made, message=messages.get(made.status, ""))


def _broken(made: Row, status: str, message: str) -> Row:
    ours = dataclasses.replace(made.candidates[0], status=status, message=message, samples={}, error=0.25)
    return dataclasses.replace(made, candidates=(ours, *made.candidates[1:]))


def _pools(speed: float) -> list[Row]:
    rows = []
    for i, ratio in enumerate((0.6, 1.0, 2.4, 5.5)):
        of = case(
            f"32×{16 << i}×28×28, 3×3, stride 2", suite="pool", dtype="float32", layout="NCHW",
            uses=(Use("a <b>net</b>", f"pool{i}", 1),),
        )  # fmt: skip
        rows.append(
            row(_timed(20 / ratio / speed, "ours"), {"torch": _timed(20.0)}, 0.0 if i == 0 else 1e6, 3e6, of=of)
        )
    return rows


def _networks(speed: float) -> list[Row]:
    of = case("resnet50", suite="model", computation="training step", layout="channels_last")
    peers = {
        "cuDNN channels_last": {"eager": samples(40_000.0)},
        "torch.compile": {"eager": samples(36_000.0, "compiled")},
    }
    return [row({"eager": samples(37_500.0 / speed, "ours")}, peers, 1.2e12, 1e10, of=of)]
