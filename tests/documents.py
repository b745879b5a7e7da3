"""Markdown pages, as the tests of the documentation read them: fenced blocks, inline code, links and commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.M | re.S
)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
#: Relative errors, which differ in their last digits between machines.
_ERROR = re.compile(r"\d\.\de[-+]\d\d")


@dataclass(frozen=True)
class Block:
    """A fenced block. ``reason`` tells why it is not run; ``output`` is the bare block that follows it."""

    language: str
    body: str
    reason: str | None
    output: str | None


@dataclass(frozen=True)
class Command:
    """A line after ``$ `` and the output shown below it."""

    line: str
    output: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of ``page`` in their order; a bare one directly after another is that one's output."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    end = -1
    for match in _FENCE.finditer(text):
        language, body = match["language"], match["body"]
        if not language and found and match.start() == end + 1:
            code = found.pop()
            found.append(Block(code.language, code.body, code.reason, body))
        else:
            found.append(Block(language, body, match["reason"], None))
        end = match.end()
    return found


def commands(block: Block) -> list[Command]:
    """The commands of a ``console`` block."""
    parts = re.split(r"^\$ (.*)\n", block.body, flags=re.M)
    return [Command(line, output) for line, output in zip(parts[1::2], parts[2::2], strict=True)]


def prose(page: Path) -> str:
    """``page`` without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    return _LINK.findall(prose(page))


def inline_code(page: Path) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def table(page: Path, header: str) -> Iterator[list[str]]:
    """The rows of the table whose header line begins with ``header``."""
    _, _, rest = page.read_text(encoding="utf-8").partition(f"\n{header}")
    for line in rest.splitlines()[2:]:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


def anchors(page: Path) -> set[str]:
    """What a link can name after ``#``: headings in lower case, words joined by hyphens, other signs left out."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_shown(expected: str, actual: str) -> bool:
    """Whether ``actual`` is what a page shows: "…" in a line of its own stands for any lines, errors may differ."""
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "…" else re.escape(line) + r"\n" for line in _comparable(expected)
    )
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in _comparable(actual))) is not None


def _comparable(text: str) -> list[str]:
    return [_ERROR.sub("#.#e##", line.rstrip()) for line in text.strip("\n").splitlines()]
