"""Reads a checkpoint's ``.metadata`` without ever running code from it.

The file is a pickle, and unpickling runs what the pickle asks for. So no unpickler is used here. A small
interpreter knows the few pickle instructions that DCP writes; a name that a file asks for becomes a marker,
which can only be used in the one way that DCP uses it; everything else is refused. It never hashes, compares or
prints what it has not checked, follows no length or memo index past what is there, and so takes time and memory
in proportion to the file.

Nearly all of a large file is two kinds of entry, a tensor's chunk and a place in a data file, that look alike
except for their numbers. Each is matched whole by a regular expression made from the file's own memo indexes.
An entry that does not match is interpreted one instruction at a time, with the same result.
"""

from __future__ import annotations

import gc
import pickletools
import re
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, cycle
from operator import add, gt
from pathlib import Path, PurePosixPath, PureWindowsPath
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

from tailor_dcp.errors import NoCheckpointError, UnreadableMetadataError

MAX_DEPTH = 12  # of the plain values in ``tailor`` and ``planner_data``
# By references a small file can stand for a huge structure. An honest one does so too, for the paths and records
# that many units share, but never beyond this many values for each of its bytes.
_MAX_GROWTH = 16
_MAX_MARKS = 64  # DCP's own pickles nest five deep, plus what a record nests
_MAX_COLLISIONS = 8  # honest keys do not collide; thousands that do make a dict quadratic


def read(path: Path) -> Metadata:
    """Read a ``.metadata`` file.

    Raises:
        NoCheckpointError: There is no such file.
        UnreadableMetadataError: It cannot be read, is damaged, or asks for what no checkpoint needs.
    """
    try:
        # Opening a pipe that somebody left there would wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnreadableMetadataError(f"{path} is not a regular file, so it was not opened.")
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise NoCheckpointError(
            f"{path} does not exist, so {path.parent} is not a committed checkpoint; name a folder that is one."
        ) from None
    except OSError as error:
        raise UnreadableMetadataError(f"{path} cannot be read: {error.strerror}.") from error
    return loads(data, str(path))


def loads(data: bytes, source: str) -> Metadata:
    """Make a ``Metadata`` of the bytes of a ``.metadata`` file, running nothing.

    It equals what ``pickle.loads`` gives, except that a path as ``checkpoint_id`` is a ``str``, that the classes
    of older torch versions become today's, and that attributes unknown to DCP and to us are dropped.

    Args:
        data: The file's bytes.
        source: The file's name, for messages.

    Raises:
        UnreadableMetadataError: The bytes are damaged, or ask for what no checkpoint needs.
    """
    with _collector_off():
        try:
            return _metadata(_Machine(data).run(), len(data) * _MAX_GROWTH)
        except _RefusedError as refused:
            raise UnreadableMetadataError(f"{source} {refused}") from None


@contextmanager
def _collector_off() -> Iterator[None]:
    """Half a million new objects and no garbage: the collector would take most of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _RefusedError(Exception):
    """Why a file was refused, to be read after the file's name."""


def _hostile(what: str) -> NoReturn:
    raise _RefusedError(
        f"asks for {what}, which no DCP metadata needs; it was not run. Do not load this file."
    )


def _damaged(what: str) -> NoReturn:
    raise _RefusedError(
        f"is damaged or is no DCP metadata: {what}. Nothing of it was loaded; use another checkpoint of the run, "
        "or another copy of this one."
    )


def _shown(text: str) -> str:
    # A name from the file may be long, or hold what moves a terminal's cursor.
    return ascii(text)[1:-1][:200]


# --- What a file may ask for ---


@dataclass(frozen=True, eq=False, slots=True)
class _Asked:
    """A name that a file asked for. It may be made with NEWOBJ, called with REDUCE, or neither."""

    name: str
    new: type | None = None
    call: Callable[[tuple[Any, ...]], object] | None = None


class _Pairs(list[Any]):
    """A dict as a flat list of keys and values: keys are hashed only once they are known to be harmless."""


def _size(args: tuple[Any, ...]) -> torch.Size:
    dims = args[0] if len(args) == 1 else None
    if type(dims) is not tuple or not all(type(dim) is int and 0 <= dim < 1 << 63 for dim in dims):
        _damaged("a size or an offset is not made of non-negative 64-bit numbers")
    return torch.Size(dims)


