"""Reports of a run for people. Here: formatting of numbers, names and evidence, shared by all forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.results import Candidate, Case, Ceilings, Environment, Results, Row
from bench.stats import Spread
from gpukern.formatting import count, decimals, error, memory, number, ratio
from gpukern.formatting import percent as percent

TIMINGS = {"graph": "CUDA graph", "eager": "calls from Python", "wall": "wall clock"}


def _decimals(microseconds: float) -> int:
    """Four significant digits, but no fraction of a nanosecond."""
    return min(3, decimals(microseconds, 4))


def micro(value: float) -> str:
    """Microseconds: 1,234 or 12.34."""
    return f"{value:,.{_decimals(value)}f}"


def plus_minus(spread: Spread) -> str:
    """Half of the interval, with the decimals of its median."""
    return f"±{(spread.high - spread.low) / 2:,.{_decimals(spread.median)}f}"


def interval(spread: Spread) -> str:
    """Format the interval of a ratio."""
    return f"{ratio(spread.low)[:-1]}–{ratio(spread.high)[:-1]}"


def rate(value: float | None, unit: float) -> str:
    """Three significant digits of ``value / unit``."""
    return number(None if value is None else value / unit)


def is_network(case: Case) -> bool:
    """Whether the case is a whole network, which computes images."""
    return "network" in case.sizes


def adds_up(case: Case) -> bool:
    """Whether the case is a layer: times of a network's layers have a sum, those of networks and of steps have none."""
    return not {"network", "parameters"} & case.sizes.keys()


def images_per_second(case: Case, microseconds: float) -> float:
    return case.batch / microseconds * 1e6


def record(wins: int, losses: int, ties: int) -> str:
    return f"{count(wins, 'win')}, {count(losses, 'loss', 'losses')}, {count(ties, 'tie')}"


def one_line(text: str) -> str:
    """Without line breaks and control characters: messages of failed candidates hold anything."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def group_title(key: Sequence[Any]) -> str:
    """Title of a group from (suite, computation, dtype, layout, batch)."""
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
    """The reason why a candidate is not ok."""
    if candidate.status == "wrong" and candidate.error is not None and not candidate.message:
        return f"error {error(candidate.error)}, bound {error(row.bound)}"
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


def evidence(environment: Environment, measured: Ceilings) -> list[tuple[str, str]]:
    """Facts that a reader needs to believe or repeat the figures, by name."""
    e = environment
    device = _known(
        ("{}", e.device),
        ("compute capability {}", e.compute_capability),
        ("{} SMs", e.sm_count),
        ("{}", e.memory and memory(e.memory)),
        ("{} L2", e.l2_cache and memory(e.l2_cache)),
    )
    versions = _known(
        ("driver {}", e.driver),
        ("CUDA {}", e.cuda),
        ("cuDNN {}", e.cudnn),
        ("torch {}", e.torch),
        ("Triton {}", e.triton),
        ("Python {}", e.python),
        ("{}", e.platform),
    )
    commit = f"commit {e.commit[:9]}" if e.commit else "no commit"
    code = f"gpukern {e.gpukern}, {commit}{' with changes' * e.modified}, source {e.source[:12]}"
    facts = {"device": device, "measured ceilings": ceilings(measured.bandwidth, measured.matrix_rates)}
    facts |= {"versions": versions, **({"flags": pairs(e.flags)} if e.flags else {}), "code": code, "date": e.date}
    return text_pairs(facts)


def _known(*facts: tuple[str, Any]) -> str:
    return ", ".join(form.format(value) for form, value in facts if value is not None)


def setup_changes(old: Environment, new: Environment) -> list[tuple[str, str]]:
    """The differences between two setups, each with old and new value."""
    found = []
    for name in old.same_setup(new):
        values = [getattr(environment, name) for environment in (old, new)]
        shown = [pairs(value) if isinstance(value, dict) else str(value) for value in values]
        found.append((name, one_line(f"{shown[0]} → {shown[1]}")))
    return found


def settings(results: Results) -> list[tuple[str, str]]:
    """The exact settings that ran under the name of each candidate."""
    found: dict[str, dict[str, None]] = {}
    for row in results.rows:
        for candidate in row.candidates:
            found.setdefault(candidate.name, {})[candidate.setting] = None
    return text_pairs({name: "; or ".join(used) for name, used in found.items()})
