"""Law 2: a process killed at any call leaves every earlier checkpoint, and the new one absent or complete.

What is tried here is a sample, drawn with a seed, of what ``python -m tests.crash`` tries.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.crash.plan import Action, Calls, Plan, missing
from tests.crash.scenarios import ALL
from tests.crash.theatre import Theatre
from tests.crash.trials import FAULTS, count, interrupt, kill, lose_power, refuse

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

DAEMONS = [name for name, scenario in ALL.items() if scenario.daemon]
ALONE = [name for name, scenario in ALL.items() if scenario.ranks == 1 and not scenario.daemon]
TOGETHER = [name for name, scenario in ALL.items() if scenario.ranks > 1 and not scenario.rivals | scenario.daemon]
RIVALS = [name for name, scenario in ALL.items() if scenario.rivals]
BRIEF = ["save, layerwise", "save again, layerwise", "save, stock", "merge", "prune, link", "zero to dcp"]
BRIEFLY_KILLED = [*BRIEF, "prune, compacting, link"]


@pytest.fixture(scope="module")
def theatre(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Theatre]:
    """Everything that the trials need, started once."""
    made = Theatre(tmp_path_factory.mktemp("crash"))
    yield made
    made.close()


def some(values: int, number: int, seed: str) -> list[int]:
    """Return a few of the numbers from 1, always the last among them: it is mostly the one after the commit."""
    return sorted({values, *random.Random(seed).sample(range(1, values + 1), min(number, values))})


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in BRIEFLY_KILLED else pytest.mark.long) for n in ALONE]
)
def test_killed_at_any_call(theatre: Theatre, name: str) -> None:
    """Nothing earlier is lost, the result is whole or not there, and simply doing it again succeeds."""
    for at in some(theatre.baseline(name).calls[0], 4, name):
        kill(theatre, name, at)
    kill(theatre, name, 2, action=Action.TEAR, again=False)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == TOGETHER[0] else pytest.mark.long) for n in TOGETHER]
)
def test_a_rank_killed_at_any_call(theatre: Theatre, name: str) -> None:
    """The other one neither waits for ever nor commits what is not whole."""
    for rank, calls in enumerate(theatre.baseline(name).calls):
        for at in some(calls, 1, f"{name} {rank}"):
            kill(theatre, name, at, rank, again=rank == 0)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in BRIEF else pytest.mark.long) for n in ALONE])
def test_power_lost_after_any_call(theatre: Theatre, name: str) -> None:
    """Of what was not flushed any part may be gone; what is committed is whole all the same, and stays."""
    tried = lose_power(theatre, name, random.Random(name), 1, 3)
    assert tried.states > 3


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in BRIEF else pytest.mark.long) for n in ALONE])
def test_refused_at_any_call(theatre: Theatre, name: str) -> None:
    """A full disk, a failing one, no permission, a stale handle: it succeeds, or fails with a sentence."""
    draw = random.Random(name)
    for fault in draw.sample(list(FAULTS.values()), 2):
        (calls,) = count(theatre, name, fault)
        if calls:
            refuse(theatre, name, fault, draw.randint(1, calls), again=False)


@pytest.mark.long
@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "ENOENT"])
def test_one_rank_is_refused(theatre: Theatre, name: str, fault: str) -> None:
    """Its disk is full, or it sees an old state of a shared file system: all ranks end alike."""
    for rank, calls in enumerate(count(theatre, name, FAULTS[fault])):
        for at in some(calls, 2, f"{name} {fault} {rank}") if calls else ():
            refuse(theatre, name, FAULTS[fault], at, rank)


# A daemon is a new interpreter for each trial ----------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", DAEMONS)
@pytest.mark.parametrize("action", ["KILL", "TEAR", "NODE", "ORPHAN"])
def test_a_trainer_or_its_daemon_killed_at_any_call(theatre: Theatre, name: str, action: str) -> None:
    """The daemon dies and its trainer says so; both die; or the trainer dies and its daemon goes on."""
    for rank, calls in enumerate(theatre.baseline(name).calls):
        last = calls // 3 if action == "TEAR" else calls
        for at in some(last, 2 - rank, f"{name} {action} {rank}"):
            kill(theatre, name, at, rank, Action[action], again=rank == 0 and at == last)


@pytest.mark.long
@pytest.mark.parametrize("name", DAEMONS)
def test_a_daemon_finishes_when_its_trainer_is_gone(theatre: Theatre, name: str) -> None:
    """What it was given before is committed; nothing that the trainer started is left running."""
    root = theatre.scene(name)
    plan = Plan(str(root), Calls.DATA, Action.ORPHAN, 1)  # all data is written by daemons
    endings = theatre.operate(name, root, {0: plan})
    assert endings[0].killed
    assert theatre.check(name, root, done=True)


@pytest.mark.long
@pytest.mark.parametrize("name", DAEMONS)
def test_a_daemon_loses_power_or_is_refused(theatre: Theatre, name: str) -> None:
    """Its trainer hears of what it was refused."""
    assert lose_power(theatre, name, random.Random(name), 1, 6).states > 3
    failed = 0
    for fault in ("ENOSPC", "EIO"):
        for rank, calls in enumerate(count(theatre, name, FAULTS[fault])):
            failed += refuse(theatre, name, FAULTS[fault], random.Random(fault).randint(1, calls), rank, again=False)
    assert failed


# Two at once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if "one folder, layer" in n else pytest.mark.long) for n in RIVALS]
)
def test_a_rival_comes_in_between(theatre: Theatre, name: str) -> None:
    """Two saves at once, into two folders or into one; a prune during a save; two merges to one name."""
    for at in some(theatre.baseline(name).calls[0], 3, name):
        interrupt(theatre, name, at)


@pytest.mark.long
@pytest.mark.parametrize("name", ["save and prune", "save and compacting prune"])
def test_a_save_comes_in_between(theatre: Theatre, name: str) -> None:
    """A prune that has looked at the run meets what was saved since."""
    for at in some(theatre.baseline(name).calls[1], 6, name):
        interrupt(theatre, name, at, first=1)
