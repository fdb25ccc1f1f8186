"""A catalog as a state dict that DCP can plan: tensors are named and described, but not there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from tailor_dcp.catalog import Catalog
from tailor_dcp.tensors import Readable

from . import ranks

CHUNK = 256 << 20
"""Bytes; a larger tensor is stored as several chunks of whole rows, so that ranks can share it."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a chunk."""


class Planned:
    """A tensor that DCP plans as chunks; those that this rank writes are its items.

    Args:
        tensor: where the bytes come from.
        boxes: the chunks of this rank.
    """

    def __init__(self, tensor: Readable, boxes: list[Box]) -> None:
        self.tensor = tensor
        self._boxes = boxes

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        """Return this rank's items, as DCP asks every distributed tensor for them."""
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
                    properties=TensorProperties(dtype=self.tensor.dtype),
                    size=self.tensor.size,
                ),
            )
            for offsets, sizes in self._boxes
        ]


def boxes_of(size: torch.Size, width: int, most: int = CHUNK) -> list[Box]:
    """Cut a tensor into chunks of whole outermost rows.

    Args:
        size: its shape.
        width: bytes of an element.
        most: bytes of a chunk, unless one row is larger.
    """
    whole: Box = ((0,) * len(size), tuple(size))
    total = math.prod(size) * width
    if total <= most or len(size) == 0:
        return [whole]
    rows = max(1, size[0] * most // total)
    rest = (0,) * (len(size) - 1)
    return [
        ((start, *rest), (min(rows, size[0] - start), *size[1:])) for start in range(0, size[0], rows)
    ]  # fmt: skip


def flat_start(size: torch.Size, offsets: tuple[int, ...]) -> int:
    """Return the number of the first element of a chunk of whole rows, in row-major order."""
    return offsets[0] * math.prod(size[1:]) if size else 0


def rows_of(tensor: Readable) -> list[Box]:
    """Return the chunks that a tensor is written in."""
    return boxes_of(tensor.size, tensor.dtype.itemsize)


def state_dict(catalog: Catalog, cut: Callable[[Readable], list[Box]] = rows_of) -> dict[str, Any]:
    """Return the nested state dict of a catalog, in the layout's keys; this rank writes its share of it.

    Args:
        catalog: what it holds.
        cut: returns a tensor's chunks.
    """
    share = _share(catalog, cut)

    def planned(tensor: Readable) -> Planned:
        return Planned(tensor, share.get(id(tensor), []))

    state: dict[str, Any] = {"model": {fqn: planned(tensor) for fqn, tensor in catalog.weights.items()}}
    optim: dict[str, Any] = {}
    if catalog.state:
        optim["state"] = {
            fqn: {kind: planned(tensor) for kind, tensor in kinds.items()} for fqn, kinds in catalog.state.items()
        }
    if catalog.groups:
        optim["param_groups"] = [dict(group) for group in catalog.groups]
    if optim:
        state["optim"] = optim
    if catalog.train:
        state["train"] = dict(catalog.train)
    return state


def _share(catalog: Catalog, cut: Callable[[Readable], list[Box]]) -> dict[int, list[Box]]:
    """Return the chunks of each tensor that are this rank's; tied names have the same."""
    chunks = [
        (number, key, box, math.prod(box[1]) * tensor.dtype.itemsize)
        for number, (key, tensor) in enumerate({id(t): t for t in catalog.tensors.values()}.items())
        for box in cut(tensor)
    ]
    mine = ranks.share(chunks, lambda chunk: chunk[3])[ranks.rank()]
    found: dict[int, list[Box]] = {}
    for _, key, box, _ in sorted(mine, key=lambda chunk: (chunk[0], chunk[2])):
        found.setdefault(key, []).append(box)
    return found


def planned_in(state: Mapping[str, Any]) -> Iterator[tuple[str, Planned]]:
    """Yield the planned tensors of a flattened state dict by key."""
    return ((key, value) for key, value in state.items() if isinstance(value, Planned))
