"""What the demo ends with: what was saved, where each layer came from, and what it did to the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from demo.kills import Kill
from demo.screen import data_left, size
from tailor_dcp.inspection import Inspection, UnitView

_ROWS = 12  # saves that are shown one by one
_BAR = 24  # characters that stand for a full save


def saves(found: Sequence[Inspection], held_out: Mapping[str, float]) -> Table:
    """Show the bytes of each save beside those of a full one.

    Args:
        found: the run's checkpoints.
        held_out: the loss on unseen text of each, by folder.
    """
    table = _table("What each save wrote", "checkpoint", ">wrote", ">full save", ">share", "", ">held-out loss")
    left_out = range(_ROWS // 2, len(found) - _ROWS // 2)
    for number, one in enumerate(found):
        if number in left_out:
            if number == left_out.start:
                table.add_row(f"{len(left_out)} more")
            continue
        share = one.written / one.full
        table.add_row(
            f"step-{one.step}",
            size(one.written),
            size(one.full),
            f"{share:.0%}",
            f"[cyan]{'█' * round(share * _BAR)}[/][dim]{'░' * (_BAR - round(share * _BAR))}[/]",
            f"{held_out[one.path]:.4f}",
        )
    written, full = sum(one.written for one in found), sum(one.full for one in found)
    table.add_section()
    table.add_row("together", size(written), size(full), f"{written / full:.0%}", style="bold")
    return table


def origins(found: Inspection) -> Table:
    """Show for each layer of a checkpoint which step its weights and its moments come from."""
    title = f"Where the layers of step-{found.step} come from"
    table = _table(title, "layer", ">weights of step", ">moments of step", "", ">moments' age")
    for layer in dict.fromkeys(unit.layer for unit in found.units):
        units = {unit.kind: unit for unit in found.units if unit.layer == layer}
        if "exp_avg" in units:  # what belongs to no layer has no moments either
            weights, moments = units["weight"], units["exp_avg"]
            age = f"{moments.stale_steps} steps" if moments.stale_steps else "-"
            table.add_row(layer, _step(weights), _step(moments), "carried" if moments.stale_steps else "written", age)
    return table


def losses(quiet: Mapping[int, float], disturbed: Mapping[int, float], every: int) -> Table:
    """Show the loss of the two runs at the same steps, on the same texts.

    Args:
        quiet: the loss of each step of the run that nobody disturbed.
        disturbed: of the one that was killed; for a step trained twice, what came last.
        every: steps from one row to the next.
    """
    table = _table(
        "The loss, step by step on the same texts", ">step", ">uninterrupted", ">killed and resumed", ">apart"
    )
    for step in range(every, max(quiet) + 1, every):
        table.add_row(str(step), f"{quiet[step]:.4f}", f"{disturbed[step]:.4f}", apart(quiet[step], disturbed[step]))
    return table


def add_held_out(table: Table, quiet: float, disturbed: float) -> None:
    """Close the table of losses with what the last two checkpoints make of unseen text."""
    table.add_section()
    table.add_row("held-out text", f"{quiet:.4f}", f"{disturbed:.4f}", apart(quiet, disturbed), style="bold")


def kills(done: Sequence[Kill], resumed: Sequence[int]) -> Table:
    """Show each kill, what it left, and from where training went on."""
    table = _table("The kills", "killed in", "when", "data left there", ".metadata", ">resumed from")
    for kill, step in zip(done, resumed, strict=True):
        table.add_row(
            f"step-{kill.step}",
            kill.moment.words,
            data_left(kill),
            "only its .tmp" if kill.committing else "none",
            f"step-{step}",
        )
    return table


def apart(quiet: float, disturbed: float) -> str:
    """Write the difference of two losses."""
    return "0" if quiet == disturbed else f"{disturbed - quiet:+.4f}"


def _step(unit: UnitView) -> str:
    return str(unit.origin_step)


def _table(title: str, *columns: str) -> Table:
    """Return an empty table; a ``>`` before a column's name sets it to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
    return table
