"""Trials: an operation that dies, loses power or is refused a call, and what must hold afterwards."""

from __future__ import annotations

import copy
import errno
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.crash.loads import Tried
from tests.crash.plan import CHANGES, Action, Calls, Plan
from tests.crash.power import Disk, Done, Left, read_log
from tests.crash.scenarios import ALL, Said
from tests.crash.stage import Ending, Stage
from tests.crash.theatre import LawBrokenError, Theatre, succeeded, tree_of

_AGAIN, _DAEMON_AGAIN = 0.3, 0.03
"""The share of losses of power after which the operation is done again; of a daemon, which takes seconds to start."""


@contextmanager
def told(trial: str) -> Iterator[None]:
    """Say of a law that does not hold in which trial it does not."""
    try:
        yield
    except LawBrokenError as error:
        raise LawBrokenError(f"{trial}: {error}") from error


# Death ------------------------------------------------------------------------------------------------------------


def kill(
    theatre: Theatre, name: str, at: int, rank: int = 0, action: Action = Action.KILL, again: bool = True
) -> str | None:
    """Kill a rank at its n-th call, check everything, and do it again.

    Args:
        theatre: where.
        name: the scenario.
        at: the call, from 1.
        rank: which one dies; the others must notice.
        action: ``KILL``, or ``TEAR``, which counts writes alone; where a daemon makes the call it is the daemon that
            dies. ``NODE`` for the rank and its daemon, ``ORPHAN`` for the rank alone, whose daemon goes on.
        again: whether to do it again afterwards.

    Returns:
        The call; None if the rank ended before it, as threads do not always make the same calls.
    """
    root = theatre.scene(name)
    plan = Plan(str(root), Calls.DATA if action == Action.TEAR else CHANGES, action, at)
    with told(f"{name}, rank {rank} killed at call {at}"):
        endings = theatre.operate(name, root, {rank: plan})
        died = endings[rank].met.hits > 0
        if not died:
            succeeded(endings)
        with told(endings[rank].met.where):
            if died and not endings[rank].killed:
                _mourns(endings[rank])
            theatre.check(name, root)
            if again:
                theatre.again(name, root)
    shutil.rmtree(root)
    return endings[rank].met.where if died else None


def _mourns(ending: Ending) -> None:
    """See that a rank whose daemon was killed says so."""
    if ending.raised is None:
        raise LawBrokenError("its daemon was killed, and it says that it has succeeded")
    if "process is dead" not in ending.raised.text:
        raise LawBrokenError(f"its daemon was killed, and it says: {ending.raised.trace}")


# Loss of power ----------------------------------------------------------------------------------------------------


class PowerTried(NamedTuple):
    """What was tried of a loss of power.

    Attributes:
        calls: after how many calls.
        states: how many different disks were looked at.
    """

    calls: int
    states: int


def lose_power(theatre: Theatre, name: str, draw: random.Random, samples: int, points: int | None = None) -> PowerTried:
    """Let the power fail after each call, and look at what may be left.

    Args:
        theatre: where.
        name: the scenario.
        draw: what chooses.
        samples: how many states to draw for each call, beside those that are always looked at.
        points: after how many calls; None for all. The last one is always among them.
    """
    disk, done = _logged(theatre, name)
    numbers = range(len(done))
    chosen = {*(numbers if points is None else draw.sample(numbers, min(points, len(done)))), len(done)}
    seen: set[str] = set()
    for number in range(len(done) + 1):
        for left in disk.samples(draw, samples) if number in chosen else ():
            last = number == len(done)
            if (digest := f"{left.digest()} {last}") not in seen:
                seen.add(digest)
                where = f"{done[number - 1].op.name} {done[number - 1].path}" if number else "nothing"
                with told(f"{name}, power lost after call {number}, {where}"):
                    _look_at(theatre, name, left, last and not ALL[name].stock, draw)
        if number < len(done):
            disk.do(done[number])
    return PowerTried(len(chosen), len(seen))


def _logged(theatre: Theatre, name: str) -> tuple[Disk, list[Done]]:
    """Carry the operation out; return the disk that it began with, and everything that was done to it."""
    root, log = theatre.scene(name), theatre.room / "log"
    log.unlink(missing_ok=True)
    disk = Disk(root, journal=ALL[name].stock)
    plan = Plan(str(root), log=str(log))
    succeeded(theatre.operate(name, root, dict.fromkeys(range(ALL[name].ranks), plan)))
    done = read_log(log)
    _check_log(theatre, root, disk, done)
    shutil.rmtree(root)
    return disk, done


def _check_log(theatre: Theatre, root: Path, disk: Disk, done: list[Done]) -> None:
    """See that the shim missed nothing: what it has noted, done again, gives what is there."""
    again, whole = theatre.place("again"), copy.deepcopy(disk)
    for one in done:
        whole.do(one)
    whole.left(lambda _, __: True).write(again)
    made, there = tree_of(again), tree_of(root)
    differing = sorted(name for name in {**made, **there} if made.get(name) != there.get(name))
    assert not differing, f"the shim does not see every call: {differing[:5]}"
    shutil.rmtree(again)


def _look_at(theatre: Theatre, name: str, left: Left, done: bool, draw: random.Random) -> None:
    root = theatre.place("lost")
    left.write(root)
    theatre.check(name, root, done)
    if draw.random() < (_DAEMON_AGAIN if ALL[name].daemon else _AGAIN):
        theatre.again(name, root)
    shutil.rmtree(root)


