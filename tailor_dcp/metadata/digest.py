"""The digest of a checkpoint's metadata: of what it says, however it is pickled.

A pickle of the same content can differ in many bytes, and stock writers make it with Python's own pickler after all is
said. So what is digested is the content: columns of numbers for chunks and places, of which a large job has half a
million each, and plain values for the rest. Pure arithmetic.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from itertools import chain
from typing import Any, TypeGuard

import numpy as np
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, Metadata, TensorStorageMetadata

from tailor_dcp.metadata.record import ATTRIBUTE, DIGEST

_SCHEME = "1:"
"""What a digest begins with: which content it is of, and in which form."""
_NONE = 0xFFFFFFFF


def digest(metadata: Metadata) -> str | None:
    """Return the digest of everything that ``safe_pickle.loads`` reads of a ``.metadata``, less the digest itself.

    The order of ``storage_data`` counts only among entries that have the same fields, since that of others is lost
    where they are written in rows.

    Returns:
        None if something is of a type that no metadata of ours has.
    """
    hashed = blake2b(digest_size=16, person=b"tailor_dcp")
    put: Callable[[Any], None] = hashed.update
    try:
        states = list(metadata.state_dict_metadata.items())
        put(plain([[key, *_described(entry)] for key, entry in states]))
        chunks = [entry.chunks for _, entry in states if isinstance(entry, TensorStorageMetadata)]
        _put_columns(put, [c.offsets for c in chain(*chunks)], [c.sizes for c in chain(*chunks)])
        _put_places(put, metadata.storage_data)
        meta = metadata.storage_meta
        where = meta and meta.checkpoint_id
        told = meta and [
            os.fspath(where) if isinstance(where, os.PathLike) else where,
            meta.save_id,
            meta.load_id,
            list(meta.modules),
        ]
        record = getattr(metadata, ATTRIBUTE, None)
        if isinstance(record, dict):
            record = {key: value for key, value in record.items() if key != DIGEST}
        put(plain([metadata.planner_data, told, metadata.version, record]))
    except (TypeError, AttributeError, OverflowError, ValueError):
        return None
    return _SCHEME + hashed.hexdigest()


def is_newer(told: str, own: str) -> bool:
    """Tell whether a digest is of a scheme that this version does not know, rather than one that was damaged.

    Args:
        told: the digest that a record has.
        own: the one that this version makes of the same metadata.
    """
    scheme, _, value = told.partition(":")
    return scheme.isdigit() and f"{scheme}:" != _SCHEME and value != own.removeprefix(_SCHEME)


def is_digest(told: object) -> TypeGuard[str]:
    """Tell whether a record has any digest."""
    return isinstance(told, str)


def _described(entry: STORAGE_TYPES) -> list[Any]:
    if not isinstance(entry, TensorStorageMetadata):
        return []
    p = entry.properties
    about = [str(p.dtype), str(p.layout), p.requires_grad, str(p.memory_format), p.pin_memory]
    return [*about, tuple(entry.size), len(entry.chunks)]


def _put_places(put: Callable[[Any], None], places: Any) -> None:
    indexes, infos = list(places), list(places.values())
    offsets = [index.offset for index in indexes]
    hints = [index.index for index in indexes]
    transforms = [info.transform_descriptors for info in infos]
    absent = [np.fromiter(map(_is_none, column), bool, len(indexes)) for column in (hints, offsets, transforms)]
    order = np.lexsort(absent)
    _put_columns(
        put,
        [index.fqn for index in indexes],
        offsets,
        [info.relative_path for info in infos],
        transforms if absent[2].all() else [None if one is None else tuple(one) for one in transforms],
        order=order,
    )
    for numbers in (
        [-1 if hint is None else hint for hint in hints] if absent[0].any() else hints,
        [info.offset for info in infos],
        [info.length for info in infos],
    ):
        put(np.fromiter(numbers, "<i8", len(numbers))[order].tobytes())


def _is_none(value: object) -> bool:
    return value is None


def _put_columns(put: Callable[[Any], None], *columns: Sequence[Any], order: Any = slice(None)) -> None:
    """Put columns of texts or tuples: what is in them once and sorted, then for each row where it is there."""
    for column in columns:
        table = sorted(set(column) - {None})
        numbers: dict[Any, int] = {value: number for number, value in enumerate(table)}
        numbers[None] = _NONE
        put(plain([value if isinstance(value, str) else tuple(value) for value in table]))
        rows = np.fromiter(map(numbers.__getitem__, column), "<u4", len(column))
        put(rows[order].tobytes())
        put(struct.pack("<Q", len(rows)))


def plain(value: Any) -> bytes:
    """Return bytes that no other value of plain builtins has.

    Raises:
        TypeError: it holds something that is no plain builtin.
    """
    parts: list[bytes] = []
    _write(value, parts.append)
    return b"".join(parts)


def _write(value: Any, put: Callable[[bytes], None]) -> None:
    kind = type(value)
    if kind is str:
        data = value.encode("utf-8", "surrogatepass")
        put(b"s%d:" % len(data))
        put(data)
    elif kind is bytes:
        put(b"b%d:" % len(value))
        put(value)
    elif value is None or kind is bool or kind is int:
        put(b"%s;" % str(value).encode())
    elif kind is float:
        put(b"f")
        put(struct.pack("<d", value))
    elif kind in (list, tuple):
        put(b"%c%d:" % (b"l" if kind is list else b"t", len(value)))
        _write_all(value, put)
    elif kind is dict:
        put(b"d%d:" % len(value))
        _write_all(chain.from_iterable(value.items()), put)
    else:
        raise TypeError(f"{kind.__name__} is no plain builtin")


def _write_all(values: Iterable[Any], put: Callable[[bytes], None]) -> None:
    for value in values:
        _write(value, put)
