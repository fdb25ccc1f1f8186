"""Materializing: a self-contained copy of the bytes that a checkpoint needs, and of no others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from tailor_dcp.base import Base, open_base
from tailor_dcp.blob_copier import BlobCopier, DamagedCheckpointError, Stretch, stretch_of
from tailor_dcp.carry import sync_folder
from tailor_dcp.commit import commit
from tailor_dcp.companions import files_of, put_files
from tailor_dcp.errors import TailorError, UnreadableMetadataError
from tailor_dcp.inspection import unit_records
from tailor_dcp.lineage import new_save_id
from tailor_dcp.location import METADATA, is_url, is_within
from tailor_dcp.metadata.compose import StorageData, unstored
from tailor_dcp.metadata.record import ATTRIBUTE, Record
from tailor_dcp.ranges import Advance
from tailor_dcp.raw_stretch import bytes_of, is_raw

LARGEST_FILE = 4 << 30
"""Bytes after which a new file is begun; a blob is never split."""


__all__ = ["DamagedCheckpointError", "MaterializeError", "Materialized", "materialize"]


class MaterializeError(TailorError, ValueError):
    """The copy cannot be made as it is asked for."""


@dataclass(frozen=True)
class Materialized:
    """What was copied.

    Attributes:
        path: the new checkpoint's folder.
        bytes: bytes of its data files.
        files: how many these are.
        blobs: how many stretches of bytes were copied.
        checked: how many of these had a checksum, which agreed.
    """

    path: str
    bytes: int
    files: int
    blobs: int
    checked: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain builtins, for ``--json``."""
        return asdict(self)


def materialize(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    verify: bool = True,
    largest_file: int = LARGEST_FILE,
    progress: Callable[[int, int], None] | None = None,
) -> Materialized:
    """Copy what a checkpoint needs into a folder that needs no other.

    Only live bytes are copied, in the order of the state dict. The new checkpoint is a save of its
    own that remembers the origins; plain ``dcp.load`` reads it, also where the input is linked to another program's
    files: every raw stretch becomes a blob of DCP's. It appears under its name when it
    is complete, and the input is never changed.

    Args:
        checkpoint: the folder to copy from.
        out: the folder to make; it must not exist.
        verify: check each blob against its checksum where there is one, and note a checksum of each.
            Without it bytes are copied inside the kernel, and known checksums are carried over.
        largest_file: bytes after which a new file is begun.
        progress: is told how many of how many bytes are done.

    Raises:
        MaterializeError: ``out`` exists, or cannot be written.
        NoCheckpointError: ``checkpoint`` is not committed.
        UnreadableMetadataError: its ``.metadata`` is damaged, or names files outside of its run.
        DamagedCheckpointError: a file is missing, too short or changed, or a checksum differs.
    """
    target = new_folder(out)
    base = open_base(Path(checkpoint))
    return materialize_base(base, target, files_of(base.location.folder), verify, largest_file, progress)


def materialize_base(
    base: Base,
    target: Path,
    companions: Mapping[str, Path],
    verify: bool = True,
    largest_file: int = LARGEST_FILE,
    progress: Callable[[int, int], None] | None = None,
) -> Materialized:
    """Copy what a checkpoint needs that may so far be nowhere but in memory; see ``materialize``.

    Args:
        base: the checkpoint.
        target: the folder to make.
        companions: the files that it carries along.
        verify: see ``materialize``.
        largest_file: see ``materialize``.
        progress: see ``materialize``.
    """
    stretches = _stretches(base)
    partial = target.with_name(f".{target.name}.materialize")
    with _partial_folder(partial, target):
        save_id = new_save_id()
        copier = BlobCopier(base, partial, save_id, verify, largest_file, _advance(stretches, progress))
        with closing(copier):
            for stretch in stretches:
                copier.copy(stretch)
        put_files(companions, partial)
        commit(_metadata(base, target, save_id, copier), partial)
        partial.rename(target)
        sync_folder(target.parent)
    return Materialized(str(target), copier.bytes, copier.files, len(stretches), copier.checked)


