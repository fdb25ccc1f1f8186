"""Charts of a report: SVG made of strings. All charts of a page share one axis, the checkpoints."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

_BAD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
_PLOT, _HALF_PLOT = 960.0, 390.0
_FEW = 20
"""Columns that fit into half a page."""
_WIDEST, _NARROWEST_GAP = 44.0, 4.0
_LETTER = 6.3
"""Width of a letter of a label, in pixels."""
_GUTTER = (64.0, 200.0)
_DENSE = 4000
"""Cells beyond which those of a row that look the same are drawn as one: a mark for each would be megabytes."""
_HEIGHT, _TOP, _AXIS = 150.0, 18.0, 24.0
_MAP_TOP = 13.0


def text(raw: object) -> str:
    """Return any text as HTML that shows it and does nothing else: names come from files that anybody may have made.

    Characters that HTML forbids, and those that turn the order of others round, show as replacements.
    """
    known = str(raw).encode("utf-8", "replace").decode("utf-8")
    return html.escape(_BAD.sub("\ufffd", known), quote=True)


def short(name: str, most: int = 30) -> str:
    """Cut the front of a name that is too long: its end tells layers apart."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


@dataclass(frozen=True)
class Frame:
    """Where the columns of all charts are.

    Attributes:
        labels: what each column is called: its step, or its steps.
        breaks: the columns before which the run went back.
        left: which columns the run went back behind later on.
        gutter: the pixels left of the first column.
        cell: the width of a column in pixels.
    """

    labels: Sequence[str]
    breaks: frozenset[int]
    left: Sequence[bool]
    gutter: float
    cell: float

    @classmethod
    def of(cls, labels: Sequence[str], breaks: frozenset[int], left: Sequence[bool], names: Sequence[str]) -> Frame:
        """Return a frame that has room for the names of rows."""
        widest = max((len(short(name)) for name in names), default=0)
        gutter = min(max(widest * _LETTER + 14, _GUTTER[0]), _GUTTER[1])
        plot = _HALF_PLOT if len(labels) <= _FEW else _PLOT
        return cls(labels, breaks, left, gutter, min(_WIDEST, plot / max(1, len(labels))))

    @property
    def right(self) -> float:
        """Where the last column ends."""
        return self.gutter + self.cell * len(self.labels)

    def x(self, column: float) -> float:
        """Return where a column begins."""
        return self.gutter + self.cell * column


@dataclass(frozen=True)
class Cell:
    """A cell of a map.

    Attributes:
        look: its class.
        state: what all cells of its look have in common.
        detail: what it is.
    """

    look: str
    state: str
    detail: str


@dataclass(frozen=True)
class Line:
    """A line of a chart, with a fainter one for the most.

    Attributes:
        look: its class.
        name: what it is.
        means: its values; None where there is none.
        mosts: those of the fainter one.
    """

    look: str
    name: str
    means: Sequence[float | None]
    mosts: Sequence[float | None]


def heat_map(frame: Frame, what: str, rows: Sequence[tuple[str, Sequence[Cell | None]]]) -> str:
    """Draw a map: a row each layer, a column each checkpoint."""
    height = 18.0 if len(rows) <= 30 else 13.0 if len(rows) <= 60 else 9.0
    dense = len(rows) * len(frame.labels) > _DENSE
    parts = []
    for number, (name, cells) in enumerate(rows):
        y = _MAP_TOP + (number + 0.5) * height
        size = ' class="tiny"' if height < 12 else ""
        parts.append(
            f'<text{size} x="{_n(frame.gutter - 8)}" y="{_n(y)}" text-anchor="end" dominant-baseline="central">'
            f"<title>{text(name[:400])}</title>{text(short(name))}</text>"
        )
        parts.append(f'<g class="row" stroke-width="{_n(height - 1)}">')
        parts += _marks(frame, name, y, cells, dense)
        parts.append("</g>")
    end = _MAP_TOP + len(rows) * height
    return _svg(frame, what, end, [*parts, *_breaks(frame, end), *_ticks(frame, end)])


def bars(
    frame: Frame,
    what: str,
    stacks: Sequence[Sequence[tuple[str, float]]],
    titles: Sequence[str],
    unit: Callable[[float], str],
    ghosts: Sequence[float] = (),
    tops: Sequence[str] = (),
) -> str:
    """Draw a bar each checkpoint.

    Args:
        frame: where the columns are.
        what: what is drawn, for those who do not see it.
        stacks: of each bar its parts from below, as class and height.
        titles: what each bar tells.
        unit: writes a number of the scale.
        ghosts: outlines behind the bars, such as what full saves would take.
        tops: what is written above each bar, where there is room.
    """
    most = max([sum(value for _, value in stack) for stack in stacks] + list(ghosts), default=0.0)
    assert math.isfinite(most), "numbers are checked where they are read"
    scale, parts = _grid(frame, most, unit)
    for number, stack in enumerate(stacks):
        x, width = frame.x(number) + 0.12 * frame.cell, 0.76 * frame.cell
        parts.append(f"<g><title>{text(titles[number])}</title>")
        if ghosts:
            top = scale(ghosts[number])
            parts.append(_rect("ghost", x, top, width, _TOP + _HEIGHT - top))
        below = 0.0
        for look, value in stack:
            low, high = scale(below), scale(below + value)
            parts.append(_rect(look, x, high, width, low - high))
            below += value
        parts.append(_rect("clear", frame.x(number), _TOP, frame.cell, _HEIGHT) + "</g>")
        if tops and frame.cell >= 28:
            y = scale(max(below, ghosts[number] if ghosts else 0.0)) - 5
            parts.append(
                f'<text class="small" x="{_n(x + width / 2)}" y="{_n(y)}" text-anchor="middle">'
                f"{text(tops[number])}</text>"
            )
    end = _TOP + _HEIGHT
    return _svg(frame, what, end, [*parts, *_breaks(frame, end), *_ticks(frame, end)])


