"""Locks: two calls that would write one result must not write over each other."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tailor_dcp.errors import TailorError


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other save commits in a folder or removes anything from it, where the file system can tell.

    Args:
        folder: a local folder; the lock is the folder's own and leaves nothing behind.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # not every file system has locks, and saves into one folder at once are rare
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        _let_go(descriptor)


def _let_go(descriptor: int) -> None:
    """End a lock. A process that was forked meanwhile has the descriptor as well, and closing ours would not do."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def is_held(path: Path) -> bool:
    """Tell whether a process has a lock; it ends with the process, however that ended."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # nobody can tell
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return True
    _let_go(descriptor)
    return False


_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL})
"""What file systems without locks say, where work must go on all the same."""


class Lock:
    """Keeps other processes, and other calls in this one, from writing one result.

    Args:
        path: a file beside the result; the lock itself ends with the process, whatever happens to that.
        busy: what is raised if another has it.
    """

    def __init__(self, path: Path, busy: TailorError) -> None:
        self._path, self._busy = path, busy
        self._descriptor: int | None = None

    @property
    def taken(self) -> bool:
        """Whether it is ours."""
        return self._descriptor is not None

    def take(self) -> None:
        """Take it.

        Raises:
            TailorError: another has it.
        """
        while self._descriptor is None:
            try:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                self._path.unlink(missing_ok=True)  # a link is nobody's lock, and may lead anywhere
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise self._busy from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(descriptor)
                    raise
            if self._is_there(descriptor):
                self._descriptor = descriptor
            else:  # whoever had it removed the file just now: it keeps nobody out any more
                os.close(descriptor)

    def release(self) -> None:
        """Give it back."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            _let_go(self._descriptor)
            self._descriptor = None

    def _is_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.stat())
        except FileNotFoundError:
            return False
