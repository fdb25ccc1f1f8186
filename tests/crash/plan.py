"""Plans: what the shim shall do to a process, and what it tells of it afterwards."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from pathlib import Path

_SOURCE = Path(__file__).with_name("shim.c")
_INHERITED = "CRASH_PLAN"
_MISSING = "there is no C compiler (cc), or no LD_PRELOAD on this system"


class Calls(IntFlag):
    """Classes of calls to the file system."""

    MAKE = 1  # create, link, rename, mkdir, chmod, utimes
    DATA = 2  # writes of every kind, truncations
    FLUSH = 4  # fsync
    READ = 8  # opening for reading, reads, maps
    LOOK = 16  # stat, access, opendir
    CLOSE = 32  # of files that were written
    REMOVE = 64  # unlink, rmdir


CHANGES = Calls.MAKE | Calls.REMOVE | Calls.DATA | Calls.FLUSH
"""Between two such calls nothing is different on the disk."""


class Action(IntEnum):
    """What happens to a call."""

    NOTHING = 0
    KILL = 1  # SIGKILL before it is made
    TEAR = 2  # half of a write is made, then SIGKILL
    FAIL = 3
    SHORT = 4  # half of what was asked for is read or written
    END = 5  # a read finds the end of the file
    WAIT = 6
    PAUSE = 7  # until ``go_on``
    NODE = 8  # SIGKILL for the rank and all that it has started
    ORPHAN = 9  # SIGKILL for the rank, whoever made the call; what it has started goes on


class _Shared(ctypes.Structure):
    _fields_ = (
        ("root", ctypes.c_char * 1024),
        ("log", ctypes.c_char * 1024),
        ("where", ctypes.c_char * 512),
        ("classes", ctypes.c_uint32),
        ("action", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("lasting", ctypes.c_int32),
        ("at", ctypes.c_int64),
        ("microseconds", ctypes.c_int64),
        ("calls", ctypes.c_int64),
        ("hits", ctypes.c_int64),
        ("go", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Plan:
    """What shall happen to a process.

    Attributes:
        root: the folder; calls on paths below it count, and no others.
        classes: the classes of calls that count.
        action: what happens to one of them.
        at: its number, from 1; 0 only counts.
        error: the ``errno`` that a call fails with.
        lasting: whether it happens to every later call too.
        microseconds: how long a call waits.
        log: the file that every change is written to; empty for none.
    """

    root: str
    classes: Calls = CHANGES
    action: Action = Action.NOTHING
    at: int = 0
    error: int = 0
    lasting: bool = False
    microseconds: int = 0
    log: str = ""

    def write(self, path: Path) -> None:
        """Write the file that the shim maps."""
        shared = _Shared(
            os.path.realpath(self.root).encode(),
            self.log.encode(),
            b"",
            self.classes,
            self.action,
            self.error,
            self.lasting,
            self.at,
            self.microseconds,
        )
        path.write_bytes(bytes(shared))


@dataclass(frozen=True)
class Met:
    """What the shim tells.

    Attributes:
        calls: how many calls of these classes there were.
        hits: how many of them something happened to.
        where: the first of these, with its path.
    """

    calls: int
    hits: int
    where: str


def met(path: Path) -> Met:
    """Read what the shim has told in a plan's file."""
    shared = _Shared.from_buffer_copy(path.read_bytes())
    return Met(shared.calls, shared.hits, shared.where.decode(errors="replace"))


def go_on(path: Path) -> None:
    """Let a process that paused go on."""
    with path.open("r+b") as stream:
        stream.seek(_Shared.go.offset)
        stream.write((1).to_bytes(8, "little"))


@functools.cache
def shim() -> Path | None:
    """Compile the shim; None where that is not possible, for which ``missing`` has the reason."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not Path("/proc/self/fd").exists():
        return None
    built = Path(tempfile.gettempdir()) / f"crash-shim-{os.getuid()}-{_SOURCE.stat().st_mtime_ns}.so"
    if not built.exists():
        partial = built.with_suffix(f".{os.getpid()}")
        command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(partial), str(_SOURCE), "-ldl", "-lpthread"]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        partial.replace(built)
    return built


def missing() -> str | None:
    """Return why nothing can be killed here, None if it can."""
    return _MISSING if shim() is None else None


def arm(path: Path) -> None:
    """Wake the shim in this process, which must have it preloaded."""
    if ctypes.CDLL(None).shim_arm(str(path).encode()):
        raise OSError(f"the plan {path} cannot be mapped")


def disarm() -> None:
    """Send the shim to sleep again."""
    ctypes.CDLL(None).shim_disarm()


@contextmanager
def armed(path: Path) -> Iterator[None]:
    """Have the shim awake in this process for a while, and in all that it starts meanwhile."""
    os.environ[_INHERITED] = str(path)
    arm(path)
    try:
        yield
    finally:
        disarm()
        del os.environ[_INHERITED]
