"""How results are shown: sizes, tables for people, JSON for machines; and what may be wrong."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from tailor_dcp.amounts import percent, size
from tailor_dcp.visible import visible

__all__ = ["complain", "console", "percent", "print_json", "say", "size", "visible"]

_LONGEST = 4000
"""Characters of a sentence or a cell: a name from a file may be of any length."""


def print_json(value: Any) -> None:
    """Print for machines."""
    typer.echo(json.dumps(value, indent=2))


def console() -> Console:
    """Return where tables go. Not a terminal: wide enough that nothing is cut."""
    plain = _Visible(emoji=False)  # a name may hold ":x:"
    return plain if plain.is_terminal else _Visible(width=160, emoji=False)


class _Visible(Console):
    """Shows what could move a terminal's cursor, or turn text around: names come from files that anybody wrote."""

    def render_str(self, text: str, **how: Any) -> Text:
        """Make text of a string."""
        if len(text) <= _LONGEST:
            return super().render_str(visible(text), **how)
        # rich takes minutes to look for numbers and paths in a name of a hundred thousand dots.
        made = super().render_str(visible(text), **{**how, "highlight": False})
        return made if len(made) <= _LONGEST else made[: _LONGEST // 2] + " … " + made[-_LONGEST // 2 :]


def complain(program: str, problem: object) -> None:
    """Print in one line what is wrong, to where errors go."""
    said = visible(str(problem), lines=False)
    short = said if len(said) <= _LONGEST else f"{said[: _LONGEST // 2]} … {said[-_LONGEST // 2 :]}"
    typer.echo(f"{program}: {short}", err=True)


def say(text: str) -> None:
    """Print a sentence for people. Not on a terminal: in one line, however long the paths in it are."""
    out = console()
    out.print(escape(text), soft_wrap=not out.is_terminal)