def _layout(args: tuple[Any, ...]) -> torch.layout:
    name = args[0] if len(args) == 1 else None
    if type(name) is not str or name not in _LAYOUTS:
        _damaged("a tensor has an unknown layout")
    return _LAYOUTS[name]


def _memory_format(args: tuple[Any, ...]) -> torch.memory_format:
    code = args[0] if len(args) == 1 else None
    if type(code) is not int or code not in range(len(_MEMORY_FORMATS)):
        _damaged("a tensor has an unknown memory format")
    return list(_MEMORY_FORMATS.values())[code]


def _getattr(args: tuple[Any, ...]) -> torch.memory_format:
    """Early versions of Python 3.11, Debian 12's among them, pickle an enum's member as a ``getattr``."""
    owner, name = args if len(args) == 2 else (None, None)
    if owner is not _ENCODING or type(name) is not str or name not in _MEMORY_FORMATS:
        of = f"{owner.name}, " if type(owner) is _Asked else ""
        _hostile(f"builtins.getattr({of}{_shown(name) if type(name) is str else '...'})")
    return _MEMORY_FORMATS[name]


def _path(kind: type[PurePosixPath | PureWindowsPath]) -> Callable[[tuple[Any, ...]], str]:
    def join(parts: tuple[Any, ...]) -> str:
        if not all(type(part) is str for part in parts):
            _damaged("a path is not made of text")
        return str(kind(*parts))

    return join


def _encode(args: tuple[Any, ...]) -> bytes:
    """Protocol 2 has no bytes: it writes them as text to be encoded."""
    if tuple(map(type, args)) != (str, str) or args[1] != "latin1":
        _hostile("_codecs.encode of something other than text in latin1")
    if not args[0].isascii() and max(args[0]) > "\xff":
        _damaged("its bytes are not bytes")
    return bytes(args[0], "latin1")


def _no_bytes(args: tuple[Any, ...]) -> bytes:
    if args:
        _hostile("builtins.bytes with a length or a content")
    return b""


def _subclass(args: tuple[Any, ...]) -> Metadata:
    """Subclasses of ``Metadata`` pickle themselves as a call of it with the one argument that it needs."""
    if len(args) != 1:
        _damaged("Metadata is called with other than one argument")
    made = Metadata.__new__(Metadata)
    vars(made).update(_fields(Metadata, _Pairs(("state_dict_metadata", args[0]))))
    return made


_LAYOUTS = {str(value): value for value in vars(torch).values() if type(value) is torch.layout}
# The members of DCP's own enum, whose values are 0, 1 and 2.
_MEMORY_FORMATS = {
    "TORCH_CONTIGUOUS_FORMAT": torch.contiguous_format,
    "TORCH_CHANNELS_LAST": torch.channels_last,
    "TORCH_PRESERVE_FORMAT": torch.preserve_format,
}
_NOW, _BEFORE = "torch.distributed.checkpoint.metadata", "torch.distributed._shard.sharded_tensor.metadata"
_SIZE = _Asked("torch.Size", call=_size)
_CHUNK = _Asked("ChunkStorageMetadata", new=ChunkStorageMetadata)
_INDEX = _Asked("MetadataIndex", new=MetadataIndex)
_INFO = _Asked("_StorageInfo", new=_StorageInfo)
_PROPERTIES = _Asked("TensorProperties", new=TensorProperties)
_ENCODING = _Asked("_MEM_FORMAT_ENCODING", call=_memory_format)
_GETATTR = _Asked("builtins.getattr", call=_getattr)
_NO_BYTES = _Asked("builtins.bytes", call=_no_bytes)
_POSIX, _WINDOWS = (
    _Asked("pathlib.Path", call=_path(PurePosixPath)),
    _Asked("pathlib.Path", call=_path(PureWindowsPath)),
)
_NAMES: dict[tuple[str, str], object] = {
    ("torch", "Size"): _SIZE,
    **{("torch", name): value for name, value in vars(torch).items() if type(value) is torch.dtype},
    ("torch.serialization", "_get_layout"): _Asked("torch.serialization._get_layout", call=_layout),
    (_NOW, "Metadata"): _Asked("Metadata", new=Metadata, call=_subclass),
    (_NOW, "MetadataIndex"): _INDEX,
    (_NOW, "StorageMeta"): _Asked("StorageMeta", new=StorageMeta),
    (_NOW, "TensorStorageMetadata"): _Asked("TensorStorageMetadata", new=TensorStorageMetadata),
    (_NOW, "BytesStorageMetadata"): _Asked("BytesStorageMetadata", new=BytesStorageMetadata),
    (_NOW, "ChunkStorageMetadata"): _CHUNK,
    (_NOW, "TensorProperties"): _PROPERTIES,
    (_NOW, "_MEM_FORMAT_ENCODING"): _ENCODING,
    (_BEFORE, "TensorProperties"): _PROPERTIES,
    (_BEFORE, "MEM_FORMAT_ENCODING"): _ENCODING,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _INFO,
    **{
        (module, prefix + name): _WINDOWS if name.startswith("Windows") else _POSIX
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "Path")
        for prefix in ("", "Pure")
    },
    ("builtins", "getattr"): _GETATTR,
    ("__builtin__", "getattr"): _GETATTR,
    ("builtins", "bytes"): _NO_BYTES,
    ("__builtin__", "bytes"): _NO_BYTES,
    ("_codecs", "encode"): _Asked("_codecs.encode", call=_encode),
}


