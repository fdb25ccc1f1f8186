"""Tables of a report: what its charts show, in numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tailor_dcp.amounts import counted, lasting, moment, percent, size
from tailor_dcp.report import Report, UnitHistory
from tailor_dcp.report_charts import short, text
from tailor_dcp.report_maps import alike
from tailor_dcp.units import WEIGHT

_ROWS = 1000
"""Rows of a table; what is beyond is only in the JSON."""
_CELLS = 4000
"""Cells of the table of origins, which is left out where there would be more."""
_NAME = 120

Row = tuple[str, Sequence[str]]


def saves_table(report: Report) -> str:
    """Return a table with a row each checkpoint."""
    kinds = report.kinds
    heads = (
        "checkpoint", "saved", "took", "written", "of full", "alone", "shared", "dead", "removing it frees",
        *(f"{_kind(kind)}, most behind" for kind in kinds[:6]),
    )  # fmt: skip
    rows = [
        (
            f"{save.name}{' (left behind)' if save.left else ''}",
            (
                moment(save.time), lasting(save.seconds), size(save.written), percent(save.written, save.full),
                size(save.alone), size(save.shared), size(save.dead), size(save.frees),
                *(_steps(save.behind.get(kind)) for kind in kinds[:6]),
            ),
        )
        for save in report.saves
    ]  # fmt: skip
    return _table("Each checkpoint", heads, rows)


def units_table(report: Report, change_of: Callable[[float], str]) -> str:
    """Return a table with a row each unit."""
    heads = ("layer", "kind", "bytes", "written", "oldest", "newest values of step", "moved last", "moved most")
    rows = [(unit.layer, _unit(unit, change_of)) for unit in report.units]
    return _table("Each layer and kind", heads, rows)


def origins_table(report: Report) -> str:
    """Return tables of the steps whose values each layer has, of runs that are small enough."""
    groups = alike(report)
    cells = sum(len(report.saves) for unit in report.units if any(unit.kind == kinds[0] for kinds in groups))
    if cells > _CELLS:
        return ""
    heads = ("layer", *(save.name for save in report.saves))
    return "".join(
        _table(
            f"The step whose values each layer has: {', '.join(_kind(kind) for kind in kinds)}",
            heads,
            [
                (unit.layer, ["-" if origin is None else str(origin) for origin in unit.origins])
                for unit in report.units
                if unit.kind == kinds[0]
            ],
        )
        for kinds in groups
    )


def _unit(unit: UnitHistory, change_of: Callable[[float], str]) -> tuple[str, ...]:
    there = [age for age in unit.saves if age is not None]
    drifts = [drift for drift in unit.drift if drift is not None]
    origins = [origin for origin in unit.origins if origin is not None]
    return (
        _kind(unit.kind),
        size(unit.bytes),
        f"{sum(age == 0 for age in there)} of {counted(len(there), 'save')}",
        counted(max(there, default=0), "save"),
        str(origins[-1]) if origins else "-",
        change_of(drifts[-1]) if drifts else "-",
        change_of(max(drifts)) if drifts else "-",
    )


def _steps(behind: tuple[float, int] | None) -> str:
    return "-" if behind is None else "fresh" if not behind[1] else counted(behind[1], "step")


def _kind(kind: str) -> str:
    return "weights" if kind == WEIGHT else kind


def _table(title: str, heads: Sequence[str], rows: Iterable[Row]) -> str:
    rows = list(rows)
    head = "".join(f'<th scope="col">{text(short(name, _NAME))}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{text(short(name, _NAME))}</th>'
        f"{''.join(f'<td>{text(short(cell, _NAME))}</td>' for cell in cells)}</tr>\n"
        for name, cells in rows[:_ROWS]
    )
    more = f"<p>{counted(len(rows) - _ROWS, 'more row')} in the JSON.</p>" if len(rows) > _ROWS else ""
    return (
        f'<details><summary>{text(title[:300])}</summary><div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>{more}</details>"
    )
