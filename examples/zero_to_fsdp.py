"""From DeepSpeed to FSDP2 in mid-run, at another world size, with nothing converted.

    python examples/zero_to_fsdp.py

Two ranks train a small Llama in ZeRO-3 (``zero_trainer.py``) and go on to the end. Four ranks
with FSDP2 load a checkpoint of the middle of that run (``fsdp_from_zero.py``, which knows only
torch) and train the same steps on the same texts. The losses of both are shown side by side.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer
from demo import folders
from demo.ending import failures_told
from demo.errors import DemoError
from demo.screen import Screen
from demo.trainer import Trainer
from rich import box
from rich.table import Table

_LOOK = 0.1  # seconds from one look at a trainer to the next
_FIRST = 1e-4  # how far apart the first losses may be; only the order of sums differs
_ALL = 0.05  # and the others, in which that grows


def main(
    run: Annotated[Path, typer.Option(help="Where everything goes; an earlier demo's is replaced.")] = Path(
        "zero-to-fsdp-run"
    ),
    steps: Annotated[int, typer.Option(min=2, help="Training steps of the run.")] = 16,
    leave: Annotated[int, typer.Option(min=1, help="The step after which FSDP2 takes over.")] = 8,
    ranks: Annotated[int, typer.Option(min=1, max=4, help="Processes with FSDP2: 1, 2 or 4.")] = 4,
) -> None:
    """Train in ZeRO-3, go on in FSDP2, compare. Exit code 0 only if the losses agree."""
    if leave >= steps or 4 % ranks:
        raise typer.BadParameter("--leave must be less than --steps, and --ranks 1, 2 or 4")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    screen = Screen(total=2 * steps - leave, phases=2)
    with failures_told(screen):
        places = folders.prepare(run)
        with screen:
            screen.console.print("[bold]One run, two frameworks.[/] A small Llama on Python's own sources.")
            screen.phase(1, "ZeRO-3", f"Two ranks with DeepSpeed ZeRO-3, {steps} steps, a checkpoint every {leave}")
            stayed = Trainer("zero_trainer.py", places.killed, places.logs / "zero.log", steps=steps, every=leave)
            _finish(stayed, steps, screen)
            source = folders.checkpoint(places.killed, leave)
            screen.say(f"[green]✓[/] loss {stayed.losses[1]:.3f} → {stayed.losses[steps]:.3f}")
            screen.phase(2, "FSDP2", f"{ranks} ranks with FSDP2 and plain torch load step-{leave} and go on")
            log = places.logs / "fsdp.log"
            left = Trainer("fsdp_from_zero.py", source, log, ranks=ranks, first=leave + 1, steps=steps)
            _finish(left, steps, screen)
            screen.say(f"[green]✓[/] loss {left.losses[leave + 1]:.3f} → {left.losses[steps]:.3f}")
        screen.console.print("", _table(stayed.losses, left.losses, ranks), sep="\n")
        _judge(stayed.losses, left.losses, leave + 1, screen)


def _finish(trainer: Trainer, steps: int, screen: Screen) -> None:
    """Wait for a trainer's end; it is gone afterwards, whatever happens."""
    try:
        while trainer.running():
            screen.advance(len(trainer.losses), f"step {trainer.step}/{steps}" if trainer.losses else "ranks start")
            time.sleep(_LOOK)
    finally:
        trainer.stop()
    if steps not in trainer.losses:
        raise DemoError(f"The trainer ended before step {steps}.", trainer.log)


def _table(stayed: dict[int, float], left: dict[int, float], ranks: int) -> Table:
    table = Table(title="The loss, step by step on the same texts", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("step", "ZeRO-3, 2 ranks", f"FSDP2, {ranks} rank{'s' * (ranks > 1)}", "apart"):
        table.add_column(name, justify="right")
    for step, loss in sorted(stayed.items()):
        other = left.get(step)
        table.add_row(
            str(step), f"{loss:.6f}", *(("", "") if other is None else (f"{other:.6f}", f"{other - loss:+.6f}"))
        )
    return table


def _judge(stayed: dict[int, float], left: dict[int, float], first: int, screen: Screen) -> None:
    apart = {step: abs(loss - stayed[step]) for step, loss in left.items()}
    if apart[first] > _FIRST or max(apart.values()) > _ALL:
        raise DemoError(f"The losses are up to {max(apart.values()):.4f} apart, {apart[first]:.6f} in the first step.")
    screen.console.print(
        f"\n[bold]So:[/] weights, moments and step counters went over: the first losses are {apart[first]:.1e} apart, "
        f"the last {apart[max(apart)]:.1e}; other numbers of ranks add up in another order."
    )


if __name__ == "__main__":
    typer.run(main)
