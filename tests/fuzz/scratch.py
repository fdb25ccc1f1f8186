"""Files in memory that each input is put into, for parsers that want a path."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

_MEMORY = Path("/dev/shm")


def folder(pid: int | None = None) -> Path:
    """Return the folder of a process's files."""
    around = _MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir())
    return around / f"tailor-fuzz-{pid or os.getpid()}"


def remove(pid: int | None = None) -> None:
    """Remove a process's files: libFuzzer ends a process without asking it."""
    shutil.rmtree(folder(pid), ignore_errors=True)
    _descriptor.cache_clear()


@cache
def _descriptor(name: str, pid: int) -> int:
    path = folder(pid) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def put(data: bytes, name: str = "input") -> Path:
    """Return a file, filled anew."""
    descriptor = _descriptor(name, os.getpid())
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, data, 0)
    return folder() / name
