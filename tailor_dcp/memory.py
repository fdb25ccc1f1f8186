"""Memory: what this process has taken at most."""

from __future__ import annotations

import resource
import sys


def peak_memory() -> int:
    """Return the largest amount of memory that this process held, in bytes, pages of files included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