def lines(frame: Frame, what: str, drawn: Sequence[Line], unit: Callable[[float], str]) -> str:
    """Draw lines over the checkpoints: solid for the mean, fainter and dashed for the most."""
    values = [v for line in drawn for v in (*line.means, *line.mosts) if v is not None]
    scale, parts = _grid(frame, max(values, default=0.0), unit)
    for line in drawn:
        for look, points in (("most", line.mosts), ("mean", line.means)):
            places = [(frame.x(i + 0.5), scale(v)) for i, v in enumerate(points) if v is not None]
            path = "L".join(f"{_n(x)} {_n(y)}" for x, y in places)
            if places:
                parts.append(f'<path class="line {look} {line.look}" d="M{path}"/>')
        for i, (mean, most) in enumerate(zip(line.means, line.mosts, strict=True)):
            if mean is not None and most is not None:
                told = f"{line.name}, {_called(frame, i)}: {unit(mean)} behind on average, {unit(most)} at most"
                parts.append(
                    f'<circle class="{line.look}" cx="{_n(frame.x(i + 0.5))}" cy="{_n(scale(mean))}" '
                    f'r="{_n(min(3.5, max(1.2, frame.cell / 4)))}"><title>{text(told)}</title></circle>'
                )
    end = _TOP + _HEIGHT
    return _svg(frame, what, end, [*parts, *_breaks(frame, end), *_ticks(frame, end)])


def _marks(frame: Frame, row: str, y: float, cells: Sequence[Cell | None], dense: bool) -> Iterator[str]:
    """Yield a row's cells: each on its own, or in a dense map all of one look as one."""
    gap = 1.0 if frame.cell >= _NARROWEST_GAP else 0.0
    width, row = _n(frame.cell - gap), short(row, 60)
    looks: dict[str, list[tuple[int, Cell]]] = {}
    for number, cell in enumerate(cells):
        if cell:
            looks.setdefault(cell.look if dense else str(number), []).append((number, cell))
    for members in looks.values():
        first, cell = members[0]
        path = "".join(f"M{_n(frame.x(number))} {_n(y)}h{width}" for number, _ in members)
        told = f"{row}: {cell.state}" if dense else f"{row}, {_called(frame, first)}: {cell.detail}"
        yield f'<path class="{cell.look}" d="{path}"><title>{text(told)}</title></path>'


def _called(frame: Frame, column: int) -> str:
    label = frame.labels[column]
    gone = ", left behind" if frame.left[column] else ""
    return f"{label if not label[:1].isdigit() else f'step {label}'}{gone}"


def _grid(frame: Frame, most: float, unit: Callable[[float], str]) -> tuple[Callable[[float], float], list[str]]:
    step = _nice(most / 3) if most > 0 else 1.0
    top = max(step, math.ceil(most / step - 1e-9) * step)

    def scale(value: float) -> float:
        return _TOP + _HEIGHT * (1 - min(1.0, max(0.0, value / top)))

    parts = []
    for number in range(round(top / step) + 1):
        y = scale(number * step)
        parts.append(f'<path class="grid" d="M{_n(frame.gutter)} {_n(y)}H{_n(frame.right)}"/>')
        parts.append(
            f'<text class="small" x="{_n(frame.gutter - 8)}" y="{_n(y)}" text-anchor="end" '
            f'dominant-baseline="central">{text(unit(number * step))}</text>'
        )
    return scale, parts


def _nice(value: float) -> float:
    """Return the least 1, 2 or 5 times a power of ten that is not smaller."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


def _ticks(frame: Frame, y: float) -> Iterator[str]:
    widest = max(len(label) for label in frame.labels) * _LETTER + 10
    stride = math.ceil(widest / frame.cell)
    for number in range(0, len(frame.labels), stride):
        yield (
            f'<text class="small" x="{_n(frame.x(number + 0.5))}" y="{_n(y + 14)}" text-anchor="middle">'
            f"{text(frame.labels[number])}</text>"
        )


def _breaks(frame: Frame, end: float) -> Iterator[str]:
    """Draw where the run went back, and veil what it left behind."""
    for number, gone in enumerate(frame.left):
        if gone:
            yield f'<g class="gone">{_rect("clear", frame.x(number), 4, frame.cell, 8)}</g>'
    for number in sorted(frame.breaks):
        x = _n(frame.x(number))
        yield f'<path class="back" d="M{x} 4V{_n(end)}"><title>Here the run went back.</title></path>'


def _rect(look: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{look}" x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(max(0.0, height))}"/>'


def _svg(frame: Frame, what: str, end: float, parts: Sequence[str]) -> str:
    width, height = _n(frame.right + 24), _n(end + _AXIS)
    return (
        f'<svg role="img" aria-label="{text(what)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _n(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")
