"""Live bytes: the stretches of files that a checkpoint needs, each once, and whether they are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from tailor_dcp.base import Base
from tailor_dcp.blob_copier import DamagedCheckpointError, Source, unreadable
from tailor_dcp.errors import UnreadableMetadataError
from tailor_dcp.frames import frame
from tailor_dcp.layout import Blob, Stretch
from tailor_dcp.location import METADATA, is_in_run
from tailor_dcp.metadata.compose import chunk_shape, unstored
from tailor_dcp.ranges import ends
from tailor_dcp.raw_stretch import bytes_of, is_raw
from tailor_dcp.stores import sizes


def stretch_of(index: MetadataIndex, info: _StorageInfo, metadata: Metadata) -> Stretch:
    """Return where a chunk lies."""
    lies = Stretch(info.relative_path, info.offset, info.length)
    entry = metadata.state_dict_metadata.get(index.fqn)
    if not is_raw(info) or not isinstance(entry, TensorStorageMetadata):
        return lies
    return lies._replace(shape=tuple(chunk_shape(index, entry)), dtype=entry.properties.dtype)


def live_blobs(base: Base) -> list[Blob]:
    """Return the live bytes in the order of the state dict, each once; their sizes are still the stretches'.

    Raises:
        UnreadableMetadataError: they cannot be what a save has written.
    """
    source = base.location.folder / METADATA
    missing = unstored(base.metadata)
    if missing:
        raise UnreadableMetadataError(f"{source} does not tell where {missing[0]} is stored; nothing was copied.")
    infos = [info for blobs in base.blobs.values() for _, info in blobs]
    for name in dict.fromkeys(info.relative_path for info in infos):
        if name not in base.files and not is_in_run(base.path(name), base.location):
            raise UnreadableMetadataError(
                f"{source} names {name}, which lies outside of the run {base.location.run}; nothing was copied."
            )
    crcs = base.record.crcs if base.record else {}
    found: dict[Stretch, Blob] = {}
    for index, info in (pair for blobs in base.blobs.values() for pair in blobs):
        stretch = stretch_of(index, info, base.metadata)
        known = crcs.get(stretch.file, {}).get(stretch.offset)
        found.setdefault(stretch, Blob(stretch, stretch.length, known, index.fqn))
    for one, other in pairwise(sorted(found, key=lambda stretch: stretch[:3])):
        # Overlapping ones could make a small file fill a disk.
        if one.file == other.file and one.end > other.offset:
            raise UnreadableMetadataError(
                f"{source} places two entries in the same bytes of {one.file}; it is damaged."
            )
    for stretch in found:
        told = bytes_of(stretch.shape, stretch.dtype) if stretch.shape is not None and stretch.dtype else None
        if stretch.offset < 0 or stretch.length < 0 or (told is not None and (told != stretch.length or not told)):
            raise UnreadableMetadataError(f"{source} tells two sizes of what is in {stretch.file}; it is damaged.")
    return list(found.values())


def source_of(base: Base, name: str) -> Source:
    """Return where a file of a checkpoint is."""
    mark = base.record.marks.get(name) if base.record else None
    return Source(base.path(name), mark, base.location.folder)


def checked_sizes(blobs: Sequence[Blob], sources: Mapping[str, Source]) -> dict[str, int]:
    """Return the bytes of each file.

    Raises:
        DamagedCheckpointError: one is missing, or has fewer than are needed.
    """
    needed: dict[str, int] = {}
    for blob in blobs:
        needed[blob.stretch.file] = max(needed.get(blob.stretch.file, 0), blob.stretch.end)
    found = dict(zip(sources, sizes([source.path for source in sources.values()]), strict=True))
    checked = {}
    for name, size in found.items():
        path = sources[name].path
        if size is None:
            raise DamagedCheckpointError(f"{path} is missing, or is no file; use another checkpoint.")
        if size < needed[name]:
            raise unreadable(path, ends(size, needed[name]))
        checked[name] = size
    return checked


def blob_size(stretch: Stretch) -> int:
    """Return the bytes of the blob that a stretch becomes. Only of what is known to be there: a frame takes as much."""
    if stretch.shape is None or stretch.dtype is None:
        return stretch.length
    before, after = frame(stretch.shape, stretch.dtype, 0)
    return len(before) + stretch.length + len(after)
