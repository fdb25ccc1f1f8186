"""``tailor diff``: how far each unit moved between two checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tailor_dcp.cli.output import console, print_json, say
from tailor_dcp.cli.progress import progress_bar
from tailor_dcp.diff import Diff, UnitDiff
from tailor_dcp.diff import diff as diff_checkpoints

_SHOWN = 5


def diff(
    a: Annotated[str, typer.Argument(help="The earlier checkpoint, or RUN@STEP.")],
    b: Annotated[str, typer.Argument(help="The later checkpoint, or RUN@STEP.")],
    plot: Annotated[Path | None, typer.Option(help="Also draw it: a .png, .svg or .pdf file.")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="A class, as module.Class, that may be unpickled.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show per layer and kind: relative change, cosine, share of elements changed.

    Formats may differ: a DCP checkpoint against a Hugging Face or a ZeRO one. What both have from one save is not read.
    """
    with progress_bar("comparing", of_bytes=False) as progress:
        found = diff_checkpoints(a, b, progress, tuple(allow or ()))
    if plot:
        # Drawing needs a package that comparing does not.
        from tailor_dcp.diff_plot import draw  # noqa: PLC0415

        draw(found, plot)
    if as_json:
        print_json(found.to_dict())
    else:
        _show(found)


def _show(found: Diff) -> None:
    table = Table(title=escape(f"{found.a} → {found.b}"), title_justify="left", header_style="bold", pad_edge=False)
    for name in ("layer", "kind", "relative change", "cosine", "elements changed", ""):
        table.add_column(name, justify="left" if name in ("layer", "kind", "") else "right")
    layer = ""
    for unit in found.units:
        table.add_row(*_cells(unit, unit.layer == layer), style="dim" if unit.carried else "")
        layer = unit.layer
    console().print(table)
    for what, names in (
        (f"only in {found.a}", found.only_a),
        (f"only in {found.b}", found.only_b),
        ("of other shapes, not compared", found.reshaped),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            say(f"{what}: {', '.join(names[:_SHOWN])}{more}")


def _cells(unit: UnitDiff, repeated: bool) -> list[str]:
    return [
        "" if repeated else escape(unit.layer),
        escape(unit.kind),
        _number(unit.relative),
        "-" if unit.cosine is None else f"{unit.cosine:.6f}",
        f"{100 * unit.changed:.1f} %",
        "carried: one save's bytes" if unit.carried else "",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else "0" if not value else f"{value:.3e}" if value < 1e-3 else f"{value:.4f}"
