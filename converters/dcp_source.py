"""Reading DCP checkpoints, composites included, in whatever keys their trainer used. Nothing in them is run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tailor_dcp.base import open_base
from tailor_dcp.catalog import Catalog
from tailor_dcp.companions import files_of
from tailor_dcp.contents import Contents
from tailor_dcp.errors import ConversionError, DamagedSourceError
from tailor_dcp.frames import has_frame
from tailor_dcp.location import METADATA
from tailor_dcp.metadata.compose import paths_of, shape_of, unstored
from tailor_dcp.open_checkpoint import Checkpoint
from tailor_dcp.raw_stretch import is_raw
from tailor_dcp.tensors import Readable
from tailor_dcp.unpickling import allowed
from tailor_dcp.verifying.coverage import TooManyCornersError, miscovered

from . import accelerate_folder
from .chunked import Chunk, Chunked, in_place
from .options import Options
from .sorting import sort
from .trainer_folder import is_trainer_folder, trainer_train

_MEGATRON = "common.pt"


def recognise(path: Path) -> bool:
    """Tell a DCP checkpoint, or Accelerate's folder of two, from its files' names."""
    return (path / METADATA).is_file() or bool(accelerate_folder.parts(path))


def open_source(path: Path, options: Options) -> Catalog:
    """Open a DCP checkpoint.

    Args:
        path: its folder, or the folder in which Accelerate keeps a model's and an optimizer's.
        options: ``allow`` admits classes of entries that are no tensors.

    Raises:
        NoCheckpointError: it is not committed.
        UnreadableMetadataError: its ``.metadata`` is damaged or hostile.
        LoadError: a file is missing, too short or outside of the run, or an entry holds a class that is not admitted.
        ConversionError: it is Megatron's, whose tensors are several layers in one.
    """
    if (path / METADATA).is_file():
        return _open(path, options, files_of(path))
    catalogs = [_open(part, options, {}) for part in accelerate_folder.parts(path)]
    if not catalogs:
        raise ConversionError(f"{path} holds no {METADATA}, so it is no committed DCP checkpoint; name one that is.")
    accelerate_folder.check_single(path)
    merged = replace(catalogs[0], source=path)
    for other in catalogs[1:]:
        merged = replace(
            merged, state={**merged.state, **other.state}, groups=(*merged.groups, *other.groups),
            weights={**other.weights, **merged.weights}, train={**other.train, **merged.train},
            dtypes={**other.dtypes, **merged.dtypes},
        )  # fmt: skip
    train = {**merged.train, **accelerate_folder.train_of(path, options)}
    files = accelerate_folder.files_of(path)
    if is_trainer_folder(path):
        trainer, carried = trainer_train(path, options)
        train, files = {**train, **trainer}, {**files, **carried}
    return replace(merged, train=train, files=files)


def _open(path: Path, options: Options, files: dict[str, Path]) -> Catalog:
    if (path / _MEGATRON).exists():
        raise ConversionError(
            f"{path} is a Megatron torch_dist checkpoint, whose tensors hold several layers each; convert it with "
            f"Megatron-LM's own tools/checkpoint/convert.py first."
        )
    contents = Contents(open_base(path))
    stored = contents.base.metadata.state_dict_metadata
    missing = unstored(contents.base.metadata)
    if missing:
        raise DamagedSourceError(
            f"{path / METADATA} does not tell where {missing[0]} is stored; use another checkpoint."
        )
    contents.check_files((index.fqn, info) for index, info in contents.base.metadata.storage_data.items())
    paths = paths_of(contents.base.metadata)
    tensors = {key for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    checkpoint = Checkpoint(contents, allowed(options.allow))
    leaders = _leaders(contents)
    known: dict[Places | str, Readable] = {}
    catalog = sort(
        path,
        "dcp",
        paths,
        tensors,
        lambda key: _tensor(contents, checkpoint, leaders.get(key, key), known),
        checkpoint.__getitem__,
    )
    return replace(catalog, files=files, dtypes=_dtypes(contents))


def _dtypes(contents: Contents) -> dict[tuple[str, str], torch.dtype]:
    """Return the dtype that training has what is stored in a narrower one, as far as the record tells."""
    record, entries = contents.base.record, contents.entries
    told = {key: contents.base.source_shape(key).dtype for key in (record.narrowed if record else ()) if key in entries}
    return {(entries[key].fqn, entries[key].unit.kind): dtype for key, dtype in told.items() if dtype is not None}


def _leaders(contents: Contents) -> dict[str, str]:
    """Return, for each other name of a tied tensor that the record knows of, the first one."""
    stored = contents.base.metadata.state_dict_metadata
    ties = contents.base.record.ties if contents.base.record else ()
    present = [[key for key in tie if key in stored] for tie in ties]
    return {
        other: tie[0] for tie in present for other in tie[1:] if shape_of(stored[other]) == shape_of(stored[tie[0]])
    }


Places = tuple[tuple[Path, int], ...]
"""The files and offsets that a tensor's chunks are stored at."""


def _check_parts(entry: TensorStorageMetadata, contents: Contents, key: str) -> None:
    """Refuse a tensor whose chunks do not fill it, each element once."""
    what = f"{contents.described(key)} in {contents.folder}"
    try:
        odd = miscovered(entry.size, [(chunk.offsets, chunk.sizes) for chunk in entry.chunks])
    except TooManyCornersError:
        raise DamagedSourceError(f"{what} is cut along more dimensions than any tensor is.") from None
    if odd is not None and odd.times > 1:
        raise DamagedSourceError(f"Parts of {what} lie over each other.")
    if odd is not None:
        raise DamagedSourceError(f"The parts of {what} do not add up to it.")


def _tensor(contents: Contents, checkpoint: Checkpoint, key: str, known: dict[Places | str, Readable]) -> Readable:
    """Return a tensor; one and the same for two names of the same bytes.

    Not so where the record tells what is tied: a merged checkpoint may have a layer several times.
    """
    entry = contents.base.metadata.state_dict_metadata[key]
    assert isinstance(entry, TensorStorageMetadata)
    if not has_frame(entry.properties.dtype):
        raise ConversionError(
            f"{contents.described(key)} in {contents.folder} is of {entry.properties.dtype}, which is not read here; "
            f"save plain tensors instead."
        )
    _check_parts(entry, contents, key)
    blobs = contents.base.blobs[key]
    plain = not any(info.transform_descriptors and not is_raw(info) for _, info in blobs)
    if plain and shape_of(entry).bytes > sum(info.length for _, info in blobs):  # metadata can claim any size
        raise DamagedSourceError(f"{contents.described(key)} is not stored in full in {contents.folder}.")
    places = {index.offset: info for index, info in blobs}
    chunks = []
    for chunk in sorted(entry.chunks, key=lambda c: tuple(c.offsets)):
        info = places.get(chunk.offsets) or blobs[0][1]  # what is stored as a whole tells no offset in its index
        chunks.append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), contents.file(info), info))
    chunked = Chunked(entry.size, entry.properties.dtype, tuple(chunks), key, checkpoint)
    found = in_place(chunked) or chunked
    told = contents.base.record is not None
    return known.setdefault(key if told else tuple((chunk.path, chunk.info.offset) for chunk in chunks), found)
