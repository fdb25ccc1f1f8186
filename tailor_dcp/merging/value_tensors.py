"""Computed tensors: made when they are read, as a whole or a stretch at a time, and dropped when they were."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce

import torch

from tailor_dcp.tensors import Readable

_HELD = 4
"""Results that are kept while they are read; writers have two threads, and each can leave a tensor half read."""
_LARGE = 64 << 20
"""Bytes; of larger results only one is computed at a time, since its inputs are in memory with it."""


class Bench:
    """Where tensors are computed: knows those that are being read, so that memory is bounded."""

    def __init__(self) -> None:
        self._held: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._large = threading.Lock()

    def get(self, key: int) -> torch.Tensor | None:
        """Return a result that is held."""
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
            return found

    def make(self, key: int, count: int, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Compute a result and hold it; the one that was not read for the longest is let go for it."""
        with self._large if count > _LARGE else nullcontext():
            made = make()
        with self._lock:
            self._held[key] = made
            if len(self._held) > _HELD:
                self._held.popitem(last=False)
        return made

    def drop(self, key: int) -> None:
        """Let a result go."""
        with self._lock:
            self._held.pop(key, None)


class Computed(Readable):
    """A tensor that is computed, and computed anew should somebody read it a second time.

    Args:
        size: its shape.
        dtype: its dtype.
        make: computes it; the same each time.
        bench: where.
    """

    def __init__(self, size: torch.Size, dtype: torch.dtype, make: Callable[[], torch.Tensor], bench: Bench) -> None:
        self.size = size
        self.dtype = dtype
        self._make = make
        self._bench = bench
        self._lock = threading.Lock()
        self._left = self.count

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """Copy from the result, computing it first if it is not there; other threads wait for it."""
        with self._lock:
            flat = self._bench.get(id(self))
            if flat is None:
                flat = self._bench.make(id(self), self.bytes, lambda: self._make().reshape(-1))
                self._left = self.count
        out.copy_(flat[start : start + out.numel()])
        with self._lock:
            self._left -= out.numel()
            if self._left <= 0:
                self._bench.drop(id(self))


@dataclass(frozen=True, eq=False)
class Windowed(Readable):
    """A tensor that is computed element by element, a stretch at a time.

    Attributes:
        size: its shape.
        dtype: its dtype.
        inputs: what it is made of.
        make: makes a stretch of it, 1-D, of the same stretch of each.
    """

    size: torch.Size
    dtype: torch.dtype
    inputs: Sequence[Readable]
    make: Callable[[Sequence[torch.Tensor]], torch.Tensor]

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """Read the stretch of all inputs, and compute."""
        out.copy_(self.make([tensor.read(start, start + out.numel()) for tensor in self.inputs]))


@dataclass(frozen=True, eq=False)
class Mean(Readable):
    """The weighted mean of tensors of one shape, a stretch at a time; the weights add up to 1."""

    tensors: Sequence[Readable]
    weights: Sequence[float]

    @property
    def size(self) -> torch.Size:  # type: ignore[override]
        """Its shape."""
        return self.tensors[0].size

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Its dtype: the one that holds those of all of them."""
        return reduce(torch.promote_types, (tensor.dtype for tensor in self.tensors))

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """Read all of them, and add up in fp32 or wider."""
        total = torch.zeros(out.numel(), dtype=torch.promote_types(self.dtype, torch.float32))
        for tensor, weight in zip(self.tensors, self.weights, strict=True):
            total.add_(tensor.read(start, start + out.numel()).to(total.dtype), alpha=weight)
        out.copy_(total)


@dataclass(frozen=True, eq=False)
class Largest(Readable):
    """The larger of tensors' elements, a stretch at a time."""

    tensors: Sequence[Readable]

    @property
    def size(self) -> torch.Size:  # type: ignore[override]
        """Its shape."""
        return self.tensors[0].size

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Its dtype."""
        return self.tensors[0].dtype

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """Read all of them."""
        first, *others = (tensor.read(start, start + out.numel()).to(self.dtype) for tensor in self.tensors)
        for other in others:
            first = torch.maximum(first, other)
        out.copy_(first)
