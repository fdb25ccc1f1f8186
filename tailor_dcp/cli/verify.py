"""``tailor verify``: check every byte that checkpoints need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tailor_dcp.amounts import counted, lasting
from tailor_dcp.cli.output import console, print_json, say, size
from tailor_dcp.cli.progress import progress_bar
from tailor_dcp.errors import TailorError
from tailor_dcp.store_path import place
from tailor_dcp.verify import Finding, RepairPlan, Verification, repair_plans
from tailor_dcp.verify import verify as verify_bytes
from tailor_dcp.verifying.plan_files import check_target, remove_earlier, write

_BAD = 1
_MOST = 40
"""Rows of a table; what a broken disk leaves can be a hundred thousand."""
_STYLES = {"damaged": "red", "unverifiable": "yellow"}


def verify(
    path: Annotated[str, typer.Argument(help="A checkpoint, or a run, whose checkpoints are all checked; or a URL.")],
    threads: Annotated[int | None, typer.Option(min=1, help="That read; by default as many as help.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="What cannot be checked is bad, too.")] = False,
    repair: Annotated[
        Path | None,
        typer.Option(
            "--repair-plan", metavar="FILE", help="Write a recipe that `tailor merge` makes a loadable state of."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Check that every file is there, and every byte the one that was written.

    Exit code 1 means that something is damaged, or with --strict that something has no checksum; 2 that something
    could not be read, so that it may be damaged.
    """
    earlier = _prepared(repair, path)
    with progress_bar("verifying") as progress:
        found = verify_bytes(path, threads=threads, progress=progress)
    plans: tuple[RepairPlan, ...] = ()
    if repair is not None:
        with progress_bar("looking for what is damaged in others") as progress:
            plans = repair_plans(found, threads=threads, progress=progress)
    written = write(plans, repair) if repair is not None else []
    if as_json:
        repairs = [{**one.to_dict(), "file": file and str(file)} for one, file in zip(plans, written, strict=True)]
        print_json({**found.to_dict(), **({"repair": repairs} if repair is not None else {})})
    else:
        _show(found)
        _show_plans(plans, written)
        for file in earlier:
            if file not in written:
                say(f"removed {file}, the plan of an earlier verification")
    code = _exit_code(found, strict)
    if code:
        raise typer.Exit(code)


def _prepared(repair: Path | None, path: str) -> list[Path]:
    """Make room for the plans before all is read in vain; return the earlier ones that were removed."""
    if repair is None:
        return []
    try:
        check_target(repair)
    except TailorError as error:
        raise typer.BadParameter(str(error), param_hint="--repair-plan") from error
    return remove_earlier(repair, place(path))


def _exit_code(found: Verification, strict: bool) -> int:
    if found.state == "damaged":
        return _BAD
    if found.undecided:
        return TailorError.exit_code
    return _BAD if strict and found.state == "unverifiable" else 0


def _show(found: Verification) -> None:
    shown = sorted((*found.damaged, *found.unverifiable), key=_rank)
    if shown:
        table = Table(title=escape(found.path), title_justify="left", header_style="bold", pad_edge=False)
        for name, justify in (("checkpoint", "left"), ("layer", "left"), ("kind", "left"), ("bytes", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        table.add_column("what", overflow="fold")
        for finding in shown[:_MOST]:
            table.add_row(*_cells(finding), style="magenta" if finding.undecided else _STYLES[finding.state])
        console().print(table)
    if len(shown) > _MOST:
        say(f"and {len(shown) - _MOST:,} more; --json has all of them")
    for note in found.notes:
        say(f"note: {note}")
    say(_summary(found))


def _rank(finding: Finding) -> int:
    return 0 if finding.state == "damaged" else 1 if finding.undecided else 2


def _cells(finding: Finding) -> tuple[str, ...]:
    return (
        escape(finding.checkpoint),
        escape(finding.layer or ""),
        escape(finding.kind or ""),
        size(finding.bytes) if finding.blobs else "",
        escape(finding.what),
    )


def _summary(found: Verification) -> str:
    states = [verdict.state for verdict in found.checkpoints]
    rate = f", {size(found.bytes / found.seconds)}/s" if found.bytes and found.seconds else ""
    read = (
        f"{counted(len(states), 'checkpoint')}, {counted(found.files, 'file')}, {counted(found.blobs, 'blob')}, "
        f"{size(found.bytes)} read in {lasting(found.seconds)}{rate}"
    )
    bad, names = states.count("damaged"), list(dict.fromkeys(finding.checkpoint for finding in found.undecided))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    untried = f"not all of {names[0]}{more} could be read, or told from what is right" if names else ""
    if bad:
        return f"DAMAGED: {bad} of {read}{f'; {untried}' if names else ''}"
    if names:
        return f"UNDECIDED: {untried}; nothing is known to be damaged: {read}"
    untold = sum(verdict.unverifiable_bytes for verdict in found.checkpoints)
    if found.unverifiable:
        what = f"{size(untold)} and" if untold else ""
        several = counted(states.count("unverifiable"), "checkpoint's", "checkpoints'")
        what = f"{what} what the table shows of {several} metadata or files has no checksum".strip()
        return f"nothing is damaged, but not all can be checked ({what}): {read}"
    return f"good: {read}"


def _show_plans(plans: Sequence[RepairPlan], written: Sequence[Path | None]) -> None:
    for made, file in zip(plans, written, strict=True):
        for line in made.lines():
            say(line)
        if file is not None:
            say(f"written to {file}: tailor merge {quote(str(file))} OUT")
