"""Writing ``torch.save`` files that are larger than memory: with holes for the tensors, to be filled afterwards."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

from tailor_dcp.errors import ConversionError
from tailor_dcp.tensors import Given, Readable
from tailor_dcp.unpickling import tensors_of
from tailor_dcp.zip_directory import CRC, entries

from . import ranks
from .filling import Stretch, whole
from .torch_file import TorchFile
from .zero_classes import pickle_by_name

_RESERVED = 1 << 30
"""Bytes; more are not even asked for, as a system may refuse what is larger than its memory."""
_DESCRIPTOR = b"PK\x07\x08"


class Holes:
    """Stand-ins for tensors in what is given to ``torch.save``."""

    def __init__(self) -> None:
        self._stand_ins: dict[int, torch.Tensor] = {}
        self._readables: dict[int, Readable] = {}

    def make(self, tensor: Readable) -> torch.Tensor:
        """Return memory of a tensor's shape that is never touched, so never taken; tied names share it."""
        if id(tensor) not in self._stand_ins:
            with FakeTensorMode() if tensor.bytes > _RESERVED else nullcontext():
                made = torch.empty(tensor.size, dtype=tensor.dtype)
            self._stand_ins[id(tensor)] = made
            self._readables[id(made)] = tensor
        return self._stand_ins[id(tensor)]

    def save(
        self, tree: Any, path: Path, stand_ins: Mapping[str, type] | None = None, allow: Sequence[str] = ()
    ) -> list[Stretch]:
        """Write a file with room for its tensors, and return what is to be put where.

        Call it on all ranks with the same tree; the first one writes.

        Args:
            tree: what to save. Tensors in it that ``make`` did not return are put in as they are.
            path: the file to make.
            stand_ins: classes in the tree that only exist by name, as ``TorchFile`` takes them.
            allow: classes, as ``module.Class``, that the user trusts.

        Raises:
            ConversionError: the file cannot be written, or a tensor is of a kind for which there is no room to leave.
        """
        _check(tree)
        ranks.together(lambda: _save(tree, path, stand_ins or {}) if ranks.rank() == 0 else None)
        saved = ranks.together(lambda: TorchFile(path, allow, stand_ins))
        found: dict[int, Stretch] = {}
        for original, mapped in _pairs(tree, saved.tree, set()):
            offset = saved.offset(mapped)
            if offset is None:
                continue
            readable = self._readables.get(id(original))
            if readable is None:  # torch.save keeps its memory as a whole, whichever of it the elements are
                offset -= int(original.storage_offset()) * original.itemsize
                readable = Given(torch.empty(0, dtype=torch.uint8).set_(original.untyped_storage()))
            found.setdefault(offset, whole(path, offset, readable))
        return list(found.values())


def _check(tree: Any) -> None:
    for tensor in tensors_of(tree):
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else f"{tensor.layout}"
            raise ConversionError(
                f"The source holds a {kind} tensor beside its weights, which cannot be converted; save plain tensors."
            )


def _save(tree: Any, path: Path, stand_ins: Mapping[str, type]) -> None:
    module = pickle_by_name(stand_ins) if stand_ins else pickle
    try:
        with skip_data(materialize_fake_tensors=True), path.open("xb") as stream:
            torch.save(tree, stream, pickle_module=module)
    except (OSError, RuntimeError) as error:
        raise ConversionError(f"{path} cannot be written: {str(error).splitlines()[0]}.") from error


def _pairs(tree: Any, twin: Any, seen: set[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the tensors of two containers of the same shape, two and two, each container's once."""
    if isinstance(tree, torch.Tensor):
        yield tree, twin
        return
    if id(tree) in seen:  # a few lists that hold each other many times stand for more than can be walked through
        return
    seen.add(id(tree))
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _pairs(value, twin[key], seen)
    elif isinstance(tree, list | tuple):
        for value, other in zip(tree, twin, strict=True):
            yield from _pairs(value, other, seen)


def patch_checksums(path: Path, crcs: Mapping[int, int]) -> None:
    """Write the CRC-32 of records into an archive that was made without them.

    Args:
        path: the archive.
        crcs: the CRC of each record, by the offset of its first byte.
    """
    with path.open("r+b") as stream:
        for central, header, crc_size in _entries(path):
            stream.seek(header + 26)
            name, extra = struct.unpack("<HH", stream.read(4))
            data = header + 30 + name + extra
            if data not in crcs:
                continue
            crc = crcs[data].to_bytes(4, "little")
            stream.seek(central + CRC)
            stream.write(crc)
            stream.seek(data + crc_size)
            if stream.read(4) == _DESCRIPTOR:
                stream.write(crc)
        stream.flush()
        os.fsync(stream.fileno())


def _entries(path: Path) -> Iterator[tuple[int, int, int]]:
    """Yield, for each record, where its entry in the central directory is, where its header is, and its size."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
        stream.seek(archive.start_dir)
        for entry, record in zip(entries(stream.read()), archive.infolist(), strict=True):
            yield archive.start_dir + entry.place, record.header_offset, record.file_size
