"""Self-contained pages of HTML, from Jinja's templates: torch needs Jinja, so it is on every machine.

Templates begin with ``{% extends "base.html" %}`` and fill its blocks ``title``, ``style``, ``body`` and ``script``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

_FOLDER = Path(__file__).parent


def render(template: Path, **values: Any) -> str:
    """The page of ``template``, with ``values`` by name. The same values give the same bytes.

    Text is escaped and freed of control characters, whatever it holds, unless it is :class:`markupsafe.Markup`.
    jinja2.UndefinedError for a name without a value.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _FOLDER]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(values)


def _clean(value: Any) -> Any:
    """Tooltips may have line breaks; anything else that cannot be printed steers something or breaks HTML."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(letter if letter.isprintable() or letter == "\n" else "�" for letter in value)
