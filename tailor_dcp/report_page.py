"""The page of a report: one HTML file with its style and its charts in it, no script, and nothing to load.

A policy in its head (``Content-Security-Policy``) forbids scripts and requests besides: layers' and folders' names come
from files that anybody may have made.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import PurePath

from tailor_dcp.amounts import lasting, moment, percent, size
from tailor_dcp.report import Report, SaveView
from tailor_dcp.report_charts import Frame, Line, bars, heat_map, lines, text
from tailor_dcp.report_file import START
from tailor_dcp.report_head import head, notes, shown
from tailor_dcp.report_maps import (
    DriftScale,
    Fold,
    alike,
    change_of,
    drift_rows,
    frame_of,
    oldest,
    origin_rows,
    shades,
)
from tailor_dcp.report_tables import origins_table, saves_table, units_table

_MAPS = 6
"""Maps of one sort; a run with more kinds is told of in the tables."""
_COLOURS = 4
_HALF = 560
"""Pixels that half a page has for a chart."""

_FORBIDDING = "default-src 'none'; img-src data:; style-src"

Key = Sequence[tuple[str, str]]


def page(report: Report) -> str:
    """Return the page. Its size is bounded: large runs are folded, as it then says."""
    fold = Fold.of(report)
    frame = frame_of(report, fold)
    style = files("tailor_dcp").joinpath("report.css").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    name = PurePath(report.run.rstrip("/")).name or report.run
    small = [tell(report, frame, fold) for tell in (_bytes, _staleness, _disk, _times)]
    body = "\n".join(
        (
            head(report, name),
            notes(report),
            _origins(report, frame, fold),
            # Where there are few checkpoints, two charts fit beside each other.
            f'<div class="{"pairs" if frame.right < _HALF else "stack"}">{"".join(small)}</div>',
            _drift(report, frame, fold),
            _tables(report),
        )
    )
    return f"""{START}
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_FORBIDDING} 'sha256-{digest}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{text(name)}: checkpoints</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
<footer>{_folded(fold)}Hold the pointer over a mark to read it. All data as JSON: <code>tailor report RUN --json</code>.
</footer>
</main>
</body>
</html>
"""


def _folded(fold: Fold) -> str:
    parts = []
    if fold.saves > 1:
        parts.append(f"{fold.saves} checkpoints share a column (bars show their mean, maps what is stalest)")
    if fold.layers > 1:
        parts.append(f"{fold.layers} layers share a row (what is stalest, or moved most)")
    return f"This run is large: {' and '.join(parts)}. " if parts else ""


# Sections ----------------------------------------------------------------------------------


def _section(title: str, words: str, *parts: str) -> str:
    return f'<section>\n<h2>{text(title)}</h2>\n<p class="soft">{words}</p>\n{"".join(parts)}\n</section>'


def _figure(chart: str, title: str = "") -> str:
    heading = f"<h3>{text(title)}</h3>" if title else ""
    return f'<figure>{heading}<div class="scroll">{chart}</div></figure>'


def _figures(figures: Iterable[str]) -> str:
    return f'<div class="figures">{"".join(figures)}</div>'


def _key(meanings: Key) -> str:
    return f'<ul class="key">{"".join(f"<li><i class={look}></i>{text(what)}</li>" for look, what in meanings)}</ul>'


def _ramp(scale: DriftScale) -> str:
    """Return the key of a scale: its shades in a row between its ends; the pointer tells each one's span."""
    shades = "".join(f'<i class="{look}" title="{text(span)}"></i>' for look, span in scale.key())
    low, high = change_of(scale.low), change_of(scale.high)
    ends = (
        (f"<span>{text(low)}</span>", f"<span>{text(high)}</span>")
        if low != high
        else ("", f"<span>{text(high)}</span>")
    )
    rest = (("rest", "carried, or unchanged"), ("unknown", "nothing to compare it with"))
    return (
        f'<ul class="key"><li class="ramp">{ends[0]}{shades}{ends[1]}</li>'
        f"{''.join(f'<li><i class={look}></i>{what}</li>' for look, what in rest)}</ul>"
    )


