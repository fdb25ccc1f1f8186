"""Reads whole entries of a DCP pickle at a time.

Nearly all of a large file is a few kinds of entry, mostly tensors' chunks and their places in data files, that
look alike except for their numbers. Each is matched whole, by a regular expression made from the file's own
memo indexes. An entry that does not match is interpreted one instruction at a time, with the same result.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tailor_dcp.metadata.pickle_columns import read_rows
from tailor_dcp.metadata.pickle_machine import Machine
from tailor_dcp.metadata.pickle_names import (
    CHUNK,
    INDEX,
    INFO,
    MAX_LENGTH,
    PROPERTIES,
    SIZE,
    TENSOR,
    TYPES,
    Asked,
    damaged,
)

_SPENT = Asked("the state of an object")  # stands in the memo where a pickler put an object's state
_GET = rb"(?:h.|j....)"
_TEXT = rb"(%s|\x8c.[^\x94]{0,255}+\x94)" % _GET
_WHOLE = rb"(?:K.|M..|J...[\x00-\x7f]|\x8a(?:\x05.{4}|\x06.{5}|\x07.{6}|\x08.{7})[\x00-\x7f])"
# Any numbers and one tuple: whether it is a tuple of just these numbers is seen when it is interpreted, once.
_DIMS = rb"(%s|{SIZE}(?:\)|\(?%s*+[\x85-\x87t]\x94)\x85\x94R\x94)" % (_GET, _WHOLE)
_PROPS = rb"{PROPERTIES}\)\x81\x94\((%s%s[\x88\x89]%s[\x88\x89])t\x94b" % (_GET, _GET, _GET)
_CHUNK_ENTRY = rb"{CHUNK}\)\x81\x94\}\x94\({offsets}%s{sizes}%sub" % (_DIMS, _DIMS)
_ENTRIES = {
    CHUNK: _CHUNK_ENTRY,
    # A tensor with one chunk. Where tensors have more, the chunks are most of the file.
    TENSOR: rb"{TENSOR}\)\x81\x94\}\x94\({properties}%s{size}%s{chunks}\]\x94" % (_PROPS, _DIMS)
    + rb"%saub" % _CHUNK_ENTRY,
    INDEX: rb"{INDEX}\)\x81\x94\}\x94\({fqn}%s{index}(N|%s)(?:{offset}%s)?ub" % (_TEXT, _WHOLE, _DIMS)
    + rb"{INFO}\)\x81\x94\}\x94\({relative_path}%s{offset}(%s){length}(%s)ub" % (_TEXT, _WHOLE, _WHOLE),
}
# What a linked checkpoint adds to the places of its raw stretches: one tuple of texts, for all of them the same.
_TRANSFORMS = rb"(?:{transform_descriptors}%s)?ub" % rb"(h.|j....)"
_BLANK = re.compile(rb"\{([A-Za-z_]+)\}")
_MARKERS = {
    b"SIZE": SIZE,
    b"CHUNK": CHUNK,
    b"TENSOR": TENSOR,
    b"PROPERTIES": PROPERTIES,
    b"INDEX": INDEX,
    b"INFO": INFO,
}
_BLANKS = {
    asked: {blank: _MARKERS.get(blank, blank.decode()) for blank in _BLANK.findall(entry)}
    for asked, entry in _ENTRIES.items()
}
_TRANSFORMS_NAME = "transform_descriptors"
_PLACE_GROUPS = re.compile(_BLANK.sub(b"", _ENTRIES[INDEX]), re.DOTALL).groups
_PROPERTY_TYPES = tuple(types[0] for types in TYPES[TensorProperties].values())
_Match = Callable[[bytes, int], re.Match[bytes] | None]


def _entries(m: Machine, asked: Asked, start: int) -> bool:
    """Read all the entries from here on that match; false if there are none."""
    if asked is not TENSOR and read_rows(m, asked, start):
        return True
    if asked not in m.patterns and m.where.keys() >= set(_BLANKS[asked].values()):
        m.patterns[asked] = _pattern(m, _ENTRIES[asked])
    if asked not in m.patterns:
        return False
    if asked is INDEX and m.patterns[asked].groups == _PLACE_GROUPS and _TRANSFORMS_NAME in m.where:
        m.patterns[asked] = _pattern(m, _ENTRIES[asked].removesuffix(b"ub") + _TRANSFORMS)
    end = _READERS[asked](m, m.patterns[asked].match, start)
    m.pos = end if end > start else m.pos
    return end > start


def _pattern(m: Machine, entry: bytes) -> re.Pattern[bytes]:
    """The entry as this file writes it, where everything in it has been memoized."""

    def get(found: re.Match[bytes]) -> bytes:
        index = m.where[_MARKERS.get(found[1], found[1].decode())]
        return re.escape(b"h%c" % index if index < 256 else b"j" + index.to_bytes(4, "little"))

    return re.compile(_BLANK.sub(get, entry), re.DOTALL)


# An entry may refer to what it has memoized itself, so each reader adds to the memo in the entry's own order.


def _read_chunks(m: Machine, match: _Match, end: int) -> int:
    known, stack, memo = m.known, m.stack, m.memo
    while found := match(m.data, end):
        own = len(memo)
        memo += (None, _SPENT)
        (offsets,), more = known.get(found[1]) or _learn(m, found, 1)
        memo += more
        (sizes,), more = known.get(found[2]) or _learn(m, found, 2)
        memo += more
        memo[own] = chunk = ChunkStorageMetadata(offsets, sizes)
        stack.append(chunk)
        end = found.end()
    return end


def _read_tensor(m: Machine, match: _Match, end: int) -> int:
    if not (found := match(m.data, end)):
        return end
    tensor = TensorStorageMetadata.__new__(TensorStorageMetadata)
    chunk = ChunkStorageMetadata.__new__(ChunkStorageMetadata)
    values, _ = m.known.get(found[1]) or _learn(m, found, 1, _PROPERTY_TYPES)
    tensor.properties, tensor.chunks = TensorProperties(*values), [chunk]
    m.memo += (tensor, _SPENT, tensor.properties, _SPENT)
    (tensor.size,), more = m.known.get(found[2]) or _learn(m, found, 2)
    m.memo += (*more, tensor.chunks, chunk, _SPENT)
    (chunk.offsets,), more = m.known.get(found[3]) or _learn(m, found, 3)
    m.memo += more
    (chunk.sizes,), more = m.known.get(found[4]) or _learn(m, found, 4)
    m.memo += more
    m.stack.append(tensor)
    return found.end()


def _read_places(m: Machine, match: _Match, end: int) -> int:
    known, texts, stack, memo = m.known, m.texts, m.stack, m.memo
    while found := match(m.data, end):
        fqn_code, hint, offset_code, path_code, start, length, *more_codes = found.groups()
        transforms = None
        if more_codes and more_codes[0]:
            transforms = _transforms_of(m, more_codes[0])
            if transforms is None:
                break
        fqn = texts.get(fqn_code) or _text_of(m, fqn_code)
        path = texts.get(path_code) or _text_of(m, path_code)
        if fqn is None or path is None:
            break
        index = MetadataIndex.__new__(MetadataIndex)
        fields = vars(index)
        fields["fqn"], fields["index"] = fqn, None if hint == b"N" else _whole(hint)
        info = _StorageInfo(path, _whole(start), _whole(length), transforms)
        memo += (index, _SPENT)
        if fqn_code[0] == 0x8C:
            memo.append(fqn)
        if offset_code:
            (fields["offset"],), more = known.get(offset_code) or _learn(m, found, 3)
            memo += more
        memo += (info, _SPENT)
        if path_code[0] == 0x8C:
            memo.append(path)
        stack += (index, info)
        end = found.end()
    return end


_READERS = {CHUNK: _read_chunks, TENSOR: _read_tensor, INDEX: _read_places}
SHORTCUTS = dict.fromkeys(_READERS, _entries)


def _whole(code: bytes) -> int:
    return int.from_bytes(code[2 if code[0] == 0x8A else 1 :], "little")


def _transforms_of(m: Machine, code: bytes) -> tuple[str, ...] | None:
    """The tuple of texts that a GET stands for; None if it is anything else, such as a list that could still grow."""
    index = int.from_bytes(code[1:], "little")
    value = m.memo[index] if index < len(m.memo) else None
    if type(value) is not tuple or len(value) > MAX_LENGTH or set(map(type, value)) - {str}:
        return None
    return value


def _text_of(m: Machine, code: bytes) -> str | None:
    """The text that a GET, or an inline text with its MEMOIZE, stands for; None if it is neither."""
    if code[0] != 0x8C:
        index = int.from_bytes(code[1:], "little")
        if index >= len(m.memo) or type(text := m.memo[index]) is not str:
            return None
    elif code[1] != len(code) - 3:
        return None
    else:
        text = str(code[2:-1], "utf-8", "surrogatepass")
    m.texts[code] = text
    return text


def _learn(
    m: Machine, found: re.Match[bytes], group: int, types: tuple[type, ...] = (torch.Size,)
) -> tuple[list[Any], list[Any]]:
    """What the instructions of a group push, and what they memoize: the same whenever they come again."""
    stack, marks, memoized = m.stack, m.marks, len(m.memo)
    m.stack, m.marks, m.pos = [], [], found.start(group)
    m.until(found.end(group))
    pushed, more = m.stack, m.memo[memoized:]
    if tuple(map(type, pushed)) != types or m.marks:
        damaged(f"what ends at byte {m.pos} is no {types[0].__name__.lower()}")
    m.stack, m.marks = stack, marks
    del m.memo[memoized:]
    m.known[found[group]] = pushed, more
    return pushed, more
