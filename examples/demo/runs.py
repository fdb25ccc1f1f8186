"""The demo's three parts: a run left in peace, the same run killed again and again, and all checkpoints loaded."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from demo import folders
from demo.errors import DemoError
from demo.folders import Places
from demo.kills import MOMENTS, Kill, kill_while_writing
from demo.screen import Screen
from demo.trainer import Trainer, stock_losses

_LOOK = 0.1  # seconds from one look at a trainer to the next


@dataclass(frozen=True)
class Settings:
    """How long the demo's runs are.

    Attributes:
        steps: training steps; the last one ends with a checkpoint.
        every: steps from one checkpoint to the next.
        kills: how often the second run is killed.
        script: what trains, by its name among the examples.
    """

    steps: int
    every: int
    kills: int
    script: str = "fsdp_trainer.py"

    @property
    def saves(self) -> int:
        """How many checkpoints a run has."""
        return self.steps // self.every

    def targets(self) -> list[int]:
        """Return the saves to kill, counted from 1.

        They are spread over the last two thirds of the run: a policy that lets moments grow old
        is not for the first steps, in which they change from one to the next.
        """
        first, rest = self.saves // 3, self.saves - self.saves // 3
        return [max(2 + i, first + rest * (i + 1) // (self.kills + 1)) for i in range(self.kills)]


def undisturbed(places: Places, settings: Settings, screen: Screen) -> dict[int, float]:
    """Train to the end, with a full checkpoint there, and return the loss of each step."""
    log = places.logs / "uninterrupted.log"
    with _running(settings, places.uninterrupted, log, settings.steps, policy="full") as trainer:
        _to_the_end(trainer, settings, screen)
    _check_finished(trainer, places.uninterrupted, settings)
    return trainer.losses


@dataclass
class Disturbed:
    """A run that is killed while it writes checkpoints, and started again each time.

    Attributes:
        run: the folder of its checkpoints.
        logs: where its logs go.
        settings: how long it is.
        screen: where to tell what happens.
        kills: the kills that hit a save.
        resumed: the step that training went on from after each of them.
        losses: the loss of each step; of one that was trained twice, the later.
    """

    run: Path
    logs: Path
    settings: Settings
    screen: Screen
    kills: list[Kill] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    _save: int = 0  # the last save that was aimed at
    _starts: int = 0

    def train(self) -> None:
        """Train to the end, through all kills.

        Raises:
            DemoError: a kill found no save to hit, or a resume not what it should have found.
        """
        last: Kill | None = None
        while True:
            self._starts += 1
            log = self.logs / f"killed-{self._starts}.log"
            with _running(self.settings, self.run, log, self.settings.every) as trainer:
                self._see_resume(trainer, last)
                last = self._kill(trainer) if len(self.kills) < self.settings.kills else None
                if last is None:
                    _to_the_end(trainer, self.settings, self.screen)
            self.losses.update(trainer.losses)
            if last is None:
                _check_finished(trainer, self.run, self.settings)
                return

    def _see_resume(self, trainer: Trainer, after: Kill | None) -> None:
        while trainer.running() and trainer.resumed_from is None:
            self.screen.advance(0, "two ranks start")
            time.sleep(_LOOK)
        expected = after.newest if after else 0
        if trainer.resumed_from != expected:
            raise DemoError(
                f"The trainer should have gone on from step {expected}, the newest complete checkpoint, and not from "
                f"{trainer.resumed_from}.",
                trainer.log,
            )
        if after:
            self.screen.resumed(expected)
            if not after.committed:
                self.resumed.append(expected)

    def _kill(self, trainer: Trainer) -> Kill:
        """Kill the trainer in one of its next saves."""
        moment = MOMENTS[len(self.kills) % len(MOMENTS)]
        while True:
            self._save = max(self._save + 1, self.settings.targets()[len(self.kills)])
            if self._save > self.settings.saves:
                raise DemoError(f"No save could be hit when {moment.words}: every commit was faster.", trainer.log)
            step = self._save * self.settings.every
            kill = kill_while_writing(
                trainer, self.run, step, moment, lambda: _show(trainer, self.settings, self.screen)
            )
            if kill is not None:
                self.screen.killed(kill)
                if not kill.committed:
                    self.kills.append(kill)
                return kill
            if not trainer.running():
                raise DemoError(f"The trainer ended before it saved step {step}.", trainer.log)
            self.screen.say(f"[yellow]•[/] step-{step} was complete before it could be hit; again at the next save")


def load_all(checkpoints: list[Path], places: Places, screen: Screen) -> dict[str, float]:
    """Load checkpoints with stock torch; return by folder each one's loss on held-out text.

    Raises:
        DemoError: one of them cannot be loaded.
    """
    log = places.logs / "stock-load.log"
    found: dict[str, float] = {}
    with stock_losses(checkpoints, log) as process:
        try:
            for line in process.stdout or ():
                said = json.loads(line)
                found[said["checkpoint"]] = said["loss"]
                screen.advance(len(found), Path(said["checkpoint"]).name)
        finally:
            process.terminate()
    missing = [str(path) for path in checkpoints if str(path) not in found]
    if missing:
        raise DemoError(f"Stock torch cannot load {missing[0]}.", log)
    return found


@contextmanager
def _running(settings: Settings, run: Path, log: Path, every: int, **options: object) -> Iterator[Trainer]:
    """Run a trainer that is gone afterwards, whatever happens."""
    trainer = Trainer(settings.script, run, log, 2, steps=settings.steps, every=every, **options)
    try:
        yield trainer
    finally:
        trainer.stop()


def _to_the_end(trainer: Trainer, settings: Settings, screen: Screen) -> None:
    while trainer.running():
        _show(trainer, settings, screen)
        time.sleep(_LOOK)
    _show(trainer, settings, screen)


def _show(trainer: Trainer, settings: Settings, screen: Screen) -> None:
    step = trainer.step
    loss = trainer.losses.get(step)
    detail = "two ranks start" if loss is None else f"step {step}/{settings.steps}, loss {loss:.3f}"
    screen.advance(step, detail)


def _check_finished(trainer: Trainer, run: Path, settings: Settings) -> None:
    # Not by the exit code: gloo's threads can abort a process that is exiting, with all its work done.
    if not folders.is_committed(folders.checkpoint(run, settings.steps)):
        raise DemoError(f"The trainer ended before step {settings.steps} was saved.", trainer.log)
