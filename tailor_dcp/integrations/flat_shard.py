"""``FlatShard``: a rank's flat piece of a tensor, which DCP saves and loads as ordinary chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from tailor_dcp.errors import TailorError
from tailor_dcp.flat_boxes import Box, boxes

_aten = torch.ops.aten


class FlatShard(torch.Tensor):
    """A tensor of which this process holds one flat interval, possibly an empty one.

    It looks like the whole tensor (``size()``, ``dtype``) and holds a view of the piece: what
    DCP loads into it goes where the piece lives, and what it saves is read there. It offers DCP's own
    protocol for tensors of foreign kinds, and torch's for wrapped tensors, which stagers copy by;
    nothing can be computed with it.

    Args:
        flat: the piece, one-dimensional and contiguous.
        start: the place of its first element in the flattened tensor.
        size: the whole tensor's size.
    """

    _flat: torch.Tensor
    _start: int

    @staticmethod
    def __new__(cls, flat: torch.Tensor, start: int, size: torch.Size) -> FlatShard:
        """Wrap a piece."""
        made: FlatShard = torch.Tensor._make_wrapper_subclass(
            cls, size, dtype=flat.dtype, device=flat.device, requires_grad=False
        )
        made._flat, made._start = flat, start
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        end = self._start + self._flat.numel()
        return f"FlatShard(elements {self._start} to {end} of {tuple(self.size())}, {self.dtype})"

    # What DCP asks of a tensor of a foreign kind -------------------------------------------

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        """Return what is written of it: one item a box."""
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                # Each item has its own properties, as the planner may narrow one key's dtype in place.
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(self._flat), self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Return the boxes that it consists of."""
        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in self._boxes()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        """Return the memory of one box. It is found by where it starts: coordinators rewrite its number."""
        at = 0
        for box in self._boxes():
            count = math.prod(box.sizes)
            if index.offset is None or torch.Size(box.offsets) == index.offset:
                return self._flat.narrow(0, at, count).view(box.sizes)
            at += count
        raise ValueError(f"{index.fqn} has no chunk at {index.offset} on this rank.")

    def _boxes(self) -> Iterator[Box]:
        return boxes(self._start, self._flat.numel(), self.size())

    # What stagers copy it by ---------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], int]:
        """Return the names of the tensors inside, and what else is needed to make it again."""
        return ["_flat"], self._start

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], start: int, outer_size: torch.Size, outer_stride: object
    ) -> FlatShard:
        """Make it again around a copy."""
        return FlatShard(inner["_flat"], start, outer_size)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """Take the piece along to another process."""
        return FlatShard, (self._flat, self._start, self.size())

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do the few things that stagers need done."""
        if func not in _OPERATIONS:
            raise TailorError(
                f"{func} was asked of a FlatShard, which is a place in ZeRO's buffers for DCP to save from and load "
                f"into; compute with the engine's module instead."
            )
        return _OPERATIONS[func](*args, **(kwargs or {}))


def _new_empty(shard: FlatShard, size: torch.Size, device: Any = None, **_: object) -> FlatShard:
    """Return an empty shell; DefaultStager then gives it copies of all attributes."""
    return FlatShard(shard._flat.new_empty(0, device=device), 0, torch.Size(size))


def _zeros_like(shard: FlatShard, device: Any = None, **_: object) -> FlatShard:
    return FlatShard(torch.zeros_like(shard._flat, device=device), shard._start, shard.size())


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if not isinstance(target, FlatShard) or not isinstance(source, FlatShard):
        # BlockingAsyncStager makes a plain number of what has no dimensions, also where other ranks hold it.
        raise TailorError(
            "A stager takes a FlatShard for a whole tensor; give dcp.async_save async_stager=planner.stager(...), or "
            "checkpoint_id= without a writer."
        )
    target._flat.copy_(source._flat, non_blocking=non_blocking)
    return target


def _detach(shard: FlatShard) -> FlatShard:
    return FlatShard(shard._flat, shard._start, shard.size())


def _clone(shard: FlatShard, **_: object) -> FlatShard:
    return FlatShard(shard._flat.clone(), shard._start, shard.size())


_OPERATIONS: dict[Any, Callable[..., torch.Tensor]] = {
    _aten.new_empty.default: _new_empty,
    _aten.zeros_like.default: _zeros_like,
    _aten.copy_.default: _copy,
    _aten.detach.default: _detach,
    _aten.clone.default: _clone,
}
