"""Locks: they keep others out, and end when they should."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tailor_dcp.errors import TailorError
from tailor_dcp.locks import Lock, alone_in


@contextmanager
def forked() -> Iterator[None]:
    """Have a child beside us, as the workers of a data loader are, with all descriptors that are open now."""
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def is_free(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)


def test_a_folder_is_free_again_though_a_child_was_forked_meanwhile(tmp_path: Path) -> None:
    """A save in the background commits while training starts the workers of a data loader, which live on."""
    with alone_in(tmp_path):
        assert not is_free(tmp_path)
        child = forked()
        child.__enter__()
    assert is_free(tmp_path)
    child.__exit__(None, None, None)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_by_the_name_of_a_lock_is_nobodys_lock(tmp_path: Path, there: bool) -> None:
    """What it leads to is neither made, nor locked, nor held against anybody."""
    theirs, path = tmp_path / "theirs", tmp_path / "lock"
    if there:
        theirs.write_text("theirs")
    path.symlink_to(theirs)
    lock = Lock(path, TailorError("busy"))
    lock.take()
    assert lock.taken and not path.is_symlink()
    assert theirs.exists() == there
    assert not there or (is_free(theirs) and theirs.read_text() == "theirs")
    lock.release()
    assert not path.exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_where_there_are_no_locks_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = Lock(tmp_path / "lock", TailorError("busy"))
    lock.take()
    assert lock.taken
    lock.release()
    with alone_in(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
