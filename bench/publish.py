"""``python -m bench.publish``: writes what was measured into ``bench/RESULTS.md`` and the table of the README.

Of everything that ``bench/results`` has of a device, each group of rows (suite, computation, dtype, layout, batch) is
shown as it was measured last. ``--check`` writes nothing and ends with 1 where the pages are not what the files say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import report as words
from bench import results
from bench.environment import ROOT
from bench.report import markdown
from bench.report.summary import Group, GroupKey, group_key, summarize
from bench.report.throughput import throughputs
from bench.results import Results

RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "bench" / "RESULTS.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- measured: python -m bench.publish -->", "<!-- end of measured -->"

#: gpukern against itself: no news for a reader, and dozens of columns.
_LEFT_OUT = {"plans"}
_INTRODUCTION = """# What was measured

Written by `python -m bench.publish` from the files in [`results/`](results), which hold every sample; how it is
measured is in [README.md](README.md). Losses are shown first. What was measured several times is shown as it was last.
"""


@dataclass(frozen=True)
class Found:
    """A group as it was measured last: ``run`` has its rows and no others."""

    group: Group
    run: Results
    path: Path


def newest(folder: Path) -> dict[str, list[Found]]:
    """Device → its groups, in the order of the suites' names. What is no results file is left out."""
    found: dict[str, dict[GroupKey, Found]] = {}
    for path, read in results.read_all([folder]):
        if read.environment.device_type != "cuda":
            continue
        of_device = found.setdefault(read.environment.device, {})
        for group in summarize(read):
            known = of_device.get(group.key)
            if group.key.suite in _LEFT_OUT or not group.ok:
                continue
            if known is None or known.run.environment.date < read.environment.date:
                rows = tuple(row for row in read.rows if group_key(row.case) == group.key)
                of_device[group.key] = Found(group, replace(read, rows=rows), path)
    return {device: [groups[key] for key in sorted(groups)] for device, groups in found.items() if groups}


def page(devices: dict[str, list[Found]], folder: Path) -> str:
    """RESULTS.md."""
    parts = [_INTRODUCTION]
    for device, groups in devices.items():
        parts.append(f"## {device}\n")
        for found in groups:
            source = f"results/{found.path.relative_to(folder)}"
            parts += [f"### {words.group_title(found.group.key)}\n", markdown.render(found.run, source)]
    return "\n".join(parts)


def block(devices: dict[str, list[Found]], folder: Path) -> str:
    """The README's table."""
    lines = []
    for device, groups in devices.items():
        made = max((found.run.environment for found in groups), key=lambda each: each.date)
        rows = [row for found in groups for row in _rows(found)]
        if not any(found.group.key.suite == "optimizer" for found in groups):
            rows += _earlier_steps(folder, device)
        if not rows:
            continue
        lines += [
            f"**{device}**, driver {made.driver}, torch {made.torch}, cuDNN {made.cudnn}, Triton {made.triton}, "
            f"{made.date[:10]}; float16, channels_last where nothing else is said; × above 1: gpukern is faster.\n",
            markdown.table(["", "gpukern", "best of PyTorch", "×"], rows),
            "",
        ]
    return "\n".join(lines)


def _rows(found: Found) -> Iterator[list[str]]:
    group, layers = found.group, f"{found.group.key.suite}, {_what(found.group.key)}"
    if timed := throughputs(group):
        # The first way of timing is the device's own time.
        for ours in (each for each in timed[0][1] if each.ours):
            peers = [each for each in timed[0][1] if not each.ours and each.case.key == ours.case.key]
            if peers:
                best = max(peers, key=lambda each: each.images)
                shown = words.number(ours.images), words.number(best.images)
                what = f"{words.case_name(ours.case)}: {layers}, images/s"
                yield _row(what, *shown, best.candidate, best.p50 / ours.p50)
    elif group.key.suite == "optimizer":
        for line in group.lines:
            if line.best:
                updated = f"{words.case_name(line.row.case)}, {group.key.dtype}"
                yield _step(group.key.computation, updated, *line.best.times, line.best.candidate.name)
    else:
        for network in group.networks:
            # Only where all of its layers were measured.
            totals = [each for each in group.totals_of(network).values() if each.covered == each.layers]
            if totals:
                total = min(totals, key=lambda each: each.peer_us)
                yield _times(f"{network}: {total.layers} × {layers}", total.ours_us, total.peer_us, total.peer)


def _step(optimizer: str, updated: str, ours: float, theirs: float, peer: str) -> list[str]:
    return _times(f"step of {optimizer}: {updated}", ours, theirs, peer)


def _times(what: str, ours: float, theirs: float, peer: str) -> list[str]:
    return _row(f"{what}, µs", words.micro(ours), words.micro(theirs), peer, theirs / ours)


def _row(what: str, ours: str, theirs: str, peer: str, ratio: float) -> list[str]:
    return [what, ours, f"{theirs} ({markdown.escape(peer)})", f"**{words.ratio(ratio)}**"]


def _earlier_steps(folder: Path, device: str) -> list[list[str]]:
    """Steps that were timed on ``device`` before there was a suite of them, in files of another form."""
    files = []
    for path in sorted(folder.rglob("*.json")):
        read = json.loads(path.read_text(encoding="utf-8"))
        timed = read.get("device") if isinstance(read, dict) else None
        if isinstance(timed, list) and read["environment"]["device"] == device:
            files.append((read["environment"]["date"], timed))
    steps: dict[tuple[str, str], dict[str, float]] = {}
    for row in max(files, default=("", []), key=lambda file: file[0])[1]:
        if row["seconds"]:
            steps.setdefault((row["optimizer"], row["problem"]), {})[row["candidate"]] = 1e6 * row["seconds"]
    rows = []
    for (optimizer, problem), times in steps.items():
        ours = times.pop("gpukern", None)
        if ours and times:
            best = min(times, key=times.__getitem__)
            rows.append(_step(optimizer, f"{problem}, float32", ours, times[best], best))
    return rows


def _what(key: GroupKey) -> str:
    usual = {"float16", "channels_last", ""}
    return ", ".join([key.computation, f"batch {key.batch}", *(each for each in key[2:4] if each not in usual)])


def within(text: str, table: str) -> str:
    """``text`` with ``table`` between its marks; ValueError where they are missing."""
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"the page has no place for the table: {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{table}\n{END}{after}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.publish", description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, say whether the pages are up to date")
    options = parser.parse_args(arguments)
    devices = newest(RESULTS)
    try:
        pages = {
            PAGE: page(devices, RESULTS),
            README: within(README.read_text(encoding="utf-8"), block(devices, RESULTS)),
        }
    except (ValueError, OSError) as error:
        print(f"bench.publish: {error}", file=sys.stderr)
        return 1
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if not options.check:
            results.write_text(path, pages[path])
        print(f"{path.relative_to(ROOT)}: {'not what the results say' if options.check else 'written'}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