def new_folder(out: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a folder that shall be made.

    Raises:
        MaterializeError: it exists, or is not local.
    """
    if is_url(out):
        raise MaterializeError(f"{os.fspath(out)} is on an object store; only a local folder can be written.")
    target = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link that lies there
    if target.exists() or target.is_symlink():
        raise MaterializeError(f"{target} exists already; name a folder that does not.")
    return target


@contextmanager
def _partial_folder(partial: Path, target: Path) -> Iterator[None]:
    """Make the folder that a copy grows in; nothing of it stays if the copy fails."""
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a copy that was killed
        partial.mkdir(parents=True)
        yield
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, TailorError):
            raise MaterializeError(f"{target} cannot be written: {error.strerror or error}.") from error
        raise


def _advance(stretches: list[Stretch], progress: Callable[[int, int], None] | None) -> Advance:
    total, done = sum(stretch.length for stretch in stretches), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    return advance


# What to copy -----------------------------------------------------------------------------


def _stretches(base: Base) -> list[Stretch]:
    """Return the live bytes in the order of the state dict, each once.

    Raises:
        UnreadableMetadataError: they cannot be what a save has written.
    """
    source = base.location.folder / METADATA
    missing = unstored(base.metadata)
    if missing:
        raise UnreadableMetadataError(f"{source} does not tell where {missing[0]} is stored; nothing was copied.")
    infos = [info for blobs in base.blobs.values() for _, info in blobs]
    for name in dict.fromkeys(info.relative_path for info in infos):
        if name not in base.files and not is_within(base.location.folder / name, base.location.run):
            raise UnreadableMetadataError(
                f"{source} names {name}, which lies outside of the run {base.location.run}; nothing was copied."
            )
    stretches = list(
        dict.fromkeys(stretch_of(index, info, base.metadata) for blobs in base.blobs.values() for index, info in blobs)
    )
    for one, other in pairwise(sorted(stretches, key=lambda stretch: stretch[:3])):
        # Overlapping ones could make a small file fill a disk.
        if one.file == other.file and one.offset + one.length > other.offset:
            raise UnreadableMetadataError(
                f"{source} places two entries in the same bytes of {one.file}; it is damaged."
            )
    for stretch in stretches:
        told = bytes_of(stretch.shape, stretch.dtype) if stretch.shape is not None and stretch.dtype else None
        if told is not None and (told != stretch.length or not told):
            raise UnreadableMetadataError(f"{source} tells two sizes of what is in {stretch.file}; it is damaged.")
    return stretches


# Writing it down --------------------------------------------------------------------------


def _metadata(base: Base, target: Path, save_id: str, copier: BlobCopier) -> Metadata:
    old = base.metadata
    moved: StorageData = {}
    for index, info in ((index, info) for blobs in base.blobs.values() for index, info in blobs):
        place = copier.places[stretch_of(index, info, old)]
        transforms = None if is_raw(info) else info.transform_descriptors
        moved[index] = replace(place, transform_descriptors=transforms)
    modules = old.storage_meta.modules if old.storage_meta else []
    metadata = Metadata(
        state_dict_metadata=old.state_dict_metadata,
        planner_data=old.planner_data,
        storage_data=moved,
        storage_meta=StorageMeta(checkpoint_id=str(target), save_id=save_id, modules=list(modules)),
        version=old.version,
    )
    record = _record(base, save_id, copier.crcs)
    if record is not None:
        setattr(metadata, ATTRIBUTE, record.to_builtins())
    return metadata


def _record(base: Base, save_id: str, crcs: dict[str, dict[int, int]]) -> Record | None:
    """Return the record: a save of its own that has copied everything and remembers where it comes from."""
    if not base.save_id:
        return None  # an old torch's, whose saves have no names: nothing could refer to it
    old = base.record or Record(
        save_id=base.save_id,
        step=base.origin.step,
        index=base.origin.nth,
        time=(base.location.folder / METADATA).stat().st_mtime,
        policy="full",
        carry="copy",
        parent=None,
        units=unit_records(base),
    )
    # The time stays: it holds an old state, and among the checkpoints of a run must not pass for the newest.
    # What was only put together in memory is nobody's parent: what it came from is.
    parent = old.parent if base.files else base.origin
    return replace(old, save_id=save_id, carry="copy", parent=parent, crcs=crcs, marks={})
