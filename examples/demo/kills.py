"""Killing a trainer while it writes a checkpoint, seen from outside: nothing is added to it for that."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from demo import folders
from demo.trainer import Trainer

_POLL = 0.001  # seconds; a save of this model takes about a hundred times as long


@dataclass(frozen=True)
class Moment:
    """A point in the writing of a checkpoint.

    Attributes:
        words: what the watcher waits for.
        reached: tells whether a checkpoint's folder has got there.
    """

    words: str
    reached: Callable[[Path], bool]


MOMENTS = (
    Moment("its folder just made", Path.exists),
    Moment("the first bytes written", lambda folder: any(folders.own_data(folder))),
    Moment("just before its commit", folders.is_committing),
)
"""From the first trace of a save to its last."""


@dataclass(frozen=True)
class Kill:
    """A trainer that was killed, and what it left behind.

    Attributes:
        step: the step whose checkpoint it was writing.
        moment: what the watcher had waited for.
        committed: whether the checkpoint was complete all the same: the kill came too late.
        committing: whether its ``.metadata`` had been written, but not renamed.
        data_files: data files of this save in the folder.
        data_bytes: their bytes.
        newest: the newest complete checkpoint that was left.
    """

    step: int
    moment: Moment
    committed: bool
    committing: bool
    data_files: int
    data_bytes: int
    newest: int


def kill_while_writing(trainer: Trainer, run: Path, step: int, moment: Moment, tick: Callable[[], None]) -> Kill | None:
    """Wait until a step's checkpoint is being written, and kill the trainer at that moment.

    Args:
        trainer: the running trainer.
        run: the folder of its checkpoints.
        step: the step whose checkpoint is to be hit.
        moment: when, within its writing.
        tick: called now and then while waiting.

    Returns:
        What was left, looked at after the last process had gone. None if the checkpoint was
        complete before the moment was seen; the trainer is left alone then.
    """
    folder = folders.checkpoint(run, step)
    _wait_for(folder, trainer, tick)
    # A save is over in the twinkling of an eye, so from here on nothing sleeps.
    while trainer.running():
        if moment.reached(folder):
            trainer.kill()
            return _look(run, step, moment)
        if folders.is_committed(folder):
            return None
    return None


def _wait_for(folder: Path, trainer: Trainer, tick: Callable[[], None]) -> None:
    while trainer.running() and not folder.exists():
        tick()
        time.sleep(_POLL)


def _look(run: Path, step: int, moment: Moment) -> Kill:
    folder = folders.checkpoint(run, step)
    sizes = folders.own_data(folder)
    return Kill(
        step=step,
        moment=moment,
        committed=folders.is_committed(folder),
        committing=folders.is_committing(folder),
        data_files=len(sizes),
        data_bytes=sum(sizes),
        newest=max(folders.committed_steps(run), default=0),
    )
