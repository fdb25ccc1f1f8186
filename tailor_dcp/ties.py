"""Ties: parameters that share storage under several names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Tie = tuple[str, ...]


def find_ties(tensors: Mapping[str, Any]) -> list[Tie]:
    """Return the groups of keys whose tensors overlap in memory on this rank.

    The shards of FSDP's flat parameters share a storage but do not overlap, so they are not
    tied. A shard without elements has no address and says nothing: another rank's will.
    """
    spans = sorted(span for key, value in tensors.items() for span in _spans(key, value))
    groups: list[list[str]] = []
    device, end = "", 0
    for span_device, start, span_end, key in spans:
        if groups and device == span_device and start < end:
            groups[-1].append(key)
            end = max(end, span_end)
        else:
            groups.append([key])
            device, end = span_device, span_end
    return [tie for group in groups if len(tie := tuple(dict.fromkeys(group))) > 1]


def merge_ties(ties: Iterable[Tie]) -> tuple[Tie, ...]:
    """Join groups that share a key, as different ranks and earlier saves report them."""
    joined: list[dict[str, None]] = []
    for tie in ties:
        group = dict.fromkeys(tie)
        for other in [g for g in joined if g.keys() & group.keys()]:
            joined.remove(other)
            group = {**other, **group}
        joined.append(group)
    return tuple(tuple(group) for group in joined)


def _spans(key: str, value: Any) -> Iterable[tuple[str, int, int, str]]:
    """Return the stretches of memory that a tensor covers: device, first byte, past the last, key."""
    if isinstance(value, ShardedTensor):
        for shard in value.local_shards():
            yield from _spans(key, shard.tensor)
        return
    tensor = value.to_local() if isinstance(value, DTensor) else value
    if is_traceable_wrapper_subclass(tensor):
        # Its data is the largest of what it wraps; the rest may be tables that are shared by all.
        inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        yield from _spans(key, max(inner, key=lambda part: part.numel() * part.itemsize)) if inner else ()
        return
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        return
    if tensor.numel() == 0 or tensor.is_meta or tensor.data_ptr() == 0:
        return
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    yield str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.itemsize, key
