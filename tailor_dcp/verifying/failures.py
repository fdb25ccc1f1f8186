"""Failures: what an error says of a file: that its bytes are lost, or only that they cannot be had from here and now.

A network that is down, a token that has expired and another user's file are no damage: nobody should follow a repair
plan because of them.
"""

from __future__ import annotations

import errno
from pathlib import Path

from tailor_dcp.store_path import reason
from tailor_dcp.stores import is_remote

_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR})
_LOST = frozenset({errno.EIO, errno.EUCLEAN, errno.EBADMSG})
"""What disks and their file systems say of bytes that they have no more."""


def is_gone(error: OSError) -> bool:
    """Tell whether an error says that there is no such file."""
    return error.errno in _GONE


def is_lost(error: OSError, path: Path) -> bool:
    """Tell whether an error says that bytes are lost. A store has one number for whatever it cannot do."""
    return error.errno in _LOST and not is_remote(path)


def unread(error: BaseException) -> str:
    """Return half a sentence of what could not be read."""
    return f"could not be read: {reason(error)}; nothing is said about it"
