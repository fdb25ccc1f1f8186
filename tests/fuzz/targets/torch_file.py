"""What ``torch.save`` wrote for somebody: each tensor's bytes are where torch.load takes them from."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tailor_dcp.converters.torch_file import TorchFile, in_memory
from tailor_dcp.errors import ConversionError
from tests.fuzz.mutators.archives import archives
from tests.fuzz.mutators.pickles import pickles
from tests.fuzz.scratch import put
from tests.fuzz.target import Target
from tests.fuzz.targets.blob_head import STORAGES, blob

FakeTensorMode()  # imports half of torch when it is first made, which is not the input's fault
_COMPARED = 1 << 20


def parse(data: bytes) -> None:
    """Open it; read every tensor of plain memory from where it is said to lie."""
    file = TorchFile(put(data, "input.bin"))
    in_memory(file.tree)
    try:
        stock = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except RuntimeError as error:
        if "does not match expected size" in str(error):
            return  # of a storage that is no tensor's: mapped, torch reads none of it, and neither do we
        raise
    for expected, tensor in _pairs(stock, file.tree):
        if expected.layout is not torch.strided:
            continue
        try:
            found = file.stored(tensor)
        except ConversionError:
            continue
        assert (tuple(found.size), found.dtype) == (tuple(expected.shape), expected.dtype), "another tensor"
        if found.count * found.dtype.itemsize <= _COMPARED:
            assert _raw(found.whole()) == _raw(expected), "a tensor is read from elsewhere"


def _pairs(one: Any, other: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the tensors that are in the same places of two trees; either may contain itself."""
    stack, seen = [(one, other)], set()
    while stack:
        one, other = stack.pop()
        if isinstance(one, torch.Tensor):
            yield one, other
        elif isinstance(one, dict | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            assert type(one) is type(other)
            assert len(one) == len(other)
            # Keys can be tensors, which are equal to nothing; both have them in the same order.
            values = (one.values(), other.values()) if isinstance(one, dict) else (one, other)
            stack.extend(zip(*values, strict=True))


def _raw(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return bytes(plain.view(torch.uint8).numpy().tobytes()) if plain.numel() else b""


def seeds() -> Iterator[bytes]:
    """State dicts, with what tensors can share."""
    base = torch.arange(12, dtype=torch.float32)
    yield blob({"a": base[:4], "b": base[4:].reshape(2, 4), "n": {"step": 1, "l": [True, None, "x"]}})
    yield blob(OrderedDict(w=torch.zeros(2, 3, dtype=torch.bfloat16), b=torch.ones(3)))
    yield blob({"t": torch.zeros(2, 3).t(), "e": torch.zeros(0, 3), "s": torch.tensor(2)})
    yield blob([torch.zeros(2, dtype=torch.complex64).conj(), torch.zeros(3).to_sparse()])
    yield blob({"big": torch.zeros(1040)})  # larger than what is simply kept in memory


TARGET = Target(parse, seeds, archives(pickles(STORAGES)), STORAGES, longest=8192)
