"""The commit: a checkpoint exists from the moment its ``.metadata`` has its name."""

from __future__ import annotations

import os
import pickle
from contextlib import suppress
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata

from tailor_dcp.carry import sync_folder
from tailor_dcp.collector import collector_off
from tailor_dcp.location import METADATA


def commit(metadata: Metadata, folder: Path) -> None:
    """Write a folder's ``.metadata``, complete or not at all, once everything that it names is on the disk."""
    partial = folder / f"{METADATA}.tmp"
    with collector_off(), partial.open("wb") as stream:
        pickle.dump(metadata, stream)
        stream.flush()
        os.fsync(stream.fileno())
    sync_folder(folder)
    partial.replace(folder / METADATA)
    with suppress(OSError):
        sync_folder(folder)
