"""``tailor inspect``: what a checkpoint holds, where it comes from, and what it costs on disk."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tailor_dcp.cli.output import console, percent, print_json, say, size
from tailor_dcp.inspection import Inspection, UnitView
from tailor_dcp.inspection import inspect as inspect_checkpoint

_BAD = 1


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's folder, such as run/step-200, or its URL.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show per layer and kind: bytes, dtype, origin step, staleness, files.

    Exit code 1 means that files are missing: the checkpoint cannot be loaded.
    """
    found = inspect_checkpoint(checkpoint)
    if as_json:
        print_json(found.to_dict())
    else:
        _show(found)
    if found.missing:
        raise typer.Exit(_BAD)


def _show(found: Inspection) -> None:
    table = Table(title=escape(found.path), title_justify="left", header_style="bold", pad_edge=False)
    for name, justify in (
        ("layer", "left"),
        ("kind", "left"),
        ("bytes", "right"),
        ("dtype", "left"),
        ("from step", "right"),
        ("stale by", "right"),
        ("files", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    layer = ""
    for unit in found.units:
        table.add_row(*_cells(unit, unit.layer == layer), style="" if unit.stale_saves == 0 else "yellow")
        layer = unit.layer
    console().print(table)
    say(_summary(found))


def _cells(unit: UnitView, repeated: bool) -> list[str]:
    stale = "" if not unit.stale_saves else f"{unit.stale_saves} saves"
    if unit.stale_saves and unit.stale_steps is not None:
        stale = f"{unit.stale_steps} steps"
    return [
        "" if repeated else escape(unit.layer),
        escape(unit.kind),
        size(unit.bytes),
        ", ".join(unit.dtypes),
        "?" if unit.origin_step is None else str(unit.origin_step),
        stale,
        escape(_files(unit.files)),
    ]


def _files(files: tuple[str, ...]) -> str:
    return files[0] + (f" and {len(files) - 1} more" if len(files) > 1 else "") if files else ""


def _summary(found: Inspection) -> str:
    lines = [
        f"policy     {found.policy or 'none: a stock planner saved this'}",
        f"wrote      {size(found.written)}, {percent(found.written, found.full)} of a full save ({size(found.full)})",
        f"live       {size(found.live)} are read when this is loaded",
        f"pinned     {size(found.pinned)} are kept on disk in its files but never read",
        f"metadata   {size(found.metadata)}",
    ]
    if found.parent:
        lines.append(f"carries    from {found.parent} by {found.carry}")
    if found.linked:
        lines.append(
            f"linked     to {_files(found.linked)}: load it with tailor_dcp.LayerwiseReader, or make a plain copy with "
            f"`tailor materialize`"
        )
    stale = {kind: steps for kind, steps in found.stalest.items() if steps}
    lines.append("resuming   " + (_loss(stale) if stale else "here loses nothing"))
    if found.missing:
        lines.append(f"MISSING    {', '.join(found.missing)}: this checkpoint cannot be loaded as a whole")
    return "\n".join(lines)


def _loss(stale: dict[str, int]) -> str:
    return "here finds " + ", ".join(f"{kind} up to {steps} steps old" for kind, steps in stale.items())
