"""The safetensors format, read and laid out by ourselves: a header of JSON, then the tensors' bytes and nothing else.

The header is somebody else's, so nothing in it is believed: every offset is checked against the file's size, against
the shape, and against the other tensors, before anything is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tailor_dcp.errors import ConversionError, DamagedSourceError
from tailor_dcp.tensors import Piece, Readable, Stored, read_file

_LENGTH = 8
_LONGEST_HEADER = 100_000_000
"""Bytes; the safetensors library's own limit."""
_ALIGNMENT = 8
_FIELDS = {"dtype", "shape", "data_offsets"}
_METADATA = "__metadata__"
_HALF_A_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")
"""A surrogate, which JSON writes in pairs; the safetensors library takes no other."""
_SHARDED = "DCP_SHARDING_INFO"

# In the order in which the library sorts tensors within a file, the last first, so that all are aligned.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""The dtypes by their names in a header."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True)
class SafetensorsFile:
    """A file whose header was read and found sound.

    Attributes:
        path: the file.
        tensors: its tensors by name, in the order of their bytes.
        metadata: what its writer noted, such as ``{"format": "pt"}``.
    """

    path: Path
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]


def open_safetensors(path: Path) -> SafetensorsFile:
    """Read a file's header, and nothing else of it.

    Raises:
        ConversionError: a tensor has a dtype that torch has not.
        DamagedSourceError: the file is missing, cut off, or its header contradicts itself or the file.
    """
    size = _size(path)
    header, start = _header(path, size)
    metadata = header.pop(_METADATA, {})
    if isinstance(metadata, dict) and _SHARDED in metadata:
        raise ConversionError(
            f"{path} holds parts of tensors, one rank's of transformers' distributed checkpoints; join them first with "
            f"transformers.distributed.checkpoint.consolidate_distributed_checkpoint."
        )
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its metadata are not texts")
    found = {name: _tensor(path, name, entry, start) for name, entry in header.items()}
    tensors = dict(sorted(found.items(), key=lambda item: _span(item[1])))
    end = start
    for name, tensor in tensors.items():
        first, last = _span(tensor)
        if first != end:
            what = "overlaps the one before it" if first < end else "leaves a gap before it"
            raise _damaged(path, f"the tensor {name} {what}")
        end = last
    if end != size:
        raise _damaged(path, f"its header describes {end} bytes, but it has {size}")
    return SafetensorsFile(path, tensors, metadata)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DamagedSourceError(f"{path} cannot be read: {error.strerror}.") from error


def _header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """Return the header's entries, and where the tensors' bytes start."""
    if size < _LENGTH:
        raise _damaged(path, f"it has only {size} bytes")
    length = int.from_bytes(_bytes(path, 0, _LENGTH), "little")
    if not 2 <= length <= min(_LONGEST_HEADER, size - _LENGTH):
        raise _damaged(path, f"its header is said to have {length} bytes")
    text = _bytes(path, _LENGTH, length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_repeats, parse_constant=_no_number)
        if _HALF_A_CHARACTER.search(text):
            json.dumps(header, ensure_ascii=False).encode()  # halves that belong together are one character by now
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header cannot be read: {str(error).splitlines()[0]}") from error
    if not text.startswith(b"{") or not isinstance(header, dict):
        raise _damaged(path, "its header is no table of tensors")
    return header, _LENGTH + length


def _bytes(path: Path, offset: int, length: int) -> bytes:
    into = bytearray(length)
    read_file(path, offset, memoryview(into))
    return bytes(into)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is in it twice")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _tensor(path: Path, name: str, entry: Any, start: int) -> Stored:
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise _damaged(path, f"the entry of {name} has not the fields dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise _damaged(path, f"the shape or the offsets of {name} are no lists of whole numbers")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ConversionError(f"{path} holds {name} as {entry['dtype']}, a dtype that cannot be converted.")
    count = math.prod(shape)
    if offsets[1] - offsets[0] != count * dtype.itemsize:
        raise _damaged(path, f"the offsets of {name} do not match its shape")
    if math.prod(size for size in shape if size) >= 1 << 63:
        raise _damaged(path, f"the shape of {name} is larger than any tensor")
    return Stored(torch.Size(shape), dtype, (Piece(path, start + offsets[0], 0, count),))


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in value)


def _span(tensor: Stored) -> tuple[int, int]:
    first = tensor.pieces[0].offset
    return first, first + tensor.bytes


def _damaged(path: Path, why: str) -> DamagedSourceError:
    return DamagedSourceError(f"{path} is damaged, or no safetensors file ({why}); copy it anew.")


@dataclass(frozen=True)
class Layout:
    """A file that is to be written.

    Attributes:
        header: its first bytes.
        places: where each tensor's bytes start.
        size: the bytes of all of it.
    """

    header: bytes
    places: Mapping[str, int]
    size: int


def layout_of(tensors: Mapping[str, Readable], metadata: Mapping[str, str]) -> Layout:
    """Lay tensors out in a file exactly as the safetensors library does.

    Raises:
        ConversionError: a tensor has a dtype or a name that the format cannot have.
    """
    for name, tensor in tensors.items():
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise ConversionError(f"The name {name!a} has half of a character, which safetensors cannot hold.")
        if tensor.dtype not in _NAMES:
            raise ConversionError(f"{name} is of {tensor.dtype}, which safetensors has not; give another with --dtype.")
    entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    places: dict[str, int] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (-_RANKS[tensors[name].dtype], name.encode())):
        tensor = tensors[name]
        places[name], end = end, end + tensor.bytes
        offsets = [places[name], end]
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.size), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(_LENGTH, "little") + text
    return Layout(header, {name: len(header) + place for name, place in places.items()}, len(header) + end)


def shards_of(tensors: Mapping[str, Readable], most: int) -> Sequence[Mapping[str, Readable]]:
    """Divide tensors over files of at most a size, in their order; one that is larger has a file of its own."""
    shards: list[dict[str, Readable]] = []
    current: dict[str, Readable] = {}
    size = 0
    for name, tensor in tensors.items():
        if tensor.bytes > most:
            shards.append({name: tensor})
            continue
        if current and size + tensor.bytes > most:
            shards.append(current)
            current, size = {}, 0
        current[name] = tensor
        size += tensor.bytes
    return [*shards, current] if current or not shards else shards
