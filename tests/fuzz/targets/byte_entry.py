"""Byte entries, as ``torch.save`` writes them: read without running anything, by the loader and by the rank states."""

from __future__ import annotations

import io
from collections import defaultdict, deque
from collections.abc import Iterator

import numpy as np
import torch

from tailor_dcp import rank_state
from tailor_dcp.entries import load_entry
from tailor_dcp.errors import TailorError
from tests.fuzz.mutators.archives import archives
from tests.fuzz.mutators.pickles import pickles
from tests.fuzz.target import Target
from tests.fuzz.targets.blob_head import blob

_NAMES = (
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_parameter\n", b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nSize\n",
    b"cnumpy._core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"cbuiltins\ngetattr\n",
    b"cnumpy._core.multiarray\nscalar\n", b"cbuiltins\nset\n", b"ctorch._tensor\n_rebuild_from_type_v2\n",
    b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ctorch._utils\n_rebuild_qtensor\n", b"c_codecs\nencode\n",
    b"ccollections\ndeque\n", b"ccollections\ndefaultdict\n", b"cbuiltins\nlist\n", b"cbuiltins\nint\n",
)  # fmt: skip


def parse(data: bytes) -> None:
    """Read it both ways; either may refuse it."""
    try:
        rank_state.unpack(data, "train.rng")
    except TailorError as error:
        assert str(error)
    load_entry(io.BytesIO(data), "train.x", "input")


def seeds() -> Iterator[bytes]:
    """Values of training states."""
    values = [{"step": 3, "lr": [0.1, None]}, torch.zeros(2, 3), [np.arange(3), np.float32(1.5), (1, "a", b"b")]]
    values += [rank_state.rng_state()["python"][:1], {"a": torch.zeros(3)[1:], "b": {1, 2}}, "text", True]
    values += [
        deque([0.5, defaultdict(list, {"a": [1]})], maxlen=3),
        {"kind": int, "of": [defaultdict(int, {(1,): 2})]},
    ]
    for value in (*values, torch.nn.Parameter(torch.zeros(2)), torch.zeros(3).to_sparse(), 1 + 2j):
        yield blob(value)
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, stream, _use_new_zipfile_serialization=False)
    yield stream.getvalue()


TARGET = Target(parse, seeds, archives(pickles(_NAMES)), _NAMES)
