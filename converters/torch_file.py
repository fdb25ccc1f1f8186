"""Opening what ``torch.save`` wrote: nothing in it is run, and no tensor is read.

The file is mapped, and unpickled by torch's weights_only unpickler, which builds nothing but containers,
tensors and the classes that it is told of. From where a tensor's memory lies in the map follows where its
bytes lie in the file.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tailor_dcp import unpickling
from tailor_dcp.archives import data_start
from tailor_dcp.errors import ConversionError, DamagedSourceError, TailorError
from tailor_dcp.tensors import Given, Piece, Readable, Stored
from tailor_dcp.unpickling import tensors_of

_SMALL = 1 << 12
"""Bytes up to which a tensor is simply kept in memory."""
_VALUE = 1 << 20
"""Bytes up to which a tensor may be somebody's value, such as a generator's state, and not a weight."""


class TorchFile:
    """A file that ``torch.save`` wrote.

    Attributes:
        path: the file.
        tree: what it holds; its tensors are mapped and must not be changed.
    """

    def __init__(self, path: Path, allow: Sequence[str] = (), stand_ins: Mapping[str, type] | None = None) -> None:
        """Open it.

        Args:
            path: the file.
            allow: classes, as ``module.Class``, that the user trusts.
            stand_ins: what to build instead of classes that need not be there, by the full name of each.

        Raises:
            ConversionError: it holds a class that is not admitted; the sentence names it.
            DamagedSourceError: it is missing, cut off, or not a torch.save file.
        """
        self.path = path
        self._base: int | None = None
        self._records: dict[int, int] = {}
        self._read_from: dict[int, int] = {}
        stand: list[unpickling.Admitted] = [(cls, name) for name, cls in (stand_ins or {}).items()]
        self._admitted = (*stand, *unpickling.allowed(allow))
        self._mapped = _is_archive(path)
        try:
            self.tree: Any = self._load()
        except pickle.UnpicklingError as error:
            raise self._refused(error) from error
        except OSError as error:
            if self._mapped and not zipfile.is_zipfile(path):
                raise self._damaged("it is cut off") from error
            raise DamagedSourceError(f"{path} cannot be read: {error.strerror or error}.") from error
        except Exception as error:  # whatever damaged bytes lead torch.load to
            raise self._damaged(_first_line(error)) from error
        if self._mapped:
            self._records = _records(path)
            try:
                self._base = self._find_base()
            except TailorError:
                raise
            except RecursionError as error:
                raise self._damaged("it is nested without end") from error
            except Exception as error:  # whatever torch.load says that has to read it once more
                raise self._damaged(_first_line(error)) from error

    def _load(self) -> Any:
        try:
            return unpickling.load(self.path, self._admitted, map_location="cpu", mmap=self._mapped or None)
        except RuntimeError as error:
            # torch maps files so that they could be written to, which takes as much memory as could be needed for it.
            if "unable to mmap" not in str(error):
                raise
        return self._load_unmapped()

    def _load_unmapped(self) -> Any:
        """Return the tree with tensors that are not there, of which torch tells where in the file they lie."""
        with FakeTensorMode():
            tree = unpickling.load(self.path, self._admitted, map_location="cpu")
        dtypes: dict[int, torch.dtype] = {}
        for tensor in tensors_of(tree):
            # torch.save refuses to write this; of what says so, torch makes other tensors here than elsewhere.
            if isinstance(tensor, FakeTensor) and tensor.layout is torch.strided and tensor.untyped_storage().nbytes():
                told = _offset_told(tensor.untyped_storage())
                if dtypes.setdefault(told, tensor.dtype) != tensor.dtype:
                    raise self._damaged("one record is tensors of two dtypes")
        return tree

    def stored(self, tensor: torch.Tensor) -> Readable:
        """Return where a tensor of the tree lies in the file; small and odd ones are copied instead.

        Raises:
            DamagedSourceError: it does not lie in one of the file's records.
        """
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter, FakeTensor) and tensor.layout is torch.strided
        if not plain:
            raise ConversionError(
                f"{self.path} holds a {type(tensor).__name__} of layout {tensor.layout}, which cannot be converted; "
                f"save plain tensors instead."
            )
        if isinstance(tensor, FakeTensor):
            return self._at(tensor) if _is_as_it_lies(tensor) else Given(self._gathered(tensor))
        tensor = tensor.detach()
        if tensor.is_conj() or tensor.is_neg():  # the file has the bytes without what is kept beside them
            return Given(tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format))
        if self._base is None or tensor.numel() * tensor.itemsize <= _SMALL or not tensor.is_contiguous():
            return Given(tensor.clone(memory_format=torch.contiguous_format))
        return self._at(tensor)

    def _gathered(self, tensor: FakeTensor) -> torch.Tensor:
        """Read a tensor whose elements lie in the file in another order, or as others than they are."""
        place, storage = self.offset(tensor), tensor.untyped_storage()
        if place is None:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        first, count = int(tensor.storage_offset()), storage.nbytes() // tensor.itemsize
        piece = Piece(self.path, place - first * tensor.itemsize, 0, count)
        flat = Stored(torch.Size((count,)), tensor.dtype, (piece,)).whole()
        made = flat.as_strided(tensor.shape, tensor.stride(), first).contiguous()
        made = made.conj_physical() if tensor.is_conj() else made
        return made.neg() if tensor.is_neg() else made

    def _at(self, tensor: torch.Tensor) -> Stored:
        place = self.offset(tensor)
        pieces = () if place is None else (Piece(self.path, place, 0, tensor.numel()),)
        return Stored(tensor.shape, tensor.dtype, pieces)

    def offset(self, tensor: torch.Tensor) -> int | None:
        """Return where in the file a tensor of the tree starts; None if it has no elements.

        Raises:
            DamagedSourceError: it does not lie in one of the file's records.
        """
        if id(tensor) in self._read_from:
            return self._read_from[id(tensor)]
        storage = tensor.untyped_storage()
        if not storage.nbytes() or (self._base is None and not isinstance(tensor, FakeTensor)):
            return None
        offset: int = _offset_told(storage) if self._base is None else storage.data_ptr() - self._base
        if self._records.get(offset) != storage.nbytes():
            raise self._damaged("a tensor lies outside of its records")
        return offset + int(tensor.storage_offset()) * tensor.itemsize

    def _find_base(self) -> int | None:
        """Return the address of the file's first byte, given that every record is some tensor's memory.

        Where that is not so, as with storages beside the tensors, torch is asked for each tensor's place, which takes
        longer; there is no such address then.
        """
        if any(isinstance(tensor, FakeTensor) for tensor in tensors_of(self.tree)):
            self.tree = self._with_values(self.tree)
            return None
        plain = (tensor.untyped_storage() for tensor in tensors_of(self.tree) if tensor.layout is torch.strided)
        starts = {storage.data_ptr(): storage.nbytes() for storage in plain if storage.nbytes()}
        starts.pop(0, None)
        offsets = {offset for offset, length in self._records.items() if length}
        if not starts or not offsets:
            return None
        base = min(starts) - min(offsets)
        # A record without bytes that a tensor claims to have some in would shift all others.
        empty = sum(not tensor.untyped_storage().nbytes() for tensor in tensors_of(self.tree) if _is_strided(tensor))
        if {start - base for start in starts} == offsets and len(self._records) - len(offsets) <= empty:
            # Mapped storages are not held against their records, and small tensors are not asked for their places.
            if any(self._records[start - base] != length for start, length in starts.items()):
                raise self._damaged("a tensor lies outside of its records")
            return base
        self.tree = self._with_values(self._load_unmapped())
        return None

    def _with_values(self, tree: Any) -> Any:
        """Return nested containers in which small tensors that were not read are, as others ask for their values."""
        if isinstance(tree, FakeTensor):
            if tree.numel() * tree.itemsize > _VALUE or not _is_as_it_lies(tree):
                return tree
            offset, value = self.offset(tree), self._at(tree).whole()
            if offset is not None:
                self._read_from[id(value)] = offset
            return value
        if isinstance(tree, MutableMapping):
            tree.update({key: self._with_values(value) for key, value in tree.items()})
            return tree
        return type(tree)(map(self._with_values, tree)) if type(tree) in (list, tuple) else tree

    def _refused(self, error: Exception) -> ConversionError:
        name = unpickling.asked_for(error)
        if name is None:  # torch's own words would have it loaded with weights_only=False
            return self._damaged("its pickle is not of the kind that torch.save writes")
        return ConversionError(f"{self.path} {unpickling.refusal(name)}.")

    def _damaged(self, why: str) -> DamagedSourceError:
        return DamagedSourceError(f"{self.path} is damaged, or no torch.save file ({why.rstrip('.')}); copy it anew.")


def _is_as_it_lies(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is what its bytes in the file are, in their order."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _is_strided(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided


def _offset_told(storage: Any) -> int:
    """Return where torch.load says that a storage lies which it did not read."""
    told: int = storage._checkpoint_offset
    return told


def in_memory(tree: Any, depth: int = 0) -> Any:
    """Return plain values and nested containers with every mapped tensor copied.

    Raises:
        ConversionError: it is nested without end.
    """
    if depth > 100:
        raise ConversionError("The source holds values that are nested more than 100 deep, which no training writes.")
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, Mapping):
        return {key: in_memory(value, depth + 1) for key, value in tree.items()}
    if isinstance(tree, np.generic):
        return tree.item()  # weights_only loads of what is written would not know numpy's
    if isinstance(tree, list | tuple):
        return type(tree)([in_memory(v, depth + 1) for v in tree]) if type(tree) in (list, tuple) else tree
    return tree


def is_torch_file(path: Path) -> bool:
    """Tell whether a file begins as what torch.save writes, or wrote before torch 1.6."""
    try:
        with path.open("rb") as stream:
            head = stream.read(4)
    except OSError:
        return False
    return head == b"PK\x03\x04" or head[:1] == b"\x80"


def _is_archive(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise DamagedSourceError(f"{path} cannot be read: {error.strerror}.") from error


def _records(path: Path) -> dict[int, int]:
    """Return where the archive's tensors lie: the offset of each in the file, and its length.

    Raises:
        DamagedSourceError: the archive is cut off, or compressed.
    """
    found: dict[int, int] = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
            for entry in archive.infolist():
                if "/data/" not in entry.filename:
                    continue
                start = data_start(stream, entry)
                if entry.compress_type != zipfile.ZIP_STORED or start is None:
                    raise DamagedSourceError(f"{path} is a compressed archive, which torch.save does not write.")
                if entry.compress_size != entry.file_size:
                    raise DamagedSourceError(f"{path} is damaged (a record has two lengths); copy it anew.")
                found[start] = entry.file_size
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DamagedSourceError(f"{path} is damaged ({_first_line(error)}); copy it anew.") from error
    return found


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
