"""The head of a stored tensor: where it is believed, torch makes the same of the same pickle."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import torch

from tailor_dcp.raw_blobs import HEAD, plain
from tests.fuzz.mutators.archives import archive
from tests.fuzz.mutators.pickles import pickles
from tests.fuzz.target import Target

_COMPARED = 1 << 16
_LENGTH = 1 << 40
_STORAGE = re.compile(r"expected size \((\d+) bytes")


def parse(data: bytes) -> None:
    """Interpret it as the beginning of a blob of any length."""
    found = plain(data[:HEAD], _LENGTH)
    if found is None:
        return
    assert 0 < found.start <= len(data), "the tensor begins outside of what was looked at"
    assert 0 < found.bytes <= _LENGTH - found.start, "the tensor ends after its blob"
    if found.bytes > _COMPARED:
        return
    name, extra = (int.from_bytes(data[at : at + 2], "little") for at in (26, 28))
    pickled = data[30 + name + extra : found.start]
    content = bytes(range(256)) * (_COMPARED // 256)
    try:
        tensor = _loaded(pickled, content[: found.bytes])
    except RuntimeError as error:
        # The tensor may be the beginning of a larger storage, whose length torch then tells.
        told = _STORAGE.search(str(error))
        if told is None or not found.bytes < int(told[1]):
            raise
        if int(told[1]) > _COMPARED:
            return
        tensor = _loaded(pickled, content[: int(told[1])])
    assert (tuple(tensor.shape), tensor.dtype) == (found.shape, found.dtype), "torch sees another tensor"
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert raw == content[: found.bytes], "torch sees other values"


def _loaded(pickled: bytes, content: bytes) -> torch.Tensor:
    """Return what torch makes of a pickle with these bytes as its only record."""
    names = (b"archive/data.pkl", b"archive/byteorder", b"archive/data/0", b"archive/version")
    whole = archive(list(zip(names, (pickled, b"little", content, b"3\n"), strict=True)))
    tensor: torch.Tensor = torch.load(io.BytesIO(whole), map_location="cpu", weights_only=True)
    return tensor


def blob(value: object) -> bytes:
    """Return what ``torch.save`` writes."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def seeds() -> Iterator[bytes]:
    """Heads of tensors of some kinds, and of what is none."""
    values = [torch.zeros(2, 3), torch.zeros(7, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.float8_e4m3fn)]
    values += [
        torch.zeros(4, 5).t(),
        torch.zeros(10)[3:7],
        torch.tensor(3),
        torch.zeros(0, 3),
        torch.zeros(3).to_sparse(),
    ]
    values += [torch.zeros(3, dtype=torch.complex64).conj(), torch.nn.Parameter(torch.zeros(3))]
    for value in (*values, {"a": 1}):
        yield blob(value)[:1200]


STORAGES = (
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ctorch\nBFloat16Storage\n",
    b"ctorch.storage\nUntypedStorage\n", b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch\nFloat8_e4m3fnStorage\n", b"cos\nsystem\n", b"ctorch\nSize\n", b"PK\3\4", b"/data/0", b"/data.pkl",
    b"/byteorder", b"X\x07\0\0\0storage", b"X\x01\0\0\x000", b"X\x03\0\0\0cpu",
)  # fmt: skip
_pickles = pickles(STORAGES)
_HEADER = 30


def _mutate(data: bytes, random: object) -> bytes:
    """Change the pickle within the head, and leave what is around it."""
    name, extra = (int.from_bytes(data[at : at + 2], "little") for at in (26, 28))
    start = _HEADER + name + extra
    end = data.find(b"PK\3\4", start)
    if end < 0:
        return _pickles(data, random)  # type: ignore[arg-type]
    return data[:start] + _pickles(data[start:end], random) + data[end:]  # type: ignore[arg-type]


TARGET = Target(parse, seeds, _mutate, STORAGES, longest=1536)
