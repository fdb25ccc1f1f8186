"""The names that a DCP pickle may ask for, each with the one use it may make of it, and the state it may set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

MAX_MARKS = 64  # DCP's own pickles nest five deep, plus what a record nests
MAX_NAME = 1000  # bytes; a name of protocol 2 or 3 ends with its line
MAX_LENGTH = 64  # of what every use of a reference looks through again: sizes, attributes, transforms


class RefusedError(Exception):
    """Why a file was refused, to be read after the file's name."""


def hostile(what: str) -> NoReturn:
    """Refuse a file that asks for what no checkpoint needs."""
    raise RefusedError(f"asks for {what}, which no DCP metadata needs; it was not run. Do not load this file.")


def damaged(what: str) -> NoReturn:
    """Refuse a file that cannot be right."""
    raise RefusedError(
        f"is damaged or is no DCP metadata: {what}. Nothing of it was loaded; use another checkpoint of the "
        "run, or another copy of this one."
    )


def shown(text: str) -> str:
    """Return a text from the file as messages may show it."""
    # A name from the file may be long, or hold what moves a terminal's cursor.
    return ascii(text)[1:-1][:200]


@dataclass(frozen=True, eq=False, slots=True)
class Asked:
    """A name that a file asked for. It may be made with NEWOBJ, called with REDUCE, or neither."""

    name: str
    new: type | None = None
    call: Callable[[tuple[Any, ...]], object] | None = None


class Pairs(list[Any]):
    """A dict as a flat list of keys and values: keys are hashed only once they are known to be harmless."""


@dataclass(frozen=True, eq=False, slots=True)
class Parts:
    """A path, not joined before it is known to be wanted: parts can be long, and referred to again."""

    kind: type[PurePath]
    parts: tuple[Any, ...]


def _size(args: tuple[Any, ...]) -> torch.Size:
    dims = args[0] if len(args) == 1 else None
    if type(dims) is not tuple or len(dims) > MAX_LENGTH:
        damaged(f"a size or an offset is not a tuple of at most {MAX_LENGTH} numbers")
    if not all(type(dim) is int and 0 <= dim < 1 << 63 for dim in dims):
        damaged("a size or an offset is not made of non-negative 64-bit numbers")
    return torch.Size(dims)


def _layout(args: tuple[Any, ...]) -> torch.layout:
    name = args[0] if len(args) == 1 else None
    if type(name) is not str or name not in _LAYOUTS:
        damaged("a tensor has an unknown layout")
    return _LAYOUTS[name]


def _memory_format(args: tuple[Any, ...]) -> torch.memory_format:
    code = args[0] if len(args) == 1 else None
    if type(code) is not int or code not in range(len(_MEMORY_FORMATS)):
        damaged("a tensor has an unknown memory format")
    return list(_MEMORY_FORMATS.values())[code]


def _getattr(args: tuple[Any, ...]) -> torch.memory_format:
    """Early versions of Python 3.11, Debian 12's among them, pickle an enum's member as a ``getattr``."""
    owner, name = args if len(args) == 2 else (None, None)
    if owner is not _ENCODING or type(name) is not str or name not in _MEMORY_FORMATS:
        whose = owner.name if type(owner) is Asked else "..."
        hostile(f"builtins.getattr({whose}, {shown(name) if type(name) is str else '...'})")
    return _MEMORY_FORMATS[name]


def _subclass(args: tuple[Any, ...]) -> Metadata:
    """Subclasses of ``Metadata`` pickle themselves as a call of it with the one argument that it needs."""
    if len(args) != 1:
        damaged("Metadata is called with other than one argument")
    made = Metadata.__new__(Metadata)
    vars(made).update(checked_fields(Metadata, Pairs(("state_dict_metadata", args[0]))))
    return made


_LAYOUTS = {str(value): value for value in vars(torch).values() if type(value) is torch.layout}
# The members of DCP's own enum, whose values are 0, 1 and 2.
_MEMORY_FORMATS = {
    "TORCH_CONTIGUOUS_FORMAT": torch.contiguous_format,
    "TORCH_CHANNELS_LAST": torch.channels_last,
    "TORCH_PRESERVE_FORMAT": torch.preserve_format,
}
SIZE = Asked("torch.Size", call=_size)
CHUNK = Asked("ChunkStorageMetadata", new=ChunkStorageMetadata)
TENSOR = Asked("TensorStorageMetadata", new=TensorStorageMetadata)
PROPERTIES = Asked("TensorProperties", new=TensorProperties)
INDEX = Asked("MetadataIndex", new=MetadataIndex)
INFO = Asked("_StorageInfo", new=_StorageInfo)
_ENCODING = Asked("_MEM_FORMAT_ENCODING", call=_memory_format)
_GETATTR = Asked("builtins.getattr", call=_getattr)
_POSIX = Asked("pathlib.PosixPath", call=partial(Parts, PurePosixPath))
_WINDOWS = Asked("pathlib.WindowsPath", call=partial(Parts, PureWindowsPath))
_NOW, _BEFORE = "torch.distributed.checkpoint.metadata", "torch.distributed._shard.sharded_tensor.metadata"
NAMES: dict[tuple[str, str], object] = {
    ("torch", "Size"): SIZE,
    **{("torch", name): value for name, value in vars(torch).items() if type(value) is torch.dtype},
    ("torch.serialization", "_get_layout"): Asked("torch.serialization._get_layout", call=_layout),
    (_NOW, "Metadata"): Asked("Metadata", new=Metadata, call=_subclass),
    (_NOW, "StorageMeta"): Asked("StorageMeta", new=StorageMeta),
    (_NOW, "BytesStorageMetadata"): Asked("BytesStorageMetadata", new=BytesStorageMetadata),
    (_NOW, "TensorStorageMetadata"): TENSOR,
    (_NOW, "ChunkStorageMetadata"): CHUNK,
    (_NOW, "MetadataIndex"): INDEX,
    (_NOW, "TensorProperties"): PROPERTIES,
    (_NOW, "_MEM_FORMAT_ENCODING"): _ENCODING,
    (_BEFORE, "TensorProperties"): PROPERTIES,
    (_BEFORE, "MEM_FORMAT_ENCODING"): _ENCODING,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): INFO,
    ("builtins", "getattr"): _GETATTR,
    ("__builtin__", "getattr"): _GETATTR,
    **{
        (module, prefix + name): _WINDOWS if name == "WindowsPath" else _POSIX
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "Path")
        for prefix in ("", "Pure")
    },
}


