"""A stage: a process with the shim between it and the C library, whose children are what dies.

Importing torch takes seconds and a kill point milliseconds, so everything is imported once and each operation runs
in forked children of the stage, one for each rank, with gloo between them where there are several.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple

from tests.crash.plan import Action, Met, Plan, armed, go_on, met, shim

_ROOT = Path(__file__).parents[2]
_MAIN = "from tests.crash.stage import serve; serve()"  # as __main__ its classes would have other names
_BLOCKED = 1.5
"""Seconds after which a process is held to wait for one that was paused."""
_REAPING = 30.0
"""Seconds that what a rank has started has at least to end after it."""
_REAPER, _DEATH_SIGNAL = 36, 1  # of prctl: orphans below become children; a rank dies with the stage
_REGISTRY = "tests.crash.scenarios:ALL"


@dataclass(frozen=True)
class Raised:
    """What an operation raised.

    Attributes:
        kinds: the names of its class and of those above it; of what DCP wraps, of each that it wraps.
        text: what it says.
        trace: the traceback.
    """

    kinds: tuple[str, ...]
    text: str
    trace: str


@dataclass(frozen=True)
class Ending:
    """How a rank ended.

    Attributes:
        killed: whether SIGKILL ended it.
        hung: whether that was because it took too long.
        value: what the operation returned.
        raised: what it raised, None if nothing.
        met: what the shim told.
    """

    killed: bool
    hung: bool
    value: Any
    raised: Raised | None
    met: Met


class Request(NamedTuple):
    """What the stage is asked for."""

    scenario: str
    phase: str
    root: Path
    plans: Mapping[int, Plan]
    patience: float
    alone: bool


class Stage:
    """The stage, as seen from the test. It lives until it is closed."""

    def __init__(self, registry: str = _REGISTRY) -> None:
        built = shim()
        assert built is not None
        self._desk = Path(tempfile.mkdtemp(prefix="crash-desk"))
        here, there = Pipe()
        environment = {**os.environ, "LD_PRELOAD": str(built), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
        command = [sys.executable, "-c", _MAIN, str(there.fileno()), registry, str(self._desk)]
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - DCP logs every failure with its traceback
        self._process = subprocess.Popen(
            command, env=environment, cwd=_ROOT, pass_fds=[there.fileno()], stderr=self._said
        )
        there.close()
        self._connection = here

    def prepare(self, scenario: str, root: Path) -> None:
        """Make what is there before the operation."""
        for ending in self._ask(Request(scenario, "prepare", root, {}, 240.0, False)):
            assert ending.raised is None, ending.raised.trace

    def operate(
        self,
        scenario: str,
        root: Path,
        plans: Mapping[int, Plan] | None = None,
        patience: float = 120.0,
        alone: bool = False,
    ) -> list[Ending]:
        """Carry the operation out, with what shall happen to each rank, and return how each ended.

        Args:
            scenario: its name in the registry.
            root: the folder that it works in.
            plans: by rank what shall happen; to ranks that are not named nothing does.
            patience: seconds after which a rank is held to wait for ever.
            alone: leave all ranks but the first out of it.
        """
        return self._ask(Request(scenario, "ready", root, dict(plans or {}), patience, alone))

    def close(self) -> None:
        """End it."""
        self._connection.close()
        self._process.wait(30)
        shutil.rmtree(self._desk, ignore_errors=True)

    def _ask(self, request: Request) -> list[Ending]:
        self._connection.send(request)
        try:
            answer: list[Ending] | str = self._connection.recv()
        except EOFError:
            self._said.seek(0)
            raise AssertionError(f"the stage fell: {self._said.read()[-4000:].decode()}") from None
        assert not isinstance(answer, str), answer
        return answer


# In the stage ---------------------------------------------------------------------------------------------------


def serve() -> None:
    """Be the stage, until the test closes it."""
    connection, desk = Connection(int(sys.argv[1])), Path(sys.argv[3])
    _process_control(_REAPER, 1)
    module, name = sys.argv[2].split(":")
    scenarios = getattr(importlib.import_module(module), name)
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            request: Request = connection.recv()
        except EOFError:
            return
        try:
            connection.send(_perform(scenarios[request.scenario], request, desk, connection))
        except Exception:
            connection.send(traceback.format_exc())


def _process_control(option: int, value: int) -> None:
    if ctypes.CDLL(None).prctl(option, value, 0, 0, 0):
        raise OSError(f"prctl({option}) is refused")


def _perform(scenario: Any, request: Request, desk: Path, connection: Connection) -> list[Ending]:
    shutil.rmtree(desk, ignore_errors=True)
    desk.mkdir()
    children: dict[int, int] = {}
    deadline = time.monotonic() + request.patience
    pausing = [rank for rank, plan in request.plans.items() if plan.action == Action.PAUSE]
    ranks = range(1 if request.alone or (scenario.rivals and request.phase == "prepare") else scenario.ranks)
    for rank in sorted(ranks, key=lambda rank: rank not in pausing):
        plan = request.plans.get(rank, Plan(str(request.root)))
        plan.write(desk / f"plan{rank}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which what is forked here does not need
            child = os.fork()
        if not child:
            connection.close()
            _be(scenario, request, rank, desk)
        children[rank] = child
        if rank in pausing:
            _until(partial(_paused_or_ended, child, desk / f"plan{rank}"), request.patience)
    if pausing:
        _until(lambda: all(_ended(child) for rank, child in children.items() if rank not in pausing), _BLOCKED)
        for rank in pausing:
            go_on(desk / f"plan{rank}")
    hung = {rank for rank, child in children.items() if not _ends(child, deadline)}
    for rank in hung:
        os.killpg(children[rank], signal.SIGKILL)
    reaped = {rank: _reaped(child, deadline) for rank, child in sorted(children.items())}
    return [_ending(desk, rank, status, rank in hung or not in_time) for rank, (status, in_time) in reaped.items()]


def _until(true: Callable[[], Any], seconds: float) -> bool:
    """Wait until something is so; return False if it does not become so in time."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


