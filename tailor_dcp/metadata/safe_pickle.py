"""Reads a checkpoint's ``.metadata`` without ever running code from it.

The file is a pickle, and unpickling runs what the pickle asks for. So no unpickler is used here. A small
interpreter knows the few pickle instructions that DCP writes; a name that a file asks for becomes a marker,
which can be used only in the one way that DCP uses it; everything else is refused. It never hashes, compares
or prints what it has not checked, follows no length or memo index past what is there, and copies nothing long
that can be referred to again, so that time and memory stay in proportion to the file.
"""

from __future__ import annotations

import stat
from itertools import chain, cycle
from operator import add, gt
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from tailor_dcp.collector import collector_off
from tailor_dcp.errors import NoCheckpointError, UnreadableMetadataError
from tailor_dcp.metadata.pickle_entries import SHORTCUTS
from tailor_dcp.metadata.pickle_machine import Machine
from tailor_dcp.metadata.pickle_names import (
    NONE,
    Pairs,
    Parts,
    RefusedError,
    checked_texts,
    damaged,
    kind_of,
    shown,
)
from tailor_dcp.metadata.seal import is_intact

MAX_DEPTH = 12  # of the plain values in ``tailor`` and ``planner_data``
# By references a small file can stand for a huge structure. An honest one has some too, such as a folder's name
# that many units share, but never stands for this many values for each of its bytes.
_MAX_GROWTH = 16
_MAX_COLLISIONS = 8  # honest keys hardly collide; many that do would make filling a dict quadratic


def read(path: Path) -> Metadata:
    """Read a ``.metadata`` file.

    Raises:
        NoCheckpointError: There is no such file.
        UnreadableMetadataError: It cannot be read, is damaged, or asks for what no checkpoint needs.
    """
    return loads(content(path), str(path))


def content(path: Path) -> bytes:
    """Return the bytes of a ``.metadata`` file.

    Raises:
        NoCheckpointError: There is no such file.
        UnreadableMetadataError: It cannot be read.
    """
    try:
        # Opening a pipe that somebody left there would wait for ever. Stores have none.
        if isinstance(path, Path) and not stat.S_ISREG(path.stat().st_mode):
            raise UnreadableMetadataError(f"{path} is not a regular file, so it was not opened.")
        if (
            isinstance(path, Path)
            and path.is_symlink()
            and not path.resolve().is_relative_to(path.parent.resolve().parent)
        ):
            raise UnreadableMetadataError(f"{path} is a link that leads out of its run, so it was not opened.")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise NoCheckpointError(
            f"{path} does not exist, so {path.parent} is no committed checkpoint; name a folder that is one."
        ) from None
    except MemoryError as error:
        raise UnreadableMetadataError(
            f"{path} is larger than the memory that there is; use another checkpoint."
        ) from error
    except OSError as error:
        raise UnreadableMetadataError(f"{path} cannot be read: {error.strerror}.") from error


def loads(data: bytes, source: str) -> Metadata:
    """Make a ``Metadata`` of the bytes of a ``.metadata`` file, running nothing.

    It equals what ``pickle.loads`` gives, except that a path as ``checkpoint_id`` is a ``str``, that classes
    of older torch versions become today's, and that attributes unknown to DCP and to us are dropped.

    Args:
        data: The file's bytes.
        source: The file's name, for messages.

    Raises:
        UnreadableMetadataError: The bytes are damaged, or ask for what no checkpoint needs.
    """
    with collector_off():
        try:
            if is_intact(data) is False:
                damaged("its checksum differs")
            return _metadata(Machine(data, SHORTCUTS).run(), len(data))
        except RefusedError as refused:
            raise UnreadableMetadataError(f"{source} {refused}") from None


_ATOMS = frozenset({str, int, float, bool, NONE, bytes})


def _metadata(root: object, length: int) -> Metadata:
    if type(root) is not Metadata:
        damaged(f"what it holds is of type {kind_of(root)}")
    given = vars(root)
    for needed in ("state_dict_metadata", "storage_data"):
        if needed not in given:
            damaged(f"it has no {needed}")
    made = Metadata(
        state_dict_metadata=_states(given["state_dict_metadata"], length),
        planner_data=_Plain("planner_data", _MAX_GROWTH * length).of(given.get("planner_data"))[0],
        storage_data=_places(given["storage_data"]),
        storage_meta=_storage_meta(given.get("storage_meta")),
        version=given.get("version"),
    )
    if "tailor" in given:
        vars(made)["tailor"] = _Plain("tailor", _MAX_GROWTH * length).of(given["tailor"])[0]
    return made