def _origins(report: Report, frame: Frame, fold: Fold) -> str:
    groups = alike(report)
    figures = []
    for kinds in groups[:_MAPS]:
        rows = origin_rows(report, kinds[0], fold)
        figures.append(_figure(heat_map(frame, f"How old {shown(kinds)} are", rows), shown(kinds)[:200]))
    most = oldest(report)
    words = (
        "A row is a layer, a column a checkpoint, named by its step. Blue cells were written by that save; the others "
        "hold the values of an earlier one."
        if most
        else "A row is a layer, a column a checkpoint, named by its step. Every save wrote everything."
    )
    if any(
        (save.policy or "").startswith("unchanged+") or "|unchanged+" in (save.policy or "") for save in report.saves
    ):
        words += " With an <code>unchanged</code> policy, what is old may also be what has not changed since."
    if len(groups) > _MAPS:
        words += f" {len(groups) - _MAPS} more kinds are in the tables below."
    key: Key = shades(most)
    if any(frame.left):
        key = [*key, ("gone", "the run went back behind it")]
    return _section("Where each layer's values come from", words, _figures(figures), _key(key), origins_table(report))


def _bytes(report: Report, frame: Frame, fold: Fold) -> str:
    def told(save: SaveView) -> str:
        return f"{save.name}: {size(save.written)} written, {percent(save.written, save.full)} of {size(save.full)}"

    written = _means(fold, [save.written for save in report.saves])
    full = _means(fold, [save.full for save in report.saves])
    tops = [f"{100 * a / b:.0f} %" if b else "" for a, b in zip(written, full, strict=True)]
    chart = bars(
        frame,
        "Bytes that each save wrote beside a full save",
        [[("written", value)] for value in written],
        _titles(report, fold, told),
        size,
        full,
        tops,
    )
    words = f"{size(report.written)} instead of {size(report.full)}: {percent(report.written, report.full)}."
    key = _key([("written", "written"), ("ghost", "what a full save takes")])
    return _section("Bytes of each save", words, _figure(chart), key)


def _staleness(report: Report, frame: Frame, fold: Fold) -> str:
    groups: dict[tuple[tuple[float, int] | None, ...], list[str]] = {}
    for kind in report.kinds:
        groups.setdefault(tuple(save.behind.get(kind) for save in report.saves), []).append(kind)
    drawn = []
    for number, (ages, kinds) in enumerate(list(groups.items())[:_COLOURS]):
        means = _means(fold, [age[0] if age else None for age in ages])
        most = _most(fold, [float(age[1]) if age else None for age in ages])
        drawn.append(Line(f"k{number}", shown(kinds), means, most))
    title = "How far each kind lags behind"
    if not any(value for line in drawn for value in line.mosts):
        return _section(title, "Nothing lags behind: every checkpoint has the values of its own step throughout.")
    chart = lines(frame, "Steps by which each kind lags behind", drawn, lambda steps: f"{steps:,.0f} steps")
    key = _key([(line.look, line.name) for line in drawn])
    words = (
        "In steps: what a run that resumes from each checkpoint goes back to. Solid: the mean over the kind's bytes; "
        "dashed: its stalest unit."
    )
    return _section(title, words, _figure(chart), key)