def _ends(child: int, deadline: float) -> bool:
    return _until(lambda: _ended(child), deadline - time.monotonic())


def _paused_or_ended(child: int, plan: Path) -> bool:
    return met(plan).hits > 0 or _ended(child)


def _ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _reaped(child: int, deadline: float) -> tuple[int, bool]:
    """Wait for a rank that has ended and for all that it has started.

    Returns:
        The rank's status, and whether what it has started ended in time.
    """
    ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    if ended is not None and ended.si_code == os.CLD_EXITED:
        os.killpg(child, signal.SIGKILL)  # it has its answer, so nothing is left for them to do
    status = os.waitpid(child, 0)[1]
    in_time = _until(lambda: _alone(child), max(deadline - time.monotonic(), _REAPING))
    if not in_time:
        os.killpg(child, signal.SIGKILL)
        _until(lambda: _alone(child), _REAPING)
    return status, in_time


def _alone(group: int) -> bool:
    """Reap what has ended of a process group; return whether none of it is left."""
    try:
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return True
    return False


def _ending(desk: Path, rank: int, status: int, hung: bool) -> Ending:
    told = met(desk / f"plan{rank}")
    result = desk / f"result{rank}"
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"rank {rank} ended by signal {os.WTERMSIG(status)}"
        return Ending(True, hung, None, None, told)
    value, raised = pickle.loads(result.read_bytes())
    return Ending(False, False, value, raised, told)


def _be(scenario: Any, request: Request, rank: int, desk: Path) -> None:
    """Be a rank; does not return."""
    value, raised = None, None
    try:
        os.setpgid(0, 0)
        _process_control(_DEATH_SIGNAL, signal.SIGKILL)
        warnings.simplefilter("ignore")
        group = _group(1 if scenario.rivals else scenario.ranks, rank, desk)
        if request.phase == "prepare":
            scenario.prepare(request.root, rank, group)
        else:
            operation = scenario.ready(request.root, rank, group)
            _meet(group)
            with armed(desk / f"plan{rank}"):
                value = operation()
    except BaseException as error:  # CheckpointException is no Exception
        raised = Raised(tuple(_kinds(error)), _text(error), traceback.format_exc())
    (desk / f"result{rank}.tmp").write_bytes(pickle.dumps((value, raised)))
    (desk / f"result{rank}.tmp").rename(desk / f"result{rank}")
    os._exit(0)


def _group(ranks: int, rank: int, desk: Path) -> Any:
    if ranks == 1:
        return None
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{desk}/store", rank=rank, world_size=ranks)
    return dist.group.WORLD


def _meet(group: Any) -> None:
    if group is not None:
        import torch.distributed as dist

        dist.barrier(group)


def _kinds(error: BaseException) -> list[str]:
    inner = [held[0] for held in getattr(error, "failures", {}).values()]
    return [cls.__name__ for one in (error, *inner) for cls in type(one).__mro__]


def _text(error: BaseException) -> str:
    inner = [held[0] for held in getattr(error, "failures", {}).values()]
    return "; ".join(str(one) for one in inner) or str(error)