# Refusals ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What the file system may do to a call instead of what was asked for.

    Attributes:
        name: what it is called.
        classes: the calls that it happens to.
        action: what it does.
        error: the ``errno``.
        lasting: whether it stays so.
    """

    name: str
    classes: Calls
    action: Action = Action.FAIL
    error: int = 0
    lasting: bool = False


_WRITES = Calls.MAKE | Calls.DATA
_ALL = _WRITES | Calls.REMOVE | Calls.FLUSH | Calls.CLOSE | Calls.READ | Calls.LOOK

FAULTS = {
    fault.name: fault
    for fault in (
        Fault("ENOSPC", _WRITES, error=errno.ENOSPC, lasting=True),
        Fault("EDQUOT", _WRITES | Calls.CLOSE, error=errno.EDQUOT),
        Fault("EIO", _ALL, error=errno.EIO),
        Fault("ESTALE", _ALL, error=errno.ESTALE),
        Fault("EACCES", Calls.MAKE | Calls.REMOVE | Calls.READ | Calls.LOOK, error=errno.EACCES),
        Fault("ENOENT", Calls.READ | Calls.LOOK, error=errno.ENOENT),
        Fault("EMFILE", Calls.MAKE | Calls.READ, error=errno.EMFILE, lasting=True),
        Fault("EINTR", Calls.DATA | Calls.READ | Calls.FLUSH, error=errno.EINTR),
        Fault("short writes", Calls.DATA, Action.SHORT, lasting=True),
        Fault("short reads", Calls.READ, Action.SHORT, lasting=True),
        Fault("slow", _ALL, Action.WAIT, lasting=True),
    )
}
_CLEAR = frozenset({"TailorError", "OSError", "CheckpointException"})


def count(theatre: Theatre, name: str, fault: Fault) -> list[int]:
    """Return how many calls of each rank a fault can happen to."""
    root = theatre.scene(name)
    plan = Plan(str(root), fault.classes)
    endings = theatre.operate(name, root, dict.fromkeys(range(ALL[name].ranks), plan))
    shutil.rmtree(root)
    return [ending.met.calls for ending in endings]


def refuse(theatre: Theatre, name: str, fault: Fault, at: int, rank: int = 0, again: bool = True) -> bool:
    """Let a fault happen at the n-th call of a rank, check everything, and do it again.

    Returns:
        Whether the operation failed. If it did it said so in a sentence; if not its result is right.
    """
    root = theatre.scene(name)
    plan = Plan(str(root), fault.classes, fault.action, at, fault.error, fault.lasting, microseconds=3000)
    with told(f"{name}, {fault.name} at call {at} of rank {rank}"):
        endings = theatre.operate(name, root, {rank: plan})
        with told(endings[rank].met.where):
            failures = [_failed(ending) for ending in endings]
            theatre.check(name, root, done=not any(failures))
            if again:
                theatre.again(name, root)
    shutil.rmtree(root)
    return any(failures)


def _failed(ending: Ending) -> bool:
    """Tell whether a rank failed, and see that it said so as it should."""
    if isinstance(ending.value, Said) and ending.value.code:
        lines = ending.value.error.strip().splitlines()
        if ending.value.code not in (1, 2) or not lines or "Traceback" in ending.value.error:
            raise LawBrokenError(f"a command ended with {ending.value}")
        return True
    if ending.raised is None:
        return False
    if not _CLEAR & set(ending.raised.kinds) or not ending.raised.text.strip():
        raise LawBrokenError(f"{ending.raised.kinds[0]} is no clear error: {ending.raised.trace}")
    return True


# Loads ------------------------------------------------------------------------------------------------------------

LOADS = "tests.crash.loads:ALL"
"""Whose scenarios a stage for loads must have."""


def load(stage: Stage, root: Path, name: str) -> Tried:
    """Try all loads of a scenario.

    Returns:
        How many the first rank tried, and what was wrong on any.
    """
    root.mkdir()
    stage.prepare(name, root)
    endings = stage.operate(name, root, patience=1200)
    shutil.rmtree(root)
    for ending in endings:
        if ending.hung or ending.raised is not None:
            raise LawBrokenError(f"{name}: {ending.raised.trace if ending.raised else 'it hangs'}")
    wrong = list(dict.fromkeys(sentence for ending in endings for sentence in ending.value.wrong))
    return Tried(endings[0].value.loads, endings[0].value.failed, wrong)


# Rivals -----------------------------------------------------------------------------------------------------------


def interrupt(theatre: Theatre, name: str, at: int, first: int = 0) -> str:
    """Let a process pause at its n-th call until its rival is done or waits for it; check everything.

    Args:
        theatre: where.
        name: the scenario.
        at: the call, from 1.
        first: which of the two pauses.

    Returns:
        The call.
    """
    root = theatre.scene(name)
    with told(f"{name}, the other one at call {at} of number {first}"):
        endings = theatre.operate(name, root, {first: Plan(str(root), CHANGES, Action.PAUSE, at)})
        with told(endings[first].met.where):
            failures = [_failed(ending) for ending in endings]
            # Between two stock writers in one folder the one may remove the commit of the other.
            careless = ALL[name].stock and len(ALL[name].saves) == 1
            if all(failures) and not careless:
                raise LawBrokenError(f"both failed: {[ending.raised or ending.value for ending in endings]}")
            theatre.check(name, root, done=not failures[0] and not careless)
            lost = [folder for folder in ALL[name].saves if not (root / folder / ".metadata").exists()]
            if lost and not any(failures):
                raise LawBrokenError(f"both succeeded, and {lost[0]} is not there")
            theatre.again(name, root)
    shutil.rmtree(root)
    return endings[first].met.where
