"""``tailor report``: a whole run at a glance, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailor_dcp.amounts import counted, percent, size
from tailor_dcp.cli.output import print_json, say
from tailor_dcp.cli.progress import progress_bar
from tailor_dcp.report import Report
from tailor_dcp.report import report as report_run

_DEFAULT = Path("report.html")


def report(
    run: Annotated[str, typer.Argument(help="The run's folder, whose sub-folders are its checkpoints, or its URL.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page to write; report.html if not given.")
    ] = None,
    drift: Annotated[bool, typer.Option("--drift", help="Compare tensors to tell how far layers moved; slow.")] = False,
    series: Annotated[str, typer.Option(help="Where a step has several checkpoints, which: optimizer_0.")] = "",
    allow: Annotated[
        list[str] | None, typer.Option(help="A class, as module.Class, that may be unpickled for --drift.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON; a page only with --out.")] = False,
) -> None:
    """Draw where each layer's values come from, what each save wrote, and what is where on disk.

    The page is a single file that loads nothing and runs no script. Without --drift only metadata is read.
    """
    target = out or (None if as_json else _DEFAULT)
    with progress_bar("looking at checkpoints", of_bytes=False) as progress:
        found = report_run(run, target, drift=drift, series=series, progress=progress, allow=tuple(allow or ()))
    if as_json:
        print_json(found.to_dict())
    else:
        say(_summary(found, target or _DEFAULT))


def _summary(found: Report, target: Path) -> str:
    return (
        f"{target}: {counted(len(found.saves), 'checkpoint')}, {size(found.written)} written, "
        f"{percent(found.written, found.full)} of full saves; {size(found.disk)} on disk."
    )
