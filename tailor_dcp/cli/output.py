"""How results are shown: sizes, tables for people, JSON for machines."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def size(count: int) -> str:
    """Write a number of bytes as people read it: three digits and a decimal unit."""
    value, unit = float(count), 0
    while abs(value) >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} {_UNITS[unit]}" if unit == 0 or value >= 99.95 else f"{value:.3g} {_UNITS[unit]}"


def percent(part: int, whole: int) -> str:
    """Write a fraction as a percentage; a dash where there is no whole."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def print_json(value: Any) -> None:
    """Print for machines."""
    typer.echo(json.dumps(value, indent=2))


def console() -> Console:
    """Return where tables go. Not a terminal: wide enough that nothing is cut."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=160)


def say(text: str) -> None:
    """Print a sentence for people. Not on a terminal: in one line, however long the paths in it are."""
    out = console()
    out.print(escape(text), soft_wrap=not out.is_terminal)
