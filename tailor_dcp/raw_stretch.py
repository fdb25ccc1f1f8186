"""Raw stretches: parts of tensors that lie in another program's files exactly as they are in memory.

A linked checkpoint has them where others have what ``torch.save`` made of each chunk. DCP's own reader would take them
for that; so each has the name of a transform that DCP does not know, which is the sentence that its error then shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

_PREFIX = "tailor_dcp raw bytes"

RAW = (f"{_PREFIX}: load with tailor_dcp.LayerwiseReader, or make a plain copy with `tailor materialize`",)
"""The transforms of a raw stretch. No slash may be in it: DCP shows what is before the first one."""


@dataclass
class Described(_StorageInfo):
    """A place together with what is there, where the metadata at hand tells nothing of that.

    Attributes:
        shape: of the chunk.
        dtype: its dtype.
    """

    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None


def raw(relative_path: str, offset: int, length: int) -> _StorageInfo:
    """Return the place of a raw stretch."""
    return _StorageInfo(relative_path, offset, length, RAW)


def is_raw(info: _StorageInfo) -> bool:
    """Tell whether a place is a raw stretch's; the sentence's end may differ between versions."""
    transforms = info.transform_descriptors
    return bool(transforms) and len(transforms) == 1 and transforms[0].startswith(_PREFIX)  # type: ignore[arg-type, index]


def is_linked(metadata: Metadata) -> bool:
    """Tell whether a checkpoint has raw stretches, so that DCP's own reader cannot load it."""
    return any(map(is_raw, metadata.storage_data.values()))


def bytes_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the bytes that a chunk takes as it is in memory."""
    return math.prod(shape) * dtype.itemsize
