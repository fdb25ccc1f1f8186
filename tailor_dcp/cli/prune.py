"""``tailor prune``: remove the checkpoints of a run that no rule keeps."""

from __future__ import annotations

import re
import time
from collections import Counter
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tailor_dcp.amounts import counted, lasting, percent
from tailor_dcp.cli.output import console, print_json, say, size
from tailor_dcp.cli.progress import progress_bar
from tailor_dcp.prune import DEAD_SHARE, METRIC, Pruning, Verdict
from tailor_dcp.prune import prune as prune_run
from tailor_dcp.retention import Mode

_SAVE_ID = re.compile(r"/[0-9a-f]{32}/")
_STYLES = {"keep": "", "strip": "yellow", "remove": "red"}


def prune(
    run: Annotated[str, typer.Argument(help="A run's folder, whose sub-folders are its checkpoints.")],
    keep_last: Annotated[int | None, typer.Option(help="Keep as many, counted in the order of saving.")] = None,
    keep_every: Annotated[int | None, typer.Option(help="Keep those whose step is a multiple.")] = None,
    keep_best: Annotated[
        int | None, typer.Option(help="Keep as many of the best by a metric, and what has no value yet.")
    ] = None,
    keep_within: Annotated[
        str | None, typer.Option(metavar="TIME", help="Keep what was saved at most so long ago: 90min, 12h, 7d, 2w.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Where the metric is: JSON lines, JSON, CSV or a trainer_state.json."),
    ] = None,
    metric: Annotated[str, typer.Option(help="What it is called there.")] = METRIC,
    mode: Annotated[Mode, typer.Option(help="Whether its lowest values are the best, or its highest.")] = "min",
    compact: Annotated[
        bool, typer.Option("--compact", help="Rewrite data files that are mostly dead, so that the disk is freed.")
    ] = False,
    threshold: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help=f"Compact with another share than {DEAD_SHARE} that may be dead."),
    ] = None,
    idle: Annotated[
        bool, typer.Option("--idle", help="No save is under way: also compact what one could refer to.")
    ] = False,
    incomplete: Annotated[
        bool,
        typer.Option("--incomplete", help="Also remove what was not committed, or was cut off, and is not at work."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Remove checkpoints that no rule keeps, and no byte that a kept one needs.

    The newest checkpoint and whatever a save under way may need always stay.
    """
    with progress_bar("pruning", of_bytes=False) as progress:
        done = prune_run(
            run,
            keep_last,
            keep_every,
            keep_best,
            keep_within,
            metrics=metrics,
            metric=metric,
            mode=mode,
            compact=compact if threshold is None else threshold,
            idle=idle,
            incomplete=incomplete,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        print_json(done.to_dict())
    else:
        _show(done)


def _show(done: Pruning) -> None:
    table = Table(title=escape(done.run), title_justify="left", header_style="bold", pad_edge=False)
    for name in ("checkpoint", "what", "size", "freed", "why"):
        table.add_column(name, justify="right" if name in ("size", "freed") else "left", overflow="fold")
    for verdict in done.verdicts:
        freed = size(verdict.freed) if verdict.freed or verdict.action != "keep" else ""
        why = escape("; ".join(_reasons(verdict)))
        what = verdict.action
        table.add_row(escape(verdict.name), what, size(verdict.bytes), freed, why, style=_STYLES[verdict.action])
    console().print(table)
    _show_rewrites(done)
    count = Counter(verdict.action for verdict in done.verdicts)
    say(
        f"{'would free' if done.dry_run else 'freed'} {size(done.freed)}: {count['remove']} removed, {count['strip']} "
        f"stripped to what others refer to, {count['keep']} kept"
    )


def _reasons(verdict: Verdict) -> list[str]:
    if verdict.written is None:
        return list(verdict.why)
    first, *rest = verdict.why
    return [f"{first} (last written {lasting(max(0.0, time.time() - verdict.written))} ago)", *rest]


def _show_rewrites(done: Pruning) -> None:
    if not done.rewrites:
        return
    title = "Data files that are mostly dead"
    table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False)
    for name in ("file", "size", "needed", "dead", "freed", "why"):
        table.add_column(name, justify="left" if name in ("file", "why") else "right", overflow="fold")
    for one in done.rewrites:
        dead = percent(one.before - one.after, one.before)
        need = "needs" if one.checkpoints == 1 else "need"
        why = one.why_not or f"{counted(one.checkpoints, 'checkpoint')} {need} the rest"
        file, freed = _SAVE_ID.sub("/…/", one.file), "" if one.why_not else size(one.freed)
        table.add_row(escape(file), size(one.before), size(one.after), dead, freed, escape(why))
    console().print(table)
