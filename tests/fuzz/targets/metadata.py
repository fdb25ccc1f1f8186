"""A whole ``.metadata``: what is accepted equals what pickle makes of it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from tailor_dcp.metadata import pickle_writer
from tailor_dcp.metadata.digest import digest
from tailor_dcp.metadata.safe_pickle import loads
from tailor_dcp.metadata.seal import is_intact
from tests.fuzz.mutators.pickles import pickles
from tests.fuzz.oracles import check_same, unpickled
from tests.fuzz.target import Target
from tests.metadata import hostile


def parse(data: bytes) -> None:
    """Read it; compare it, and its digest, with pickle's."""
    ours = loads(data, "input")
    stock = unpickled(data)
    check_same(ours, stock)
    digests = digest(ours), digest(stock)
    assert None in digests or len(set(digests)) == 1, "its digest is another one than that of what pickle reads"
    is_intact(data)


def sharded(ranks: int, tensors: int) -> Metadata:
    """Return what a planner makes of tensors cut over ranks."""
    states, places = {}, {}
    for number in range(tensors):
        key = f"model.layers.{number}.weight"
        size = torch.Size((4 * ranks, 3))
        offsets = [torch.Size((4 * rank, 0)) for rank in range(ranks)]
        chunks = [ChunkStorageMetadata(offset, torch.Size((4, 3))) for offset in offsets]
        states[key] = TensorStorageMetadata(TensorProperties(dtype=torch.float32), size, chunks)
        for rank, offset in enumerate(offsets):
            place = _StorageInfo(f"__{rank}_0.distcp", 48 * number, 48)
            places[MetadataIndex(key, offset, rank)] = place
    return Metadata(states, {key: ("model", key) for key in states}, places, StorageMeta("run/step-1"), "1.0.0")


def seeds() -> Iterator[bytes]:
    """Honest files of both picklers, and the gallery."""
    yield hostile.metadata()
    for shape in ((1, 1), (2, 2), (1, 9), (9, 1)):
        yield pickle.dumps(sharded(*shape), 4)
        yield pickle_writer.dumps(sharded(*shape))
    yield pickle.dumps(sharded(2, 1), 2)
    yield from small(hostile.ATTACKS)


def small(attacks: list[hostile.Attack]) -> Iterator[bytes]:
    """Yield the attacks that fit into an input."""
    from pathlib import Path

    for attack in attacks:
        data = attack.build(Path("/nowhere/sentinel"))
        if len(data) <= TARGET.longest:
            yield data


PIECES = (
    hostile.chunk(hostile.size(0), hostile.size(4)), hostile.tensor(), hostile.index(), hostile.info(),
    hostile.properties(), hostile.LAYOUT, hostile.ENCODING, hostile.size(1 << 62, 4), hostile.size(),
    hostile.name("os", "system"), hostile.name("builtins", "getattr"), hostile.name("pathlib", "PosixPath"),
    hostile.name(hostile.NOW, "Metadata"), hostile.text("transform_descriptors"), hostile.text("tailor"),
    hostile.text("planner_data"), hostile.text("offset"), hostile.text("index"),
)  # fmt: skip
TARGET = Target(parse, seeds, pickles(PIECES), PIECES, longest=2304)
