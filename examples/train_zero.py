"""The same demo with DeepSpeed: a ZeRO-3 run that is killed while it writes checkpoints, and loses next to nothing.

    python examples/train_zero.py

Two ranks train a small Llama on the CPU with real ZeRO-3 (the script is ``zero_trainer.py``). Its
checkpoints write every layer's fp32 master weights and the moments of a third of the layers. It is
killed in the middle of a save, and started again; at the end its loss is shown beside that of
a run which nobody disturbed. The first time ever, DeepSpeed builds an operator for 20 seconds.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from demo import folders
from demo.ending import failures_told
from demo.errors import DemoError
from demo.folders import Places
from demo.runs import Disturbed, Settings, load_all, undisturbed
from demo.screen import Screen, size
from rich.console import Console

_TOLERANCE = 0.5  # of the training loss; so early in a run moments that are some steps old are felt
_ROWS = 6  # steps at which the losses are compared


def main(
    run: Annotated[Path, typer.Option(help="Where everything goes; an earlier demo's is replaced.")] = Path("zero-run"),
    steps: Annotated[int, typer.Option(min=4, help="Training steps of each run.")] = 10,
    every: Annotated[int, typer.Option(min=1, help="Steps from one checkpoint to the next.")] = 2,
    kills: Annotated[int, typer.Option(min=0, help="How often to kill the run.")] = 1,
) -> None:
    """Train, kill, resume, compare. Exit code 0 only if everything happened as it should."""
    settings = Settings(steps, every, kills, script="zero_trainer.py")
    if steps % every or settings.saves < kills + 2:
        raise typer.BadParameter(f"--steps must be a multiple of --every, and at least {every * (kills + 2)}")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    screen = Screen(total=2 * steps + settings.saves)
    with failures_told(screen):
        places = folders.prepare(run)
        with screen:
            quiet, disturbed, held_out = _play(places, settings, screen)
        _report(quiet, disturbed, held_out, screen.console)


def _play(places: Places, settings: Settings, screen: Screen) -> tuple[dict[int, float], Disturbed, dict[str, float]]:
    screen.console.print(
        "[bold]Layer-wise checkpoints of a DeepSpeed engine.[/] Two ranks train a small Llama in ZeRO-3."
    )
    screen.phase(1, "left in peace", f"A run that nobody disturbs, {settings.steps} steps, to compare with")
    quiet = undisturbed(places, settings, screen)
    screen.say(f"[green]✓[/] loss {quiet[1]:.3f} → {quiet[settings.steps]:.3f}")

    screen.phase(2, "kill and resume", "The same run with layer-wise checkpoints; SIGKILL hits it while it writes them")
    disturbed = Disturbed(places.killed, places.logs, settings, screen)
    disturbed.train()
    screen.say(f"[green]✓[/] loss {disturbed.losses[1]:.3f} → {disturbed.losses[settings.steps]:.3f}")

    screen.phase(
        3, "stock dcp.load", "Every checkpoint loaded by plain torch: one process, no DeepSpeed, no tailor_dcp"
    )
    checkpoints = [folders.checkpoint(places.killed, step) for step in folders.committed_steps(places.killed)]
    held_out = load_all(checkpoints, places, screen)
    screen.say(f"[green]✓[/] {len(held_out)} checkpoints, every entry of each")
    return quiet, disturbed, held_out


def _report(quiet: dict[int, float], disturbed: Disturbed, held_out: dict[str, float], console: Console) -> None:
    # Importing torch takes seconds, in which the first line would not be on the screen yet.
    from demo import tables

    from tailor_dcp import inspect

    found = [inspect(path) for path in held_out]
    losses = tables.losses(quiet, disturbed.losses, max(1, len(quiet) // _ROWS))
    for table in (tables.saves(found, held_out), tables.origins(found[-1]), losses):
        console.print("", table, sep="\n")
    if disturbed.kills:
        console.print("", tables.kills(disturbed.kills, disturbed.resumed), sep="\n")
    written, full = sum(one.written for one in found), sum(one.full for one in found)
    last = max(quiet)
    apart = disturbed.losses[last] - quiet[last]
    console.print(
        f"\n[bold]So:[/] {len(found)} saves wrote {size(written)}, {written / full:.0%} of what full ones write, and a "
        f"kill cost no checkpoint. The loss of step {last} is {abs(apart):.4f} {'above' if apart > 0 else 'below'} the "
        f"undisturbed run's: the moments that it resumed with were up to {_stalest(disturbed, held_out)} steps old."
    )
    if abs(apart) > _TOLERANCE:
        raise DemoError(f"The two runs end {abs(apart):.3f} apart, more than {_TOLERANCE}.")


def _stalest(disturbed: Disturbed, held_out: dict[str, float]) -> int:
    from tailor_dcp import inspect

    found = [inspect(path) for path in held_out]
    return max((one.stalest["exp_avg"] for one in found if one.step in disturbed.resumed), default=0)


if __name__ == "__main__":
    typer.run(main)
