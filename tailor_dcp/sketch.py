"""Sketches: a few elements of each tensor, the same ones however the tensor is cut over ranks.

How far a tensor moved since it was saved, |w - w_saved| / |w_saved|, is estimated from elements at fixed places:
the row-major order of the whole tensor is cut into as many stretches of equal length as there are samples, and
one element is taken of each, at a place that a hash of the stretch's number tells. So every rank knows without a
word which samples it holds, sharding leaves no trace, and after a restart the same places are compared.

With n samples of a tensor whose changes are spread like a normal distribution the estimate is off by about
1 / sqrt(2 n): 2 % for the 1024 samples of a large matrix. A layer's estimate adds up all its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Part = tuple[str, tuple[int, ...]]
"""A key and where a chunk of it starts."""
Samples = NDArray[np.float32]
Place = NDArray[np.int64]

ONE_IN = 4096
"""Elements that one sample stands for. Weights and Adam's moments in fp32 then cost 0.07 % of the weights."""
FEWEST, MOST = 4, 1024
"""Samples of a small tensor, and of the largest: a record must stay small beside the metadata that it rides in."""
_SEED = np.uint64(0x7461696C6F72)


def count(numel: int) -> int:
    """Return how many samples are taken of a tensor of ``numel`` elements."""
    return min(numel, max(FEWEST, min(MOST, numel // ONE_IN)))


@lru_cache(maxsize=256)
def places(numel: int) -> Place:
    """Return the places of the samples in row-major order, rising; of a small tensor that is all of them."""
    samples = count(numel)
    edges = np.array([i * numel // samples for i in range(samples + 1)], np.int64) if samples else np.zeros(1, np.int64)
    lengths = np.diff(edges)
    drawn = _mixed(np.arange(samples, dtype=np.uint64) + _SEED) >> np.uint64(11)
    within = (drawn.astype(np.float64) / 2.0**53 * lengths).astype(np.int64)
    found: Place = edges[:-1] + np.minimum(within, lengths - 1)
    found.flags.writeable = False
    return found


class Taken(NamedTuple):
    """A chunk's samples.

    Attributes:
        which: their numbers among the whole tensor's samples, rising.
        values: what they are, in fp32.
    """

    which: Place
    values: Samples


def take(chunks: Mapping[Part, tuple[torch.Tensor, Sequence[int]]]) -> dict[Part, Taken]:
    """Take the samples that lie in some chunks.

    Args:
        chunks: each chunk's tensor, of floating point, on any device, with the whole tensor's size.
    """
    found: dict[Part, tuple[Place, torch.Tensor]] = {}
    for part, (tensor, size) in chunks.items():
        which, index = _within(part[1], tensor.shape, tuple(size))
        if len(which):
            where = tuple(torch.from_numpy(axis).to(tensor.device) for axis in index)
            found[part] = which, tensor.detach()[where].float()
    # From a GPU in one go: a wait for each of a thousand tensors would take longer than all the rest.
    whole = torch.cat([values for _, values in found.values()]).cpu().numpy() if _one_device(found) else None
    taken, at = {}, 0
    for part, (which, values) in found.items():
        mine = values.cpu().numpy() if whole is None else whole[at : at + len(which)]
        taken[part] = Taken(which, mine.reshape(-1))
        at += len(which)
    return taken


def assemble(parts: Iterable[tuple[Part, Taken]], sizes: Mapping[str, Sequence[int]]) -> dict[str, Samples]:
    """Put the chunks of all ranks together; a key of which a sample is missing has no sketch.

    Where ranks hold copies of one element that differ, any of them may be written, so there is none either.
    """
    whole = {key: np.full(count(math.prod(size)), np.nan, np.float32) for key, size in sizes.items()}
    filled = {key: np.zeros(len(samples), bool) for key, samples in whole.items()}
    torn: set[str] = set()
    for (key, _), (which, values) in parts:
        if key not in whole:
            continue
        again = filled[key][which]
        if not np.array_equal(whole[key][which][again], values[again], equal_nan=True):
            torn.add(key)
        whole[key][which] = values
        filled[key][which] = True
    return {key: samples for key, samples in whole.items() if filled[key].all() and key not in torn}


class Moved(NamedTuple):
    """Sums of squares: of a tensor's change, and of what it was. They add up over tensors."""

    change: float
    before: float


def moved(before: Samples, now: Samples, numel: int) -> Moved:
    """Estimate how far a tensor of ``numel`` elements moved."""
    if not len(now):
        return Moved(0.0, 0.0)
    old, new = before.astype(np.float64), now.astype(np.float64)
    scale = numel / len(new)
    return Moved(float(np.square(new - old).sum()) * scale, float(np.square(old).sum()) * scale)


def relative(several: Iterable[Moved]) -> float:
    """Return the relative change of several tensors together; infinite where zeros became something else."""
    changes, befores = zip(*several, strict=True)
    change, before = math.fsum(changes), math.fsum(befores)
    if math.isnan(change) or math.isnan(before):
        return math.inf  # it must not be carried for being unlike itself
    if before == 0 or math.isinf(change):
        return math.inf if change else 0.0
    return math.sqrt(change / before)


def pack(samples: Samples) -> bytes:
    """Return samples as a record stores them: little-endian fp32."""
    return samples.astype("<f4").tobytes()


def unpack(packed: bytes) -> Samples:
    """Return the samples that a record stores.

    Raises:
        ValueError: they are cut off.
    """
    return np.frombuffer(packed, "<f4").astype(np.float32)


def _within(offsets: Sequence[int], shape: Sequence[int], size: tuple[int, ...]) -> tuple[Place, list[Place]]:
    """Return the samples that lie in a box: their numbers, and their coordinates in there."""
    numel = math.prod(size)
    if not numel or not math.prod(shape):
        return np.zeros(0, np.int64), []
    flat = places(numel)
    if not size:
        return np.zeros(1, np.int64), []
    index = [axis - start for axis, start in zip(np.unravel_index(flat, size), offsets, strict=True)]
    inside = np.ones(len(flat), bool)
    for axis, length in zip(index, shape, strict=True):
        inside &= (axis >= 0) & (axis < length)
    return np.flatnonzero(inside), [axis[inside].astype(np.int64) for axis in index]


def _one_device(found: Mapping[Part, tuple[Place, torch.Tensor]]) -> bool:
    return len({values.device for _, values in found.values()}) == 1 and all(v.dim() for _, v in found.values())


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the outputs of the generator SplitMix64, by their index."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
