"""The commit: a checkpoint exists from the moment its ``.metadata`` has its name."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata

from tailor_dcp.carry import open_anew, sync_folder
from tailor_dcp.location import METADATA
from tailor_dcp.metadata.compose import sign
from tailor_dcp.metadata.pickle_writer import dump, dumps
from tailor_dcp.stores import is_remote


def commit(
    metadata: Metadata,
    folder: Path,
    time_ns: int | None = None,
    growing: str = f"{METADATA}.tmp",
    signed: bool = True,
) -> None:
    """Write a folder's ``.metadata``, complete or not at all, once everything that it names is on the disk.

    In an object store it is put when everything else is there; objects appear as a whole, so nothing is renamed.

    Args:
        metadata: what is committed.
        folder: where to.
        time_ns: when it shall look written, on a disk; None for now.
        growing: what it is called there until it is complete.
        signed: whether to note what tells whether it was changed since; not where nothing told that of what was read.
    """
    if signed:
        sign(metadata)
    if is_remote(folder):
        (folder / METADATA).write_bytes(dumps(metadata))
        return
    partial = folder / growing
    with open_anew(partial) as stream:
        dump(metadata, stream)
        stream.flush()
        if time_ns is not None:
            os.utime(stream.fileno(), ns=(time_ns, time_ns))
        os.fsync(stream.fileno())
    sync_folder(folder)
    partial.replace(folder / METADATA)
    with suppress(OSError):
        sync_folder(folder)
