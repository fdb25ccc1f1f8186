"""How results are shown: sizes, tables for people, JSON for machines; and what may be wrong."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from tailor_dcp.amounts import percent, size

__all__ = ["complain", "console", "percent", "print_json", "say", "size", "visible"]


_LONGEST = 4000


def print_json(value: Any) -> None:
    """Print for machines."""
    typer.echo(json.dumps(value, indent=2))


def console() -> Console:
    """Return where tables go. Not a terminal: wide enough that nothing is cut."""
    plain = _Visible()
    return plain if plain.is_terminal else _Visible(width=160)


class _Visible(Console):
    """Shows what could move a terminal's cursor, or turn text around: names come from files that anybody wrote."""

    def render_str(self, text: str, **how: Any) -> Text:
        """Make text of a string."""
        return super().render_str(visible(text), **how)


def visible(text: str, lines: bool = True) -> str:
    r"""Return a text in which what is no character to be seen is written out, as ``\x1b``; new lines stay as asked."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or (lines and c == "\n") else c.encode("unicode_escape").decode() for c in text)


def complain(program: str, problem: object) -> None:
    """Print in one line what is wrong, to where errors go."""
    said = visible(str(problem), lines=False)
    # A name from a file may be of any length.
    short = said if len(said) <= _LONGEST else f"{said[: _LONGEST // 2]} … {said[-_LONGEST // 2 :]}"
    typer.echo(f"{program}: {short}", err=True)


def say(text: str) -> None:
    """Print a sentence for people. Not on a terminal: in one line, however long the paths in it are."""
    out = console()
    out.print(escape(text), soft_wrap=not out.is_terminal)
