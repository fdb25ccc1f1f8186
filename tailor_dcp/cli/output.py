"""How results are shown: sizes, tables for people, JSON for machines."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from tailor_dcp.amounts import percent, size

__all__ = ["console", "percent", "print_json", "say", "size"]


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