NONE = type(None)
# The exact types of each attribute; none are named where ``_metadata`` looks at it.
TYPES: dict[type, dict[str, tuple[type, ...]]] = {
    ChunkStorageMetadata: {"offsets": (torch.Size,), "sizes": (torch.Size,)},
    MetadataIndex: {"fqn": (str,), "index": (int, NONE), "offset": (torch.Size, NONE)},
    _StorageInfo: {
        "relative_path": (str,),
        "offset": (int,),
        "length": (int,),
        "transform_descriptors": (list, tuple, NONE),
    },
    TensorProperties: {
        "dtype": (torch.dtype,),
        "layout": (torch.layout,),
        "requires_grad": (bool,),
        "memory_format": (torch.memory_format,),
        "pin_memory": (bool,),
    },
    TensorStorageMetadata: {"properties": (TensorProperties,), "size": (torch.Size,), "chunks": (list,)},
    BytesStorageMetadata: {},
    StorageMeta: {
        "checkpoint_id": (str, Parts, NONE),
        "save_id": (str, NONE),
        "load_id": (str, NONE),
        "modules": (list,),
    },
    Metadata: {
        "state_dict_metadata": (Pairs,),
        "planner_data": (),
        "storage_data": (Pairs,),
        "storage_meta": (StorageMeta, NONE),
        "version": (str, NONE),
        "tailor": (),
    },
}
# A Metadata may get its attributes in two steps, and StorageMeta had no ``modules`` at first.
NEEDED: dict[type, set[str]] = {
    kind: set() if kind in (Metadata, StorageMeta) else {name for name in known if NONE not in known[name]}
    for kind, known in TYPES.items()
}
ATTRIBUTES = frozenset(chain.from_iterable(TYPES.values()))


def checked_fields(kind: type, state: object) -> dict[str, Any]:
    """What a BUILD may put into an instance: the attributes that its class has, of the types that they have."""
    given, known = _attributes(kind, state), TYPES[kind]
    if (unknown := given.keys() - known.keys()) and kind is not Metadata:  # where other tools leave notes
        hostile(f"a {kind.__name__} with an attribute {shown(min(unknown))}")
    # By our names, not by the file's equal ones: a pickler writes each name once only if it is always the same.
    fields = {name: given[name] for name in known if name in given}
    for name, value in fields.items():
        if known[name] and type(value) not in known[name]:
            damaged(f"{kind.__name__}.{name} is of type {kind_of(value)}")
        if int in known[name] and value is not None and not 0 <= value < 1 << 63:
            damaged(f"{kind.__name__}.{name} is no non-negative 64-bit number")
    if missing := NEEDED[kind] - fields.keys():
        damaged(f"a {kind.__name__} has no {min(missing)}")
    if transforms := fields.get("transform_descriptors"):
        fields["transform_descriptors"] = _transforms(transforms)
    return fields


def _attributes(kind: type, state: object) -> dict[str, Any]:
    if kind is TensorProperties:  # the one class with a state of its own form
        if type(state) is tuple and len(state) == len(TYPES[kind]):
            return dict(zip(TYPES[kind], state, strict=True))
    elif type(state) is Pairs and len(state) <= 2 * MAX_LENGTH and set(map(type, state[::2])) <= {str}:
        return dict(zip(state[::2], state[1::2], strict=True))
    hostile(f"a {kind.__name__} with a state that is not its attributes")


def _transforms(names: list[Any] | tuple[Any, ...]) -> Sequence[str]:
    """A copy, since what else refers to a list could still add to it."""
    if len(names) > MAX_LENGTH:
        damaged(f"an entry has more than {MAX_LENGTH} transforms")
    return type(names)(checked_texts(names, "a transform's name"))


def checked_texts(values: Sequence[Any], what: str) -> Sequence[str]:
    """Return the values if all of them are texts."""
    if set(map(type, values)) - {str}:
        damaged(f"{what} is not text")
    return values


def kind_of(value: object) -> str:
    """Return what people call a value's type."""
    return {Pairs: "dict", Asked: "class", Parts: "path"}.get(type(value), type(value).__name__)
