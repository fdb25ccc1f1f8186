"""Calls that are killed with SIGKILL at their n-th change to a folder, each in a forked child.

Python announces what it asks of the file system to audit hooks before it does it. Only what
changes something is counted: between two such calls nothing is different.
"""

from __future__ import annotations

import os
import signal
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_COUNTED = frozenset(
    {"os.link", "os.symlink", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.utime", "shutil.rmtree"}
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def killed_at(n: int, root: Path, call: Callable[[], Any]) -> bool:
    """Call in a child that is killed at its n-th change below ``root``; False if it came to its end before.

    Nothing that the child does may start threads: a fork has none of its parent's.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            _die_at(n, str(root))
            call()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0, "the call failed otherwise than by the kill"
    return os.WIFSIGNALED(status)


def _die_at(n: int, root: str) -> None:
    import sys

    left = n

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if _changes(event, arguments) and any(_concerns(argument, root) for argument in arguments[:2]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _changes(event: str, arguments: tuple[Any, ...]) -> bool:
    return event in _COUNTED or (event == "open" and bool(arguments[2] & _WRITING))


def _concerns(argument: Any, root: str) -> bool:
    return isinstance(argument, (str, os.PathLike)) and os.fspath(argument).startswith(root)


def disk_use(folder: Path) -> int:
    """Return the bytes of all files below a folder, each counted once however many names it has."""
    found = [path.lstat() for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return sum({(status.st_dev, status.st_ino): status.st_size for status in found}.values())
