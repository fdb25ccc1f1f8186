"""Formats: how the library reaches checkpoints that are not DCP's.

The library knows no other format. Whoever does enters itself under the entry point group ``tailor_dcp.formats`` with
an object that does what ``Formats`` says; the package's own converters do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol, cast

import torch

from tailor_dcp.catalog import Catalog
from tailor_dcp.errors import TailorError

GROUP = "tailor_dcp.formats"


class Formats(Protocol):
    """What can be read and written besides plain DCP."""

    sources: tuple[str, ...]
    """The formats that can be read."""
    targets: tuple[str, ...]
    """The formats that can be written."""

    def recognised(self, path: Path) -> str | None:
        """Return the format of a file or folder, None if it is of none; it never raises."""

    def open(self, path: Path, weights_only: bool = False, allow: tuple[str, ...] = ()) -> Catalog:
        """Return what a checkpoint of any format holds, no tensor read yet.

        Raises:
            TailorError: it is of no known format, damaged, or holds a class that is not in ``allow``.
        """

    def write(
        self,
        catalog: Catalog,
        out: Path,
        to: str,
        *,
        world_size: int | None = None,
        dtype: torch.dtype | None = None,
        max_shard_size: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[str, ...]:
        """Write a checkpoint, complete or not at all; return what the user should know.

        Args:
            catalog: what to write, its weights named as in the live model.
            out: its folder or file; it must not exist.
            to: one of ``targets``.
            world_size: ranks that a ZeRO checkpoint is written for.
            dtype: what a ZeRO engine computes in.
            max_shard_size: bytes after which a Hugging Face folder begins a new file.
            progress: is told of bytes that were done, from any thread.

        Raises:
            TailorError: it cannot be written, or a source cannot be read.
        """


@lru_cache(maxsize=1)
def formats() -> Formats:
    """Return what can be read and written.

    Raises:
        TailorError: nothing has entered itself.
    """
    for entry in entry_points(group=GROUP):
        return cast(Formats, entry.load())
    raise TailorError(
        "No other format than DCP can be reached, as tailor_dcp is only partly installed; install it again."
    )
