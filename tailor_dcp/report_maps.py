"""Maps of a report: what each cell of layers x checkpoints looks like, and how large runs are folded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tailor_dcp.amounts import counted
from tailor_dcp.report import Report, UnitHistory
from tailor_dcp.report_charts import Cell, Frame

_ROWS, _COLUMNS = 200, 400
"""What a map may have at most."""
_AGES, _DRIFTS = 8, 7
"""Shades."""

Row = tuple[str, Sequence[Cell | None]]
Draw = Callable[[Sequence[UnitHistory], range], Cell | None]
"""Draws the cell of some layers and some checkpoints."""


@dataclass(frozen=True)
class Fold:
    """How a run is cut into columns and rows.

    Attributes:
        columns: the checkpoints of each column.
        layers: layers that share a row.
    """

    columns: tuple[range, ...]
    layers: int

    @classmethod
    def of(cls, report: Report) -> Fold:
        """Return the finest that keeps each map below its greatest size."""
        rows = max((sum(unit.kind == kind for unit in report.units) for kind in report.kinds), default=0)
        layers = max(1, math.ceil(rows / _ROWS))
        saves, wide = len(report.saves), max(1, math.ceil(len(report.saves) / _COLUMNS))
        return cls(tuple(range(start, min(start + wide, saves)) for start in range(0, saves, wide)), layers)

    @property
    def saves(self) -> int:
        """Checkpoints that share a column."""
        return len(self.columns[0]) if self.columns else 1


def frame_of(report: Report, fold: Fold) -> Frame:
    """Return the axis that all charts share."""

    def step(save: int) -> str:
        found = report.saves[save].step
        return report.saves[save].name if found is None else str(found)

    labels = [step(c[0]) if len(c) == 1 else f"{step(c[0])}…{step(c[-1])}" for c in fold.columns]
    back = {number for number in range(1, len(report.saves)) if _went_back(report, number)}
    breaks = frozenset(number for number, column in enumerate(fold.columns) if number and back & set(column))
    left = [all(report.saves[save].left for save in column) for column in fold.columns]
    return Frame.of(labels, breaks, left, [unit.layer for unit in report.units])


def _went_back(report: Report, number: int) -> bool:
    before, step = report.saves[number - 1].step, report.saves[number].step
    return before is not None and step is not None and step < before


def alike(report: Report) -> list[tuple[str, ...]]:
    """Return the kinds, together where they are always written together: one map tells of them all."""
    found: dict[tuple[tuple[str, tuple[int | None, ...]], ...], list[str]] = {}
    for kind in report.kinds:
        units = tuple((unit.layer, unit.saves) for unit in report.units if unit.kind == kind)
        found.setdefault(units, []).append(kind)
    return [tuple(kinds) for kinds in found.values()]


# Origins -----------------------------------------------------------------------------------


def oldest(report: Report) -> int:
    """Return how many saves old the oldest values of any checkpoint are."""
    return max((age for unit in report.units for age in unit.saves if age is not None), default=0)


def shade(age: int, most: int) -> str:
    """Return the class of what is ``age`` saves old where nothing is older than ``most``."""
    if not age:
        return "s0"
    if most <= _AGES:  # spread over all shades
        return f"a{1 + round((age - 1) * (_AGES - 1) / max(1, most - 1))}"
    return f"a{1 + (age - 1) * _AGES // most}"


def shades(most: int) -> list[tuple[str, str]]:
    """Return the classes and what they mean, from fresh to old."""
    bounds = range(most + 1) if most <= _AGES else [-(-number * most // _AGES) for number in range(_AGES + 1)]
    spans = [(low + 1, high) for low, high in pairwise(bounds)]
    return [
        ("s0", "written in this save"),
        *((shade(high, most), _span(low, high)) for low, high in spans),
    ]


def _span(low: int, high: int) -> str:
    return f"{counted(low, 'save')} old" if low == high else f"{low} to {high} saves old"


def origin_rows(report: Report, kind: str, fold: Fold) -> list[Row]:
    """Return for each layer of a kind how old its values are in each checkpoint."""
    most = oldest(report)
    meanings = dict(shades(most))

    def cell(units: Sequence[UnitHistory], column: range) -> Cell | None:
        there = [(age, unit, save) for unit in units for save in column if (age := unit.saves[save]) is not None]
        if not there:
            return None
        age, unit, save = max(there, key=lambda item: item[0])
        if not age:
            return Cell("s0", "written in these saves", "written in this save")
        step, origin = report.saves[save].step, unit.origins[save]
        steps = f", {counted(abs(step - origin), 'step')}" if step is not None and origin is not None else ""
        whence = f"values of step {origin}" if origin is not None else "values of an earlier save"
        look = shade(age, most)
        return Cell(look, meanings[look], f"{whence}, {counted(age, 'save')}{steps} old")

    return _rows(report, kind, fold, cell)


# Drift -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DriftScale:
    """Shades for changes, evenly spaced in their logarithms.

    Attributes:
        low: the least change that is not 0.
        high: the greatest.
    """

    low: float
    high: float

    @classmethod
    def of(cls, units: Iterable[UnitHistory]) -> DriftScale | None:
        """Return the scale for all changes of some units; None if nothing is known to have moved."""
        changes = [drift for unit in units for drift in unit.drift if drift]
        return cls(min(changes), max(changes)) if changes else None

    def look(self, change: float) -> str:
        """Return a change's class."""
        span = math.log(self.high / self.low)
        place = math.log(change / self.low) / span if span > 1e-9 else 1.0
        return f"d{min(_DRIFTS, 1 + int(place * _DRIFTS))}"

    def key(self) -> list[tuple[str, str]]:
        """Return the classes and what they mean."""
        if self.high / self.low < 1.0 + 1e-9:
            return [(f"d{_DRIFTS}", change_of(self.low))]
        edges = [self.low * (self.high / self.low) ** (i / _DRIFTS) for i in range(_DRIFTS + 1)]
        spans = pairwise(edges)
        return [(f"d{i + 1}", f"{change_of(a)} to {change_of(b)}") for i, (a, b) in enumerate(spans)]


