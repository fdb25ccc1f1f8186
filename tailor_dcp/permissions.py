"""Permissions: what this process may do to a folder, asked before the first of several things is done to it."""

from __future__ import annotations

import os
from pathlib import Path


def can_list(folder: Path) -> bool:
    """Tell whether the names in a folder, and what they lead to, can be seen."""
    return os.access(folder, os.R_OK | os.X_OK, effective_ids=True)


def can_write(folder: Path) -> bool:
    """Tell whether names can be put into a folder and taken out of it."""
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=True)


def can_restore(folder: Path) -> bool:
    """Tell whether a folder can be written to and then given its old time back, which its owner alone may."""
    return can_write(folder) and os.geteuid() in (0, folder.stat().st_uid)