def _storage_meta(meta: StorageMeta | None) -> StorageMeta | None:
    if meta is None:
        return None
    where: Any = meta.checkpoint_id
    if type(where) is Parts:
        meta.checkpoint_id = str(where.kind(*checked_texts(where.parts, "a part of the path checkpoint_id")))
    meta.modules = list(checked_texts(vars(meta).get("modules", ()), "a module's name"))
    return meta


def _states(pairs: Pairs, length: int) -> dict[str, TensorStorageMetadata | BytesStorageMetadata]:
    fqns, states = pairs[::2], pairs[1::2]
    checked_texts(fqns, "what an entry is called")
    for fqn, state in zip(fqns, states, strict=True):
        if type(state) is TensorStorageMetadata:
            length -= len(state.chunks)  # many tensors may refer to one long list
            if length < 0:
                damaged("its tensors have more chunks than it has bytes")
            _check_chunks(fqn, state)
        elif type(state) is not BytesStorageMetadata:
            damaged(f"the entry {shown(fqn)} is neither a tensor nor bytes")
    return dict(zip(fqns, states, strict=True))


def _check_chunks(fqn: str, tensor: TensorStorageMetadata) -> None:
    if set(map(type, tensor.chunks)) - {ChunkStorageMetadata}:
        damaged(f"the chunks of {shown(fqn)} are no chunks")
    offsets = [chunk.offsets for chunk in tensor.chunks]
    sizes = [chunk.sizes for chunk in tensor.chunks]
    ends = map(add, chain.from_iterable(offsets), chain.from_iterable(sizes))
    if set(map(len, chain(offsets, sizes))) - {len(tensor.size)} or any(map(gt, ends, cycle(tensor.size))):
        damaged(f"a chunk of {shown(fqn)} lies outside of the tensor")


def _places(pairs: Pairs) -> dict[MetadataIndex, _StorageInfo]:
    indexes, infos = pairs[::2], pairs[1::2]
    if set(map(type, indexes)) - {MetadataIndex} or set(map(type, infos)) - {_StorageInfo}:
        damaged("storage_data does not say where entries are stored")
    for path in {info.relative_path for info in infos}:
        if "\0" in path:
            damaged(f"the data file's name {shown(path)} has a NUL")
    return _dict(indexes, infos)


def _dict(keys: list[Any], values: list[Any]) -> dict[Any, Any]:
    """A dict of keys that are harmless to hash, and not made to collide."""
    if len(keys) - len(set(map(hash, keys))) > _MAX_COLLISIONS:
        damaged("the keys of a dict are equal, or chosen to have equal hashes")
    return dict(zip(keys, values, strict=True))


class _Plain:
    """Copies a value made of builtins alone, keeping what it shares; refuses what is too deep or too large."""

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.limit = limit
        self.done: dict[int, tuple[Any, int, int]] = {}

    def of(self, value: Any, room: int = MAX_DEPTH) -> tuple[Any, int, int]:
        """The copy, how deep it is, and how large it would be without references."""
        if type(value) in _ATOMS:
            return value, 0, 1 + (len(value) // 64 if type(value) in (str, bytes) else 0)
        if type(value) not in (list, tuple, Pairs):
            damaged(f"{self.name} holds a value of type {kind_of(value)}, which is no plain one")
        if id(value) in self.done:
            made = self.done[id(value)]
        elif room:
            made = self.done[id(value)] = self.container(value, [self.of(part, room - 1) for part in value])
        if not room or made[1] > room:
            damaged(f"{self.name} is deeper than {MAX_DEPTH} levels")
        return made

    def container(self, value: Any, parts: list[tuple[Any, int, int]]) -> tuple[Any, int, int]:
        size = 1 + sum(part[2] for part in parts)
        if size > self.limit:
            damaged(f"{self.name} refers to the same values too often")
        copies = [part[0] for part in parts]
        made = copies if type(value) is list else tuple(copies) if type(value) is tuple else self.mapping(copies)
        return made, 1 + max((part[1] for part in parts), default=0), size

    def mapping(self, pairs: list[Any]) -> dict[Any, Any]:
        for key in pairs[::2]:
            if set(map(type, key if type(key) is tuple else (key,))) - _ATOMS:
                damaged(f"a key in {self.name} is neither one value nor a flat tuple of values")
        return _dict(pairs[::2], pairs[1::2])