# --- The state that each class may be given ---

_NONE = type(None)
_ATOMS = frozenset({str, int, float, bool, _NONE, bytes})
# The exact types of each attribute; none named means that ``_metadata`` looks at it.
_TYPES: dict[type, dict[str, tuple[type, ...]]] = {
    ChunkStorageMetadata: {"offsets": (torch.Size,), "sizes": (torch.Size,)},
    MetadataIndex: {"fqn": (str,), "offset": (torch.Size, _NONE), "index": (int, _NONE)},
    _StorageInfo: {
        "relative_path": (str,),
        "offset": (int,),
        "length": (int,),
        "transform_descriptors": (list, tuple, _NONE),
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
        "checkpoint_id": (str, _NONE),
        "save_id": (str, _NONE),
        "load_id": (str, _NONE),
        "modules": (list,),
    },
    Metadata: {
        "state_dict_metadata": (_Pairs,),
        "planner_data": (),
        "storage_data": (_Pairs,),
        "storage_meta": (StorageMeta, _NONE),
        "version": (str, _NONE),
        "tailor": (),
    },
}
# StorageMeta had no ``modules`` at first; what a Metadata must have is looked at when it is whole.
_NEEDED: dict[type, set[str]] = {
    kind: {
        name for name, types in known.items() if _NONE not in types and kind not in (StorageMeta, Metadata)
    }
    for kind, known in _TYPES.items()
}


def _attributes(kind: type, state: object) -> dict[str, Any]:
    if kind is TensorProperties and type(state) is tuple and len(state) == len(_TYPES[kind]):
        return dict(zip(_TYPES[kind], state, strict=True))
    if type(state) is not _Pairs or set(map(type, state[::2])) - {str}:
        _hostile(f"a {kind.__name__} with a state that is not its attributes")
    return dict(zip(state[::2], state[1::2], strict=True))


def _fields(kind: type, state: object) -> dict[str, Any]:
    """What a BUILD may put into an instance: the attributes that its class has, with the types that it uses."""
    given, known = _attributes(kind, state), _TYPES[kind]
    if kind is Metadata:  # other tools leave notes of their own here
        given = {name: value for name, value in given.items() if name in known}
    for name, value in given.items():
        if name not in known:
            _hostile(f"a {kind.__name__} with an attribute {_shown(name)}")
        if known[name] and type(value) not in known[name]:
            _damaged(f"{kind.__name__}.{name} is of type {type(value).__name__.lstrip('_')}")
        if type(value) is int and value < 0:
            _damaged(f"{kind.__name__}.{name} is negative")
    if missing := _NEEDED[kind] - given.keys():
        _damaged(f"a {kind.__name__} has no {min(missing)}")
    if transforms := given.get("transform_descriptors"):
        given["transform_descriptors"] = type(transforms)(
            _texts(transforms, "_StorageInfo.transform_descriptors")
        )
    return given


def _texts(values: Sequence[Any], what: str) -> Sequence[str]:
    if set(map(type, values)) - {str}:
        _damaged(f"{what} is not a list of text")
    return values


# --- The interpreter ---


