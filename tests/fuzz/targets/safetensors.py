"""A safetensors file: what is accepted holds the same tensors for the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random

import safetensors
import torch
from safetensors.torch import save

from tailor_dcp.converters.safetensors_file import DTYPES, open_safetensors
from tests.fuzz.mutators.trees import change_tree, jsons
from tests.fuzz.scratch import put
from tests.fuzz.target import Target

_UNKNOWN = {"F8_E5M2FNUZ", "F8_E4M3FNUZ"}
"""Names that torch's dtypes have and not every version of the library."""


def parse(data: bytes) -> None:
    """Read the header; compare it, and each tensor's bytes, with the library's."""
    found = open_safetensors(put(data, "input.safetensors"))
    names = {dtype: name for name, dtype in DTYPES.items()}
    if any(names[tensor.dtype] in _UNKNOWN for tensor in found.tensors.values()):
        return
    try:
        stock = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as error:
        raise AssertionError(f"accepted, and the library says {error}") from error
    assert stock.keys() == found.tensors.keys(), "the library finds other tensors"
    for name, tensor in found.tensors.items():
        told = stock[name]
        assert (told["dtype"], tuple(told["shape"])) == (names[tensor.dtype], tuple(tensor.size)), f"{name!r} differs"
        start = tensor.pieces[0].offset
        assert bytes(told["data"]) == data[start : start + tensor.bytes], f"{name!r} has other bytes"


def seeds() -> Iterator[bytes]:
    """Files of the library's, and headers that are not right."""
    yield save({"w": torch.zeros(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}, {"format": "pt"})
    yield save({"s": torch.tensor(1), "e": torch.zeros(0, 4), "f": torch.zeros(2, dtype=torch.float8_e4m3fn)})
    yield save({})
    yield _file({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(7))
    yield _file({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, bytes(1))
    yield (1 << 63).to_bytes(8, "little") + b"{}"


def _file(header: object, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


_WORDS = (*DTYPES, "dtype", "shape", "data_offsets", "__metadata__", "format", "pt", "w", "DCP_SHARDING_INFO")
_json = jsons(_WORDS)


def _mutate(data: bytes, random: Random) -> bytes:
    """Change the header or the bytes after it; mostly the length before it is right again."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    match random.randrange(8):
        case 0:
            rest = rest[: random.randrange(len(rest) + 1)]
        case 1:
            rest += bytes(random.choice((1, 4, 24)))
        case 2:
            header = header + b" " * random.choice((1, 7, 8))
        case 3:
            return random.choice((0, 1, 2, 8, length + 1, len(data), 100_000_001)).to_bytes(8, "little") + data[8:]
        case 4:
            header, rest = _laid_out(header, random)
        case _:
            header = _json(header, random)
    return len(header).to_bytes(8, "little") + header + rest


def _laid_out(header: bytes, random: Random) -> tuple[bytes, bytes]:
    """Change shapes and dtypes, and give every tensor the place that it then has."""
    try:
        tree = json.loads(header)
        tree = change_tree(tree, random, _WORDS)
        at = 0
        for name, entry in tree.items():
            if name == "__metadata__":
                continue
            dtype = entry["dtype"] = random.choice(list(DTYPES))
            entry["shape"] = [random.randrange(4) for _ in range(random.randrange(4))]
            size = torch.Size(entry["shape"]).numel() * DTYPES[dtype].itemsize
            entry["data_offsets"] = [at, at + size]
            at += size
        return json.dumps(tree).encode("utf-8", "surrogatepass"), random.randbytes(at)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return header, b""


TARGET = Target(parse, seeds, _mutate, tuple(word.encode() for word in _WORDS), longest=2048)
