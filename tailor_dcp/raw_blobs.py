"""Raw blobs: where, within what ``torch.save`` wrote of one tensor, the tensor's own bytes lie.

A DCP blob is a zip archive of stored records; one of them has the tensor's bytes exactly as they are in memory, and
the first is the pickle that says its shape and dtype. All before the bytes is the same for all tensors of one shape and
dtype, so each such head is interpreted once.
"""

from __future__ import annotations

import io
import math
import struct
import sys
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch._weights_only_unpickler import Unpickler

HEAD = 4096
"""Bytes from a blob's start within which its tensor's bytes begin; torch's own heads have some 700."""

_LOCAL = struct.Struct("<4s22xHH")  # signature; lengths of name and extra field
_SIGNATURE = b"PK\x03\x04"
_RECORD = b"/data/0"


class Plain(NamedTuple):
    """A tensor whose elements lie in a blob in row-major order, without gaps.

    Attributes:
        start: the byte of the blob where they start.
        shape: the tensor's shape.
        dtype: its dtype.
    """

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """The bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def plain(head: bytes, length: int) -> Plain | None:
    """Return what a blob holds.

    Args:
        head: the first ``HEAD`` bytes of the blob, or all of it.
        length: bytes of the blob.

    Returns:
        None if it is anything but one plain contiguous tensor that has elements.
    """
    start = _record_start(head)
    if start is None:
        return None
    found = _interpreted(head[:start])
    return found if found is not None and 0 < found.bytes <= length - start else None


def _record_start(head: bytes) -> int | None:
    """Return where the first record begins that is named as a tensor's data."""
    at = head.find(_SIGNATURE)
    while 0 <= at <= len(head) - _LOCAL.size:
        _, name, extra = _LOCAL.unpack_from(head, at)
        end = at + _LOCAL.size + name
        if head[at + _LOCAL.size : end].endswith(_RECORD):
            return end + extra if end + extra <= len(head) else None
        at = head.find(_SIGNATURE, end)
    return None


class Described(NamedTuple):
    """What a blob says of the tensor that it is, however its elements lie.

    Attributes:
        shape: the tensor's shape.
        strides: its strides, in elements.
        dtype: its dtype.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def described(head: bytes) -> Described | None:
    """Return what a blob says that it is, from its first ``HEAD`` bytes; None if that is no strided tensor."""
    start = _record_start(head)
    tensor = _tensor(head[:start], []) if start is not None else None
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.is_quantized:
        return None
    return Described(tuple(tensor.shape), tensor.stride(), tensor.dtype)


@lru_cache(maxsize=1 << 14)
def _interpreted(head: bytes) -> Plain | None:
    """Interpret the pickle that an archive begins with; nothing in it is run."""
    storages: list[tuple[str, int]] = []
    tensor = _tensor(head, storages)
    whole = type(tensor) is torch.Tensor and tensor.is_contiguous() and tensor.storage_offset() == 0
    if not whole or [key for key, _ in storages] != ["0"] or tensor.is_conj() or tensor.is_neg():
        return None
    found = Plain(len(head), tuple(tensor.shape), tensor.dtype)
    # A tensor larger than its storage would go on in what comes after its record.
    return found if found.bytes <= storages[0][1] else None


def _tensor(head: bytes, storages: list[tuple[str, int]]) -> Any:
    """Return without memory what a head describes, and add its storages' keys and bytes; None if it cannot."""
    if not head.startswith(_SIGNATURE):
        return None
    _, name, extra = _LOCAL.unpack_from(head)
    if not head[_LOCAL.size : _LOCAL.size + name].endswith(b"/data.pkl"):
        return None
    _, written, order = head.rpartition(b"/byteorder")
    if written and sys.byteorder.encode() not in order:  # another machine's, whose bytes torch turns round
        return None
    try:
        unpickler: Any = Unpickler(io.BytesIO(head[_LOCAL.size + name + extra :]), encoding="utf-8")
        unpickler.persistent_load = lambda saved: _storage(saved, storages)
        return unpickler.load()
    except Exception:  # a head that is cut off, or damaged, can lead to anything; the stock way says what it is
        return None


def _storage(saved: Any, storages: list[tuple[str, int]]) -> torch.storage.TypedStorage:
    """Return a storage without memory for what a pickle says of one."""
    _, kind, key, _, count = saved
    dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
    if type(count) is not int:
        raise TypeError("a storage is of no number of elements")
    storages.append((key, count * dtype.itemsize))
    memory = torch.UntypedStorage(count * dtype.itemsize, device="meta")  # type: ignore[no-untyped-call]
    return torch.storage.TypedStorage(wrap_storage=memory, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]
