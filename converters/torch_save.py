"""torch.save files to and from DCP checkpoints. Nothing in either is executed."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from tailor_dcp.errors import TailorError
from tailor_dcp.location import METADATA
from tailor_dcp.metadata.safe_pickle import read
from tailor_dcp.planner import LayerwisePlanner
from tailor_dcp.writer import LayerwiseWriter


class ConversionError(TailorError):
    """The source cannot be converted; nothing was written."""


class _SafeReader(dcp.FileSystemReader):
    """Reads ``.metadata`` without running what is in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read(Path(self.path) / METADATA)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        return metadata


class _SafePlanner(_EmptyStateDictLoadPlanner):
    """Builds the whole state dict from the metadata; entries that are no tensors run no code either."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        key = read_item.dest_index.fqn
        set_element(self.original_state_dict, self.mappings[key], _load(value, key))


def to_torch(source: Path, target: Path) -> None:
    """Write a DCP checkpoint, a composite or not, as one torch.save file.

    Args:
        source: the checkpoint's folder.
        target: the file to write; it appears only when it is complete.

    Raises:
        NoCheckpointError: the folder is not a committed checkpoint.
        ConversionError: an entry holds a class that torch's safe loading does not admit.
    """
    state: dict[str, Any] = {}
    try:
        planner = _SafePlanner()  # type: ignore[no-untyped-call]
        _load_state_dict(state, _SafeReader(source), planner=planner, no_dist=True)
    except CheckpointException as error:  # what went wrong inside, without DCP's traceback around it
        cause = next(iter(error.failures.values()))[0]
        raise cause if isinstance(cause, TailorError) else ConversionError(f"{source}: {cause}") from None
    partial = target.with_name(f"{target.name}.partial")
    try:
        with partial.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def to_dcp(source: Path, target: Path) -> None:
    """Write a torch.save file that holds a state dict as a DCP checkpoint that later saves can carry from.

    Args:
        source: the file.
        target: the folder to write.

    Raises:
        ConversionError: the file is damaged, holds no dict, or holds a class that safe loading does not admit.
    """
    state = _load(source, str(source))
    if not isinstance(state, dict):
        raise ConversionError(f"{source} holds a {type(state).__name__}, not a dict; save a state dict instead.")
    dcp.save(state, storage_writer=LayerwiseWriter(target), planner=LayerwisePlanner("full", base=None), no_dist=True)


def _load(source: Path | io.BytesIO, name: str) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=isinstance(source, Path) or None)
    except OSError as error:
        raise ConversionError(f"{name} cannot be read: {error.strerror}.") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConversionError(
            f"{name} cannot be read safely ({str(error).splitlines()[0]}); if you trust a class in it, admit it with "
            f"torch.serialization.add_safe_globals in Python."
        ) from error
