"""A run as Markdown for a README: the headline, then every row in blocks to unfold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from bench import report as words
from bench.report import throughput
from bench.report.summary import Group, Line, Problem, Tally, Versus, summarize
from bench.report.throughput import Throughput, throughputs
from bench.results import Results
from gpukern.tables import markdown as table

_KEY = ["suite", "computation", "dtype", "layout", "batch"]


def render(results: Results, source: str = "") -> str:
    """``source``: the file it is from, as the reader finds it."""
    groups = summarize(results)
    peers = list(dict.fromkeys(peer for group in groups for peer in group.peers))
    evidence = words.evidence(results.environment, results.ceilings) + words.settings(results)
    parts = [
        "× is the peer's time / gpukern's, the geometric mean over rows: above 1 gpukern is faster. "
        "Behind it: wins / losses / ties.",
        table([*_KEY, "rows", "best peer", *peers], [_headline(group, peers) for group in groups], left=4),
        _evidence(evidence, source),
        *(_details(words.group_title(group.key), _group(group)) for group in groups),
    ]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Text that Markdown, tables and HTML leave as it is."""
    text = words.one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # An underscore inside a word, as in channels_last, means nothing.
    return re.sub(r"([\\`*\[\]|~$#]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _record(tally: Tally) -> str:
    return f"**{words.ratio(tally.mean)}** {tally.wins} / {tally.losses} / {tally.ties}"


def _headline(group: Group, peers: Sequence[str]) -> list[str]:
    by_name = {tally.name: tally for tally in group.tallies}
    cells = []
    for name in [group.tallies[0].name, *peers]:
        tally = by_name.get(name)
        cells.append(_record(tally) if tally and tally.rows else "–")
    rows = f"{len(group.lines)}" + (f", {group.broken} not ok" if group.broken else "")
    return [*(escape(str(part)) or "–" for part in group.key), rows, *cells]


def _group(group: Group) -> str:
    head = ["layer", "gpukern µs", *(f"{escape(name)} µs" for name in group.peers), "of limit", "bound"]
    best = group.tallies[0]
    record = words.record(best.wins, best.losses, best.ties)
    totals = [
        f"{escape(t.network)}, {t.covered} of {t.layers} layers: gpukern {words.micro(t.ours_us)} µs, "
        f"{escape(t.peer)} {words.micro(t.peer_us)} µs ({words.ratio(t.peer_us / t.ours_us)})"
        for t in group.totals
        if t.covered
    ]
    parts = [
        f"Best peer: {words.ratio(best.mean)}, {record}. Times: {words.TIMINGS.get(group.timing or '', 'none')}, "
        "median ± half of its 95 % interval; behind × its interval.",
        table(head, [_line(line, group) for line in group.lines]),
        *(_throughputs(timing, rows) for timing, rows in throughputs(group)),
        _list(totals),
        _list(_problem(problem) for problem in group.problems),
    ]
    return "\n\n".join(part for part in parts if part)


def _throughputs(timing: str, rows: Sequence[Throughput]) -> str:
    body = [list(map(escape, row.cells)) for row in rows]
    return f"Images a second, {timing}; p50 and p99 {throughput.CAPTION}.\n\n" + table(
        throughput.COLUMNS, body, left=throughput.WORDS
    )


def _line(line: Line, group: Group) -> list[str]:
    by_name = {peer.candidate.name: peer for peer in line.peers}
    name = escape(words.case_name(line.row.case))
    problem = escape(line.row.case.problem)
    ours = f"**{words.state(line.ours)}**"
    if line.time:
        mark = f" {line.timing}" if line.timing != group.timing else ""
        ours = f"{words.micro(line.time.median)} {words.plus_minus(line.time)}{mark}"
    cells = [_peer(by_name.get(peer), group.timing) for peer in group.peers]
    layer = name if name == problem else f"{name}<br>{problem}"
    return [layer, ours, *cells, words.percent(line.share), line.bound or "–"]


def _peer(peer: Versus | None, usual: str | None) -> str:
    if peer is None:
        return "–"
    if peer.time is None:
        return words.state(peer.candidate)
    mark = f" {peer.timing}" if peer.timing != usual else ""
    text = f"{words.micro(peer.time.median)}{mark}"
    return f"{text} **{words.ratio(peer.ratio.median)}** ({words.interval(peer.ratio)})" if peer.ratio else text


def _problem(problem: Problem) -> str:
    where = escape(words.cases(problem.cases))
    return f"**{escape(problem.name)} {problem.status}** ({where}): {escape(problem.reason)}"


def _evidence(evidence: Iterable[tuple[str, str]], source: str) -> str:
    line = "; ".join(f"{name}: {escape(value)}" for name, value in evidence)
    return line + (f"; file: `{source}`" if source else "") + "."


def _details(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>\n\n{body}\n\n</details>"


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)
