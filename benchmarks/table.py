"""The form in which every benchmark tells what it found: some work, its peer in the same run, a ratio, a bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import Ratio, machine

COLUMNS = ("work", "beside", "its", "ratio  [95 %]", "bar", "")
_WIDTH = 140


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        work: what was measured.
        beside: what it was measured against, in the same run.
        quantity: what the ratio is of, ours over the peer's: time, rate, bytes, stall, …
        ratio: the median of all pairs, with low and high as ``Ratio`` has them where there are pairs.
        low: see ``ratio``.
        high: see ``ratio``.
        bar: what the ratio must not exceed, or must reach; None if it is only told.
        at_least: whether the bar must be reached.
        note: what else belongs to it, absolute figures too; these are never compared across runs.
    """

    work: str
    beside: str
    quantity: str
    ratio: float
    low: float | None = None
    high: float | None = None
    bar: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the bar is kept; what has none always does."""
        return self.bar is None or (self.ratio >= self.bar if self.at_least else self.ratio <= self.bar)

    def cells(self) -> tuple[str, ...]:
        """Return what a table shows in its columns."""
        spread = "" if self.low is None or self.high is None else f"  [{_shown(self.low)}, {_shown(self.high)}]"
        bar = "" if self.bar is None else f"{'≥' if self.at_least else '≤'} {_shown(self.bar)}"
        note = "; ".join(filter(None, ("" if self.holds else "**MISSED**", self.note)))
        return (self.work, self.beside, self.quantity, f"{_shown(self.ratio)}{spread}", bar, note)


def row(
    work: str,
    beside: str,
    quantity: str,
    found: Ratio | float,
    bar: float | None = None,
    at_least: bool = False,
    note: str = "",
) -> Row:
    """Return a row of a ratio that has a spread, or of one that has none."""
    if isinstance(found, Ratio):
        return Row(work, beside, quantity, found.median, found.low, found.high, bar, at_least, note)
    return Row(work, beside, quantity, found, None, None, bar, at_least, note)


def publish(title: str, rows: Sequence[Row], out: Path | None, **details: Any) -> None:
    """Print what a benchmark found, write it where it was asked to, and exit with 1 if a bar is missed.

    Args:
        title: what was measured, with its size and the number of pairs.
        rows: the findings.
        out: the JSON file; None for none.
        details: what else goes into the file.
    """
    Console(width=_WIDTH).print(_table(title, rows))
    if out:
        told = {"title": title, "machine": machine(), "table": [asdict(one) for one in rows], **details}
        out.write_text(json.dumps(told, indent=1) + "\n")
    if not all(one.holds for one in rows):
        sys.exit(1)


def rows_in(found: dict[str, Any]) -> list[Row]:
    """Return the findings that a file of results holds."""
    return [Row(**one) for one in found["table"]]


def markdown(rows: Iterable[Row]) -> str:
    """Return the findings as a table of a document."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(one.cells() for one in rows)]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _table(title: str, rows: Iterable[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column)
    for one in rows:
        table.add_row(*(cell.replace("**", "") for cell in one.cells()))
    return table


def _shown(number: float) -> str:
    """Return three digits that mean something."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}" if number >= 10 else f"{number:.3f}"