def _drift(report: Report, frame: Frame, fold: Fold) -> str:
    title = "How far each layer moved"
    scales = {kind: DriftScale.of(u for u in report.units if u.kind == kind) for kind in report.kinds}
    if report.drift_from is None or not any(scales.values()):
        nothing = (
            "Of no layer is it known that it moved."
            if report.drift_from
            else "The records do not tell: only policies that look at drift keep sketches of the values. "
            '<code class="cmd">tailor report RUN --drift</code> compares the tensors themselves.'
        )
        return _section(title, nothing)
    how = (
        "The tensors themselves were compared."
        if report.drift_from == "tensors"
        else "Estimated from the sketches in the records, a few elements of each tensor."
    )
    words = (
        f"Relative change |w − w_before| / |w_before| of what a save wrote anew, against what the checkpoint before "  # noqa: RUF001
        f"it held; for a layer that is written every fifth time, the change over five saves. {how}"
    )
    figures = []
    for kind, scale in list(scales.items())[:_MAPS]:
        if scale:
            chart = heat_map(frame, f"How far {shown([kind])} moved", drift_rows(report, kind, fold, scale))
            figures.append(f'<div class="narrow">{_figure(chart, shown([kind])[:200])}{_ramp(scale)}</div>')
    return _section(title, words, _figures(figures))


def _disk(report: Report, frame: Frame, fold: Fold) -> str:
    def told(save: SaveView) -> str:
        return (
            f"{save.name}: {size(save.alone)} alone, {size(save.shared)} shared, {size(save.dead)} dead; removing it "
            f"frees {size(save.frees)}"
        )

    parts = [_means(fold, [getattr(save, look) for save in report.saves]) for look in ("alone", "shared", "dead")]
    stacks = [
        [("written", alone), ("shared", shared), ("dead", dead)] for alone, shared, dead in zip(*parts, strict=True)
    ]
    chart = bars(frame, "Bytes on disk of each checkpoint", stacks, _titles(report, fold, told), size)
    others = sum(other.bytes for other in report.others)
    beside = f" Folders that are no such checkpoints hold {size(others)} besides." if others else ""
    words = (
        f"All checkpoints together take {size(report.disk)}, each file counted once; {size(report.disk - report.dead)} "
        f"of it some checkpoint reads, {size(report.dead)} none does. {text(beside)}"
    )
    key = _key(
        [
            ("written", "in files that only this checkpoint has"),
            ("shared", "in files that others have as well"),
            ("dead", "dead: in its files, but not read by it"),
        ]
    )
    return _section("What each checkpoint holds on disk", words, _figure(chart), key)


def _times(report: Report, frame: Frame, fold: Fold) -> str:
    measured = any(save.seconds is not None for save in report.saves)
    values = [(save.seconds if measured else save.since) or 0.0 for save in report.saves]

    def told(save: SaveView) -> str:
        took = f", took {lasting(save.seconds)}" if save.seconds is not None else ""
        after = f", {lasting(save.since)} after the save before" if save.since is not None else ""
        return f"{save.name}: {moment(save.time)}{took}{after}"

    chart = bars(
        frame,
        "Seconds that each save took" if measured else "Time from one save to the next",
        [[("k2", max(0.0, value))] for value in _means(fold, values)],
        _titles(report, fold, told),
        lasting,
    )
    words = (
        "From planning to the commit."
        if measured
        else "No record tells how long saves took; this is from one to the next."
    )
    return _section("How long each save took" if measured else "Time between saves", words, _figure(chart))


def _tables(report: Report) -> str:
    return _section("In numbers", "The charts as tables.", saves_table(report), units_table(report, change_of))


# Folding -----------------------------------------------------------------------------------


def _means(fold: Fold, values: Sequence[float | None]) -> list[float]:
    return [sum(known) / len(known) if (known := _known(values, column)) else 0.0 for column in fold.columns]


def _most(fold: Fold, values: Sequence[float | None]) -> list[float | None]:
    return [max(_known(values, column), default=None) for column in fold.columns]


def _known(values: Sequence[float | None], column: range) -> list[float]:
    return [value for save in column if (value := values[save]) is not None]


def _titles(report: Report, fold: Fold, tell: Callable[[SaveView], str]) -> list[str]:
    ends = [(report.saves[column[0]], report.saves[column[-1]]) for column in fold.columns]
    return [tell(first) if first is last else f"{tell(first)} to {tell(last)}" for first, last in ends]
