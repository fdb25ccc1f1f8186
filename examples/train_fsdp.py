"""The demo: training that is killed while it writes checkpoints, and loses next to nothing.

    python examples/train_fsdp.py

Two ranks train a small Llama with FSDP2 (the script is ``fsdp_trainer.py``). Its checkpoints
write every layer's weights in bf16 and the optimizer's moments of a fifth of the layers. It is
killed three times in the middle of a save, and started again. At the end its loss is shown
beside that of a run which nobody disturbed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from demo import folders
from demo.ending import failures_told
from demo.errors import DemoError
from demo.folders import Places
from demo.runs import Disturbed, Settings, load_all, undisturbed
from demo.screen import Screen, size
from rich.console import Console

if TYPE_CHECKING:
    from tailor_dcp.inspection import Inspection

_TOLERANCE = 0.1  # of held-out loss; with the default options the two runs end 0.02 apart
_ROWS = 6  # steps at which the losses are compared


def main(
    run: Annotated[Path, typer.Option(help="Where everything goes; an earlier demo's is replaced.")] = Path("demo-run"),
    steps: Annotated[int, typer.Option(min=4, help="Training steps of each run.")] = 160,
    every: Annotated[int, typer.Option(min=1, help="Steps from one checkpoint to the next.")] = 8,
    kills: Annotated[int, typer.Option(min=0, help="How often to kill the run.")] = 3,
) -> None:
    """Train, kill, resume, compare. Exit code 0 only if everything happened as it should."""
    settings = Settings(steps, every, kills)
    if steps % every or settings.saves < kills + 2:
        raise typer.BadParameter(f"--steps must be a multiple of --every, and at least {every * (kills + 2)}")
    screen = Screen(total=2 * steps + settings.saves + 1)
    with failures_told(screen):
        places = folders.prepare(run)
        with screen:
            outcome = _play(places, settings, screen)
        _report(outcome, places, settings, screen.console)


@dataclass(frozen=True)
class _Outcome:
    """What happened: the losses of the run in peace, the other run, and each checkpoint's held-out loss."""

    quiet: dict[int, float]
    disturbed: Disturbed
    held_out: dict[str, float]


def _play(places: Places, settings: Settings, screen: Screen) -> _Outcome:
    screen.console.print(
        "[bold]Layer-wise checkpoints.[/] Two ranks train a small Llama with FSDP2 on Python's own sources."
    )
    screen.phase(1, "left in peace", f"A run that nobody disturbs, {settings.steps} steps, to compare with")
    quiet = undisturbed(places, settings, screen)
    screen.say(f"[green]✓[/] loss {quiet[1]:.3f} → {quiet[settings.steps]:.3f}")

    screen.phase(2, "kill and resume", "The same run with layer-wise checkpoints; SIGKILL hits it while it writes them")
    disturbed = Disturbed(places.killed, places.logs, settings, screen)
    disturbed.train()
    screen.say(f"[green]✓[/] loss {disturbed.losses[1]:.3f} → {disturbed.losses[settings.steps]:.3f}")

    screen.phase(3, "stock dcp.load", "Every checkpoint loaded by plain torch: one process, without tailor_dcp")
    checkpoints = [folders.checkpoint(places.killed, step) for step in folders.committed_steps(places.killed)]
    held_out = load_all([*checkpoints, folders.checkpoint(places.uninterrupted, settings.steps)], places, screen)
    screen.say(f"[green]✓[/] {len(held_out)} checkpoints, every entry of each")
    return _Outcome(quiet, disturbed, held_out)


def _report(outcome: _Outcome, places: Places, settings: Settings, console: Console) -> None:
    # Importing torch takes seconds, in which the first line would not be on the screen yet.
    from demo import tables

    from tailor_dcp import inspect

    quiet, disturbed = outcome.quiet, outcome.disturbed
    found = [inspect(folders.checkpoint(places.killed, step)) for step in folders.committed_steps(places.killed)]
    ends = [outcome.held_out[str(folders.checkpoint(r, settings.steps))] for r in (places.uninterrupted, places.killed)]
    losses = tables.losses(quiet, disturbed.losses, max(1, settings.steps // _ROWS))
    tables.add_held_out(losses, *ends)
    for table in (tables.saves(found, outcome.held_out), tables.origins(found[-1]), losses):
        console.print("", table, sep="\n")
    console.print(_why_apart(outcome, found), style="dim")
    if disturbed.kills:
        console.print("", tables.kills(disturbed.kills, disturbed.resumed), sep="\n")
    console.print(_meaning(found, disturbed, ends, folders.disk_use(places.killed)))
    console.print(_left(places, settings))
    if abs(ends[1] - ends[0]) > _TOLERANCE:
        raise DemoError(f"The two runs end {abs(ends[1] - ends[0]):.3f} apart, more than {_TOLERANCE}.")


def _why_apart(outcome: _Outcome, found: list[Inspection]) -> str:
    pairs = [(loss, outcome.disturbed.losses[step]) for step, loss in sorted(outcome.quiet.items())]
    equal = next((number for number, (quiet, other) in enumerate(pairs) if quiet != other), len(pairs))
    if equal == len(pairs):
        return "  Equal in every bit."
    stale = max((one.stalest["exp_avg"] for one in found if one.step in outcome.disturbed.resumed), default=0)
    return (
        f"  Equal in every bit up to step {equal}. Then each resume rounds the weights to bf16 and finds\n"
        f"  moments up to {stale} steps old: that is the price of the smaller saves."
    )


def _meaning(found: list[Inspection], disturbed: Disturbed, ends: list[float], disk: int) -> str:
    written, full = sum(one.written for one in found), sum(one.full for one in found)
    again = sum(kill.step - step for kill, step in zip(disturbed.kills, disturbed.resumed, strict=True))
    return (
        f"\n[bold]So:[/] {len(disturbed.kills)} kills in the middle of a save cost no checkpoint, and {again} steps "
        f"that were trained again. {len(found)} saves wrote {written / full:.0%} of what full ones write "
        f"({size(disk)} on disk, not {size(full)}). The loss on held-out text ends {abs(ends[1] - ends[0]):.4f} "
        f"{'above' if ends[1] > ends[0] else 'below'} the undisturbed run's."
    )


def _left(places: Places, settings: Settings) -> str:
    last = folders.checkpoint(places.killed, settings.steps)
    return (
        f"\nLeft here: the runs {places.uninterrupted} and {places.killed}, their logs in {places.logs}\n"
        f"See more:  tailor inspect {last}\n"
    )


if __name__ == "__main__":
    typer.run(main)