def drift_rows(report: Report, kind: str, fold: Fold, scale: DriftScale) -> list[Row]:
    """Return for each layer of a kind how far it moved, where it was written anew."""
    spans = dict(scale.key())

    def cell(units: Sequence[UnitHistory], column: range) -> Cell | None:
        there = [(unit, save) for unit in units for save in column if unit.saves[save] is not None]
        if not there:
            return None
        known = [drift for unit, save in there if (drift := unit.drift[save]) is not None]
        if known:
            change = max(known)
            if not change:
                return Cell("rest", "carried, or unchanged", "written anew, and did not change")
            look = scale.look(change)
            return Cell(look, f"changed by {spans[look]}", f"changed by {change_of(change)}")
        if all(unit.saves[save] for unit, save in there):
            return Cell("rest", "carried, or unchanged", "carried")
        return Cell("unknown", "nothing to compare it with", "written anew; there is nothing to compare it with")

    return _rows(report, kind, fold, cell)


def change_of(change: float) -> str:
    """Write a relative change."""
    if change >= 1000:
        return f"{100 * change:.3g} %"
    return "0" if not change else f"{100 * change:.2g} %" if change < 0.0995 else f"{100 * change:.0f} %"


def _rows(report: Report, kind: str, fold: Fold, cell: Draw) -> list[Row]:
    units = [unit for unit in report.units if unit.kind == kind]
    rows: list[Row] = []
    for start in range(0, len(units), fold.layers):
        group = units[start : start + fold.layers]
        name = group[0].layer if len(group) == 1 else f"{group[0].layer} … {group[-1].layer}"
        rows.append((name, [cell(group, column) for column in fold.columns]))
    return rows
