"""Opening: a checkpoint as a read-only mapping, of which only what is asked for is read."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StorageReaderTransforms
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from tailor_dcp.base import open_base
from tailor_dcp.contents import Contents
from tailor_dcp.entries import load_entry
from tailor_dcp.errors import DamagedSourceError, LoadError
from tailor_dcp.metadata.compose import shape_of
from tailor_dcp.names import close, listed
from tailor_dcp.raw_stretch import bytes_of, is_raw
from tailor_dcp.store_path import place
from tailor_dcp.tensors import raw_bytes, read_file
from tailor_dcp.unpickling import Admitted, allowed


class NoSuchNameError(LoadError, KeyError):
    """A checkpoint has no such key, layer or kind."""

    def __str__(self) -> str:
        # KeyError would print the sentence in quotation marks.
        return str(self.args[0])


def open_checkpoint(path: str | os.PathLike[str], allow: Iterable[str | type] = ()) -> Checkpoint:
    """Open a checkpoint without loading it.

    Nothing in it is executed, and no file outside of its run is opened.

    Args:
        path: the checkpoint's folder, or its URL.
        allow: classes that entries may hold, as such or as ``"module.Class"``, beside those of torch, numpy and the
            standard library that training states have. Whoever wrote an entry decides what such a class is made with.

    Returns:
        A read-only mapping from the keys of the flattened state dict to tensors and objects, each
        read when it is asked for.

    Raises:
        NoCheckpointError: the folder is not a committed checkpoint.
        UnreadableMetadataError: its ``.metadata`` is damaged or hostile.
        NotAllowedError: there is no such class to allow.
    """
    return Checkpoint(Contents(open_base(place(path))), allowed(allow))


class Checkpoint(Mapping[str, Any]):
    """A checkpoint's entries by key; see ``open_checkpoint``.

    ``checkpoint[key]`` reads one entry from its own bytes alone. Tensors are whole, on the CPU, and in
    the dtype that they are stored in; every access reads anew.
    """

    def __init__(self, contents: Contents, admitted: Sequence[Admitted] = ()) -> None:
        self._contents = contents
        self._admitted = admitted
        self._stored = contents.base.metadata.state_dict_metadata

    @property
    def path(self) -> Path:
        """The checkpoint's folder, as an absolute path."""
        return self._contents.folder

    @property
    def step(self) -> int | None:
        """The training step, None if neither its record nor its folder's name tells it."""
        return self._contents.base.origin.step

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers, in the model's order."""
        return self._contents.layers

    def origin(self, layer: str, kind: str | None = None) -> int | dict[str, int | None] | None:
        """Return the step whose values a layer holds; None where that save's folder told no step.

        Args:
            layer: the layer's name.
            kind: ``weight`` or an optimizer state's name, to ask about that alone.

        Returns:
            One step if all kinds of the layer come from one, else a dict from kind to step.

        Raises:
            NoSuchNameError: there is no such layer, or it has no such kind.
        """
        steps = {unit.kind: held.origin.step for unit, held in self._contents.units.items() if unit.layer == layer}
        if not steps:
            raise NoSuchNameError(
                f"{self.path} has no layer {layer!r}; did you mean {listed(close(layer, self.layers))}?"
            )
        if kind is not None:
            if kind not in steps:
                raise NoSuchNameError(
                    f"{layer} in {self.path} has no {kind!r}; ask for {listed(list(steps))}, or leave kind= out."
                )
            return steps[kind]
        return next(iter(steps.values())) if len(set(steps.values())) == 1 else steps

    def shape(self, key: str) -> torch.Size:
        """Return a tensor's size, reading nothing.

        Raises:
            NoSuchNameError: there is no such key.
            LoadError: the entry is not a tensor.
        """
        return self._tensor(key).size

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype that a tensor is stored in, reading nothing.

        Raises:
            NoSuchNameError: there is no such key.
            LoadError: the entry is not a tensor.
        """
        return self._tensor(key).properties.dtype

    def __getitem__(self, key: str) -> Any:
        """Read one entry.

        Raises:
            NoSuchNameError: there is no such key.
            LoadError: a file that holds it is missing, too short, damaged or outside of the run, or the
                entry is an object of a class that is not allowed.
        """
        stored = self._entry(key)
        blobs = self._contents.base.blobs[key]
        self._contents.check_files((key, info) for _, info in blobs)
        if isinstance(stored, TensorStorageMetadata):
            return self._assembled(key, stored, blobs)
        if not blobs:
            raise self._damaged(key, "it is stored nowhere")
        return self.blob(key, blobs[0][1])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, key: object) -> bool:
        return key in self._stored

    # A mapping's own comparison would read both checkpoints whole.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path}: step {self.step}, {len(self)} entries, {len(self.layers)} layers>"

    def _entry(self, key: str) -> Any:
        if key not in self._stored:
            raise NoSuchNameError(f"{self.path} has no {key!r}; did you mean {listed(close(str(key), self._stored))}?")
        return self._stored[key]

    def _tensor(self, key: str) -> TensorStorageMetadata:
        entry = self._entry(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise LoadError(f"{key} in {self.path} is not a tensor; read it as checkpoint[{key!r}].")
        return entry

    def _assembled(
        self, key: str, stored: TensorStorageMetadata, blobs: list[tuple[MetadataIndex, _StorageInfo]]
    ) -> torch.Tensor:
        places = {index.offset: info for index, info in blobs}
        self._check_complete(key, stored, blobs)
        whole = torch.empty(stored.size, dtype=stored.properties.dtype)
        for chunk in stored.chunks:
            if chunk.offsets not in places:
                raise self._damaged(key, f"the part at {tuple(chunk.offsets)} is stored nowhere")
            info = places[chunk.offsets]
            part = self._raw(key, info, chunk.sizes, whole.dtype) if is_raw(info) else self.blob(key, info)
            if not isinstance(part, torch.Tensor) or part.shape != chunk.sizes or part.dtype != whole.dtype:
                raise self._damaged(key, f"the part at {tuple(chunk.offsets)} is not the tensor that it should be")
            if part.is_quantized:  # an empty tensor of its dtype has no scales, so torch can put nothing into it
                raise LoadError(
                    f"{self._contents.described(key)} in {self.path} is quantized, which is not read here; load it "
                    f"into a quantized tensor with dcp.load."
                )
            here = tuple(slice(o, o + size) for o, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[here].copy_(part)
        return whole

    def _check_complete(
        self, key: str, stored: TensorStorageMetadata, blobs: list[tuple[MetadataIndex, _StorageInfo]]
    ) -> None:
        size = shape_of(stored).bytes
        plain = not any(info.transform_descriptors and not is_raw(info) for _, info in blobs)
        # A few bytes of metadata can claim any size: ask for no memory that the stored bytes cannot fill.
        if plain and size > sum(info.length for _, info in blobs):
            raise self._damaged(key, f"its {size} bytes are not stored in full")
        if sum(math.prod(chunk.sizes) for chunk in stored.chunks) < math.prod(stored.size):
            raise self._damaged(key, "its parts do not add up to the whole")

    def _raw(self, key: str, info: _StorageInfo, size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Read a stretch that is as it is in memory."""
        if bytes_of(size, dtype) != info.length:
            raise self._damaged(key, "its bytes are not those of its shape")
        part = torch.empty(info.length // dtype.itemsize, dtype=dtype)
        try:
            read_file(self._contents.file(info), info.offset, raw_bytes(part))
        except DamagedSourceError as error:
            raise LoadError(f"{str(error).rstrip('.')} ({self._contents.described(key)}).") from error
        return part.reshape(size)

    def blob(self, key: str, info: _StorageInfo) -> Any:
        """Read one of the stretches that an entry is stored in.

        Raises:
            LoadError: it cannot be read, or holds a class that is not allowed.
        """
        return load_entry(self.stored(key, info), key, str(self._contents.file(info)), admitted=self._admitted)

    def stored(self, key: str, info: _StorageInfo) -> io.BytesIO:
        """Return one of the stretches that an entry is stored in as ``torch.save`` made it.

        Raises:
            LoadError: it cannot be read.
        """
        path = self._contents.file(info)
        try:
            whole = bytearray(info.length)
            read_file(path, info.offset, memoryview(whole))
            raw = io.BytesIO(whole)
            if info.transform_descriptors:
                stored = _StorageReaderTransforms().transform_load_stream(None, info.transform_descriptors, raw)  # type: ignore[arg-type]
                raw = io.BytesIO(stored.read())
        except (DamagedSourceError, OSError, ValueError, RuntimeError, ImportError) as error:
            raise LoadError(
                f"{path}, which holds {self._contents.described(key)}, cannot be read: {str(error).rstrip('.')}."
            ) from error
        return raw

    def _damaged(self, key: str, why: str) -> LoadError:
        return LoadError(
            f"{self.path} is damaged: {self._contents.described(key)} cannot be read, as {why}; use another checkpoint."
        )
