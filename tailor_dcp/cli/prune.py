"""``tailor prune``: remove the checkpoints of a run that no rule keeps."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tailor_dcp.cli.output import console, print_json, say, size
from tailor_dcp.cli.progress import progress_bar
from tailor_dcp.prune import Pruning
from tailor_dcp.prune import prune as prune_run

_STYLES = {"keep": "", "strip": "yellow", "remove": "red"}


def prune(
    run: Annotated[str, typer.Argument(help="A run's folder, whose sub-folders are its checkpoints.")],
    keep_last: Annotated[int | None, typer.Option(help="Keep as many, counted in the order of saving.")] = None,
    keep_every: Annotated[int | None, typer.Option(help="Keep those whose step is a multiple.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    incomplete: Annotated[
        bool, typer.Option("--incomplete", help="Also remove what was never committed and is older than the newest.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Remove checkpoints that no rule keeps, and no byte that a kept one needs.

    The newest checkpoint and whatever a save under way may need always stay.
    """
    with progress_bar("pruning", of_bytes=False) as progress:
        done = prune_run(run, keep_last, keep_every, dry_run, incomplete, progress)
    if as_json:
        print_json(done.to_dict())
    else:
        _show(done)


def _show(done: Pruning) -> None:
    table = Table(title=escape(done.run), title_justify="left", header_style="bold", pad_edge=False)
    for name in ("checkpoint", "what", "freed", "why"):
        table.add_column(name, justify="right" if name == "freed" else "left")
    for verdict in done.verdicts:
        freed = "" if verdict.action == "keep" else size(verdict.freed)
        why = escape("; ".join(verdict.why))
        table.add_row(escape(verdict.name), verdict.action, freed, why, style=_STYLES[verdict.action])
    console().print(table)
    count = Counter(verdict.action for verdict in done.verdicts)
    say(
        f"{'would free' if done.dry_run else 'freed'} {size(done.freed)}: {count['remove']} removed, {count['strip']} "
        f"stripped to what others refer to, {count['keep']} kept"
    )
