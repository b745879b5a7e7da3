"""What people read of a run. Here: how every form of it writes numbers, names and evidence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from bench.results import Candidate, Case, Ceilings, Environment, Results, Row
from bench.stats import Spread

TIMINGS = {"graph": "CUDA graph", "eager": "calls from Python", "wall": "wall clock"}


def decimals(value: float, digits: int = 4) -> int:
    """How many decimals show ``digits`` significant digits; at most 3."""
    return min(3, max(0, digits - 1 - math.floor(math.log10(value)))) if value > 0 else 0


def micro(value: float) -> str:
    """Microseconds: 1,234 or 12.34."""
    return f"{value:,.{decimals(value)}f}"


def plus_minus(spread: Spread) -> str:
    """Half of the interval, with the decimals of its median."""
    return f"±{(spread.high - spread.low) / 2:,.{decimals(spread.median)}f}"


def ratio(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.{1 if value >= 10 else 2}f}×"


def interval(spread: Spread) -> str:
    """Of a ratio."""
    return f"{ratio(spread.low)[:-1]}–{ratio(spread.high)[:-1]}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def rate(value: float | None, unit: float) -> str:
    """Three significant digits of ``value / unit``."""
    return "–" if value is None else f"{value / unit:,.{decimals(value / unit, 3)}f}"


def is_network(case: Case) -> bool:
    """Whether the case is a whole network, which computes images."""
    return "network" in case.sizes


def images_per_second(case: Case, microseconds: float) -> float:
    return case.batch / microseconds * 1e6


def per_second(value: float) -> str:
    """Three significant digits at least, and never half an image where there are many."""
    return f"{value:,.{decimals(value, 3)}f}"


def count(number: int, singular: str, plural: str = "") -> str:
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def record(wins: int, losses: int, ties: int) -> str:
    return f"{count(wins, 'win')}, {count(losses, 'loss', 'losses')}, {count(ties, 'tie')}"


def one_line(text: str) -> str:
    """Without line breaks and control characters: messages of failed candidates hold anything."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def group_title(key: Sequence[Any]) -> str:
    """Of (suite, computation, dtype, layout, batch)."""
    *names, batch = key
    return one_line(" · ".join([name for name in names if name] + [f"batch {batch}"]))


def use_names(case: Case) -> list[str]:
    """ "resnet50 layer1.0.conv2 ×3" for every network that has this problem."""
    return [one_line(f"{u.network} {u.layer}") + (f" ×{u.count}" if u.count > 1 else "") for u in case.uses]


def case_name(case: Case) -> str:
    """The first use (… where there are more), or the problem of a case without one."""
    names = use_names(case)
    return names[0] + (" …" if len(names) > 1 else "") if names else one_line(case.problem)


def state(candidate: Candidate) -> str:
    """Its status; "not timed" if it is ok and yet has no samples."""
    return "not timed" if candidate.status == "ok" and not any(candidate.samples.values()) else candidate.status


def reason(candidate: Candidate, row: Row) -> str:
    """Why a candidate is not ok."""
    if candidate.status == "wrong" and candidate.error is not None and not candidate.message:
        return f"error {candidate.error:.1e}, bound {row.bound:.1e}"
    return one_line(candidate.message) or "no reason given"


def commit_name(environment: Environment) -> str:
    """A short name, + for changed files."""
    return (environment.commit or "no commit")[:9] + "+" * environment.modified


def pairs(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def text_pairs(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(one_line(name), one_line(str(value))) for name, value in values.items()]


def cases(found: Sequence[Case]) -> str:
    """Few by name, many by number."""
    return ", ".join(map(case_name, found)) if len(found) < 3 else count(len(found), "row")


def ceilings(bandwidth: float, matrix_rates: dict[str, float]) -> str:
    rates = [f"{kind} {rate(value, 1e12)} TFLOP/s" for kind, value in matrix_rates.items()]
    return ", ".join([f"copy {rate(bandwidth, 1e9)} GB/s", *rates])


def evidence(environment: Environment, measured: Ceilings | None = None) -> list[tuple[str, str]]:
    """What a reader needs to believe or repeat the figures, by name."""
    e = environment
    device = [
        e.device,
        _known("compute capability {}", e.compute_capability),
        _known("{} SMs", e.sm_count),
        _known("{:.0f} GiB", e.memory and e.memory / 2**30),
        _known("{:.0f} MiB L2", e.l2_cache and e.l2_cache / 2**20),
    ]
    versions = [
        _known("driver {}", e.driver),
        _known("CUDA {}", e.cuda),
        _known("cuDNN {}", e.cudnn),
        f"torch {e.torch}",
        _known("Triton {}", e.triton),
        f"Python {e.python}",
        e.platform,
    ]
    changed = " with changes" if e.modified else ""
    code = [f"gpukern {e.gpukern}", _commit(e.commit) + changed, f"source {e.source[:12]}"]
    lines = [("device", _joined(device)), ("versions", _joined(versions)), ("code", _joined(code)), ("date", e.date)]
    if e.flags:
        lines.insert(2, ("flags", pairs(e.flags)))
    if measured is not None:
        lines.insert(1, ("measured ceilings", ceilings(measured.bandwidth, measured.matrix_rates)))
    return [(name, one_line(value)) for name, value in lines]


def _commit(commit: str | None) -> str:
    return f"commit {commit[:9]}" if commit else "no commit"


def setup_changes(old: Environment, new: Environment) -> list[tuple[str, str]]:
    """What differs, and from what to what."""
    found = []
    for name in old.same_setup(new):
        values = [getattr(environment, name) for environment in (old, new)]
        shown = [pairs(value) if isinstance(value, dict) else str(value) for value in values]
        found.append((name, one_line(f"{shown[0]} → {shown[1]}")))
    return found


def settings(results: Results) -> list[tuple[str, str]]:
    """What exactly ran under the name of each candidate."""
    found: dict[str, dict[str, None]] = {}
    for row in results.rows:
        for candidate in row.candidates:
            found.setdefault(candidate.name, {})[candidate.setting] = None
    return [(one_line(name), one_line("; or ".join(used))) for name, used in found.items()]


def _known(form: str, value: Any) -> str:
    return form.format(value) if value is not None else ""


def _joined(parts: Iterable[str]) -> str:
    return ", ".join(part for part in parts if part)