class _Machine:
    """Interprets the instructions that DCP's pickles are made of, on plain data and the classes above."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.pos = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: list[Any] = []
        self.stateless = 0  # instances that were made and not yet given their state
        self.where: dict[object, int] = {}  # the memo indexes of what the patterns are made of
        self.patterns: dict[_Asked, re.Pattern[bytes]] = {}
        self.sizes: dict[bytes, tuple[torch.Size, list[Any]]] = {}
        self.texts: dict[bytes, str] = {}

    def run(self) -> Any:
        try:
            self.until(len(self.data) - 1)
        except IndexError:
            _damaged(f"what byte {self.pos} needs is not there")
        except UnicodeDecodeError:
            _damaged(f"the text before byte {self.pos} is not UTF-8")
        if self.data[self.pos :] != b"." or len(self.stack) != 1 or self.marks or self.stateless:
            _damaged("it does not end where it should")
        return self.stack[0]

    def until(self, end: int) -> None:
        data = self.data
        while self.pos < end:
            self.pos += 1
            _STEPS[data[self.pos - 1]](self)

    def take(self, size: int) -> bytes:
        end = self.pos + size
        if end > len(self.data):
            _damaged(f"byte {self.pos} announces {size} bytes and {len(self.data) - self.pos} follow")
        taken = self.data[self.pos : end]
        self.pos = end
        return taken

    def number(self, width: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(width), "little", signed=signed)

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def target(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            _damaged(f"byte {self.pos - 1} adds to something that is no {kind.__name__.strip('_').lower()}")
        return self.stack[-1]


def _refuse(m: _Machine) -> None:
    code = m.data[m.pos - 1]
    name = pickletools.code2op[chr(code)].name if chr(code) in pickletools.code2op else f"0x{code:02x}"
    _hostile(f"the pickle instruction {name} (at byte {m.pos - 1})")


def _protocol(m: _Machine) -> None:
    if m.number(1) > 5:
        _damaged(f"it has a pickle protocol of {m.data[m.pos - 1]}")


def _frame(m: _Machine) -> None:
    size = m.number(8)
    if size > len(m.data) - m.pos:
        _damaged(f"it ends {size - len(m.data) + m.pos} bytes too early")


def _mark(m: _Machine) -> None:
    if len(m.marks) == _MAX_MARKS:
        _damaged(f"it nests deeper than {_MAX_MARKS} levels")
    m.marks.append(m.stack)
    m.stack = []


def _tuple(size: int) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        m.stack.append(tuple([m.stack.pop() for _ in range(size)][::-1]))

    return step


def _marked_tuple(m: _Machine) -> None:
    items = m.pop_mark()
    m.stack.append(tuple(items))


def _memoize(m: _Machine) -> None:
    value = m.stack[-1]
    if type(value) in (str, _Asked) and value in _LANDMARKS:
        m.where.setdefault(value, len(m.memo))
    m.memo.append(value)


def _put(width: int) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        # Picklers count up. The C unpickler would make a table as long as any index it is given.
        if (index := m.number(width)) != len(m.memo):
            _damaged(f"it stores memo {index} though it has stored {len(m.memo)} values")
        _memoize(m)

    return step


def _get(width: int) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        start = m.pos - 1
        value = m.memo[m.number(width)]
        if (value is _CHUNK or value is _INDEX) and _entries(m, value, start):
            return
        m.stack.append(value)

    return step


def _ask(m: _Machine, module: object, name: object) -> None:
    if type(module) is not str or type(name) is not str:
        _hostile("a name that is not text")
    if (module, name) not in _NAMES:
        _hostile(f"{_shown(module)}.{_shown(name)}")
    m.stack.append(_NAMES[module, name])


def _global(m: _Machine) -> None:
    lines = []
    for _ in range(2):
        end = m.data.find(b"\n", m.pos)
        lines.append(str(m.take(max(end, m.pos) - m.pos), "utf-8"))
        m.take(1)
    _ask(m, *lines)


def _stack_global(m: _Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    _ask(m, module, name)


def _new(m: _Machine) -> None:
    args, asked = m.stack.pop(), m.stack[-1]
    if type(asked) is not _Asked or asked.new is None or type(args) is not tuple or args:
        _hostile(
            f"an instance of {asked.name if type(asked) is _Asked else 'no class'}, made in another way than its own"
        )
    m.stack[-1] = asked.new.__new__(asked.new)
    m.stateless += bool(_NEEDED[asked.new])


def _reduce(m: _Machine) -> None:
    args, asked = m.stack.pop(), m.stack[-1]
    if type(asked) is not _Asked or asked.call is None or type(args) is not tuple:
        _hostile(f"a call of {asked.name if type(asked) is _Asked else 'what is no function'}")
    m.stack[-1] = asked.call(args)


def _build(m: _Machine) -> None:
    state, built = m.stack.pop(), m.stack[-1]
    kind = type(built)
    if kind not in _TYPES:
        _hostile(f"a state to be set on a {kind.__name__.strip('_').lower()}")
    fields = _fields(kind, state)
    if vars(built).keys() & fields.keys():
        _damaged(f"a {kind.__name__} is given its state twice")
    vars(built).update(fields)
    m.stateless -= bool(_NEEDED[kind])


def _append(m: _Machine) -> None:
    value = m.stack.pop()
    m.target(list).append(value)


def _appends(m: _Machine) -> None:
    items = m.pop_mark()
    m.target(list).extend(items)


def _set_item(m: _Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.target(_Pairs).extend((key, value))


def _set_items(m: _Machine) -> None:
    items = m.pop_mark()
    if len(items) % 2:
        _damaged(f"the dict before byte {m.pos} has a key without a value")
    m.target(_Pairs).extend(items)


def _text(width: int) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(str(m.take(m.number(width)), "utf-8", "surrogatepass"))


def _bytes(width: int) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(m.take(m.number(width)))


def _int(width: int, signed: bool = False) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(m.number(width, signed))


def _push(value: object) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(value)


_STEPS: list[Callable[[_Machine], None]] = [_refuse] * 256
for _code, _step in {
    b"\x80": _protocol,
    b"\x95": _frame,
    b"N": _push(None),
    b"\x88": _push(True),
    b"\x89": _push(False),
    b"K": _int(1),
    b"M": _int(2),
    b"J": _int(4, signed=True),
    b"\x8a": lambda m: m.stack.append(m.number(m.number(1), signed=True)),
    b"G": lambda m: m.stack.append(struct.unpack(">d", m.take(8))[0]),
    b"\x8c": _text(1),
    b"X": _text(4),
    b"\x8d": _text(8),
    b"C": _bytes(1),
    b"B": _bytes(4),
    b"\x8e": _bytes(8),
    b")": _push(()),
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"t": _marked_tuple,
    b"]": lambda m: m.stack.append([]),
    b"a": _append,
    b"e": _appends,
    b"}": lambda m: m.stack.append(_Pairs()),
    b"s": _set_item,
    b"u": _set_items,
    b"(": _mark,
    b"q": _put(1),
    b"r": _put(4),
    b"\x94": _memoize,
    b"h": _get(1),
    b"j": _get(4),
    b"c": _global,
    b"\x93": _stack_global,
    b"\x81": _new,
    b"R": _reduce,
    b"b": _build,
}.items():
    _STEPS[_code[0]] = _step


# --- Whole entries at a time ---

_SPENT = _Asked("the state of another object")  # stands in the memo where a pickler put a state dict
_WHOLE = rb"(?:K.|M..|J...[\x00-\x7f]|\x8a(?:\x05.{4}|\x06.{5}|\x07.{6}|\x08.{7})[\x00-\x7f])"
_GOTTEN = rb"(?:h.|j....)"
_TEXT = rb"(%s|\x8c.[^\x94]{0,255}+\x94)" % _GOTTEN
# Any run of numbers and one tuple of some of them: whether it is a Size is seen by interpreting it, once.
_DIMS = rb"(%s|{SIZE}(?:\)|\(?%s*+[\x85-\x87t]\x94)\x85\x94R\x94)" % (_GOTTEN, _WHOLE)
_ENTRIES = {
    _CHUNK: rb"{CHUNK}\)\x81\x94\}\x94\({offsets}%s{sizes}%sub" % (_DIMS, _DIMS),
    _INDEX: rb"{INDEX}\)\x81\x94\}\x94\({fqn}%s{index}(N|%s)(?:{offset}%s)?ub"
    rb"{INFO}\)\x81\x94\}\x94\({relative_path}%s{offset}(%s){length}(%s)ub"
    % (_TEXT, _WHOLE, _DIMS, _TEXT, _WHOLE, _WHOLE),
}
_BLANK = re.compile(rb"\{([A-Za-z_]+)\}")
_CLASSES = {b"SIZE": _SIZE, b"CHUNK": _CHUNK, b"INDEX": _INDEX, b"INFO": _INFO}
_BLANKS = {
    asked: {blank: _CLASSES.get(blank, blank.decode()) for blank in _BLANK.findall(entry)}
    for asked, entry in _ENTRIES.items()
}
_LANDMARKS = frozenset(chain.from_iterable(blanks.values() for blanks in _BLANKS.values()))


def _pattern(m: _Machine, asked: _Asked) -> re.Pattern[bytes] | None:
    """The entry as this file writes it, once everything in it has been memoized."""
    if asked not in m.patterns and m.where.keys() >= set(_BLANKS[asked].values()):

        def get(found: re.Match[bytes]) -> bytes:
            index = m.where[_BLANKS[asked][found[1]]]
            return re.escape(b"h%c" % index if index < 256 else b"j" + index.to_bytes(4, "little"))

        m.patterns[asked] = re.compile(_BLANK.sub(get, _ENTRIES[asked]), re.DOTALL)
    return m.patterns.get(asked)


def _entries(m: _Machine, asked: _Asked, start: int) -> bool:
    """Read all the entries from here on that match; false if there are none."""
    pattern, end = _pattern(m, asked), start
    if pattern is None:
        return False
    read = _read_chunk if asked is _CHUNK else _read_place
    while (found := pattern.match(m.data, end)) and read(m, found):
        end = found.end()
    m.pos = end if end > start else m.pos
    return end > start


def _read_chunk(m: _Machine, found: re.Match[bytes]) -> bool:
    offsets, offsets_memo = m.sizes.get(found[1]) or _learn_size(m, *found.span(1))
    sizes, sizes_memo = m.sizes.get(found[2]) or _learn_size(m, *found.span(2))
    chunk = ChunkStorageMetadata(offsets, sizes)
    m.stack.append(chunk)
    m.memo += (chunk, _SPENT, *offsets_memo, *sizes_memo)
    return True


def _read_place(m: _Machine, found: re.Match[bytes]) -> bool:
    fqn_code, hint, offset_code, path_code, start, length = found.groups()
    fqn, path = (
        m.texts.get(fqn_code) or _learn_text(m, fqn_code),
        m.texts.get(path_code) or _learn_text(m, path_code),
    )
    if fqn is None or path is None:
        return False
    offset, offset_memo = None, []
    if offset_code is not None:
        offset, offset_memo = m.sizes.get(offset_code) or _learn_size(m, *found.span(3))
    index = MetadataIndex.__new__(MetadataIndex)
    vars(index).update(fqn=fqn, index=None if hint == b"N" else _whole(hint), offset=offset)
    info = _StorageInfo(path, _whole(start), _whole(length))
    m.stack += (index, info)
    m.memo += (index, _SPENT)
    if fqn_code[0] == 0x8C:
        m.memo.append(fqn)
    m.memo += (*offset_memo, info, _SPENT)
    if path_code[0] == 0x8C:
        m.memo.append(path)
    return True


def _whole(code: bytes) -> int:
    return int.from_bytes(code[2 if code[0] == 0x8A else 1 :], "little")


def _learn_text(m: _Machine, code: bytes) -> str | None:
    """The text that a GET, or an inline text with its MEMOIZE, stands for; None if it is neither."""
    if code[0] != 0x8C:
        text = m.memo[int.from_bytes(code[1:], "little")]
        if type(text) is not str:
            return None
    elif code[1] != len(code) - 3:
        return None
    else:
        text = str(code[2:-1], "utf-8", "surrogatepass")
    m.texts[code] = text
    return text


def _learn_size(m: _Machine, start: int, end: int) -> tuple[torch.Size, list[Any]]:
    """The Size that these instructions make, and what they memoize on the way."""
    code = m.data[start:end]
    if len(code) == (2 if code[:1] == b"h" else 5):
        made, memo = [m.memo[int.from_bytes(code[1:], "little")]], []
    else:
        stack, marks, known = m.stack, m.marks, len(m.memo)
        m.stack, m.marks, m.pos = [], [], start
        m.until(end)
        made, memo = m.stack, m.memo[known:]
        m.stack, m.marks = stack, marks
        del m.memo[known:]
    if len(made) != 1 or type(made[0]) is not torch.Size:
        _damaged(f"what ends at byte {end} is not a size")
    m.sizes[code] = made[0], memo
    return m.sizes[code]


# --- The whole ---


def _metadata(root: object, limit: int) -> Metadata:
    if type(root) is not Metadata:
        _damaged(f"it holds a {type(root).__name__.strip('_').lower()}")
    given = vars(root)
    for needed in ("state_dict_metadata", "storage_data"):
        if needed not in given:
            _damaged(f"it has no {needed}")
    made = Metadata(
        state_dict_metadata=_states(given["state_dict_metadata"], limit),
        planner_data=_Plain("planner_data", limit).of(given.get("planner_data"))[0],
        storage_data=_places(given["storage_data"]),
        storage_meta=_storage_meta(given.get("storage_meta")),
        version=given.get("version"),
    )
    if "tailor" in given:
        vars(made)["tailor"] = _Plain("tailor", limit).of(given["tailor"])[0]
    return made


def _storage_meta(meta: StorageMeta | None) -> StorageMeta | None:
    if meta is not None:
        meta.modules = list(_texts(vars(meta).get("modules", []), "StorageMeta.modules"))
    return meta


def _states(pairs: _Pairs, limit: int) -> dict[str, TensorStorageMetadata | BytesStorageMetadata]:
    fqns, states = pairs[::2], pairs[1::2]
    _texts(fqns, "what the state is called")
    for fqn, state in zip(fqns, states, strict=True):
        if type(state) is TensorStorageMetadata:
            limit -= len(state.chunks)  # many tensors may refer to one long list
            _check_chunks(fqn, state, limit)
        elif type(state) is not BytesStorageMetadata:
            _damaged(f"the entry {_shown(fqn)} is neither a tensor nor bytes")
    return dict(zip(fqns, states, strict=True))


def _check_chunks(fqn: str, tensor: TensorStorageMetadata, limit: int) -> None:
    if limit < 0 or set(map(type, tensor.chunks)) - {ChunkStorageMetadata}:
        _damaged(f"the chunks of {_shown(fqn)} are not its own")
    offsets = [chunk.offsets for chunk in tensor.chunks]
    sizes = [chunk.sizes for chunk in tensor.chunks]
    ends = map(add, chain.from_iterable(offsets), chain.from_iterable(sizes))
    if set(map(len, chain(offsets, sizes))) - {len(tensor.size)} or any(map(gt, ends, cycle(tensor.size))):
        _damaged(f"a chunk of {_shown(fqn)} lies outside of the tensor")


def _places(pairs: _Pairs) -> dict[MetadataIndex, _StorageInfo]:
    indexes, infos = pairs[::2], pairs[1::2]
    if set(map(type, indexes)) - {MetadataIndex} or set(map(type, infos)) - {_StorageInfo}:
        _damaged("storage_data does not say where entries are stored")
    for path in {info.relative_path for info in infos}:
        if "\0" in path:
            _damaged(f"the data file's name {_shown(path)} has a NUL")
    return _dict(indexes, infos)


def _dict(keys: list[Any], values: list[Any]) -> dict[Any, Any]:
    """A dict of keys that are safe to hash."""
    if len(keys) - len(set(map(hash, keys))) > _MAX_COLLISIONS:
        _damaged("many keys of one dict are equal, or made to have equal hashes")
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
        if type(value) not in (list, tuple, _Pairs):
            _damaged(
                f"{self.name} holds a {type(value).__name__.strip('_').lower()}, which is no plain value"
            )
        if id(value) not in self.done and room:
            parts = [self.of(part, room - 1) for part in value]
            depth, size = 1 + max((part[1] for part in parts), default=0), 1 + sum(part[2] for part in parts)
            self.done[id(value)] = self.copy(type(value), [part[0] for part in parts]), depth, size
        made = self.done.get(id(value), (None, room + 1, 0))
        if made[1] > room or made[2] > self.limit:
            _damaged(f"{self.name} is deeper than {MAX_DEPTH} levels, or refers to one value too often")
        return made

    def copy(self, kind: type, parts: list[Any]) -> Any:
        if kind is not _Pairs:
            return tuple(parts) if kind is tuple else parts
        for key in parts[::2]:
            if set(map(type, key if type(key) is tuple else (key,))) - _ATOMS:
                _damaged(f"a key in {self.name} is neither one value nor a flat tuple of values")
        return _dict(parts[::2], parts[1::2])
