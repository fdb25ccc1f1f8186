"""The arithmetic of ZeRO's flat streams: which elements of which parameter each rank has, and where. Pure.

Reading and writing go by the same plan: what is cut from a stream in one direction is put there in the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

ALIGNMENT = 2
"""ZeRO-1 and 2 pad a group so that each rank's part has an even number of elements."""

T = TypeVar("T")
Counts = Sequence[tuple[str, int]]
"""Parameters in their order: name and number of elements."""


class Held(NamedTuple):
    """Elements of a parameter that lie together on one rank.

    Attributes:
        rank: the rank.
        offset: where they start in its part of the stream.
        start: the first of them in the parameter, in row-major order.
        length: how many they are.
    """

    rank: int
    offset: int
    start: int
    length: int


@dataclass(frozen=True)
class Flat:
    """A flat stream of several parameters: a sub-group of ZeRO-3, or a param group of ZeRO-1 and 2.

    Attributes:
        length: the elements of each rank's part, padding included.
        filled: for each rank how many of them come before the padding at the end of the whole stream.
        held: for each parameter its elements, in their order; a rank that has none is left out.
    """

    length: int
    filled: tuple[int, ...]
    held: Mapping[str, tuple[Held, ...]]

    def of_rank(self, rank: int) -> list[tuple[str, Held]]:
        """Return what a rank has, in the order of its stream."""
        found = [(name, piece) for name, pieces in self.held.items() for piece in pieces if piece.rank == rank]
        return sorted(found, key=lambda item: item[1].offset)


def part_of(count: int, world: int) -> int:
    """Return how many elements of a parameter each rank has in ZeRO-3, the last ones' padding included."""
    return -(-count // world)


def cut_each(counts: Counts, world: int) -> Flat:
    """Cut every parameter for itself in equal parts, one a rank: ZeRO-3.

    Args:
        counts: the parameters of a sub-group, in its order.
        world: how many ranks.
    """
    held: dict[str, tuple[Held, ...]] = {}
    offset = 0
    for name, count in counts:
        part = part_of(count, world)
        starts = [min(rank * part, count) for rank in range(world)]
        pieces = [Held(rank, offset, start, min(part, count - start)) for rank, start in enumerate(starts)]
        held[name] = tuple(piece for piece in pieces if piece.length)
        offset += part
    return Flat(offset, (offset,) * world, held)


def cut_whole(counts: Counts, world: int, gaps: Sequence[int] = ()) -> Flat:
    """Lay parameters one after the other and cut that in equal parts: ZeRO-1 and 2.

    Args:
        counts: the parameters of a group, in the order of the stream.
        world: how many ranks.
        gaps: padding after each parameter (``zero_optimization.parameter_alignment``); none by default.
    """
    starts, at = [], 0
    for (_, count), gap in zip(counts, gaps or [0] * len(counts), strict=True):
        starts.append(at)
        at += count + gap
    length = -(-at // (ALIGNMENT * world)) * ALIGNMENT
    held = {name: _within(start, count, length) for (name, count), start in zip(counts, starts, strict=True)}
    return Flat(length, tuple(min(max(at - rank * length, 0), length) for rank in range(world)), held)


def _within(start: int, count: int, length: int) -> tuple[Held, ...]:
    """Return the pieces of a stretch of a stream whose ranks have ``length`` elements each."""
    pieces, at = [], start
    while at < start + count:
        rank, offset = divmod(at, length)
        taken = min(start + count - at, length - offset)
        pieces.append(Held(rank, offset, at - start, taken))
        at += taken
    return tuple(pieces)


def gaps_of(counts: Counts, width: int) -> list[int]:
    """Return the padding after each parameter that ``parameter_alignment`` asks for: to 16 bytes, not after the last.

    Args:
        counts: the parameters in the order of the stream.
        width: bytes of an element of the model's dtype.
    """
    gaps, at = [], 0
    for _, count in counts:
        gaps.append(-(at + count) % (16 // width))
        at += count + gaps[-1]
    return [*gaps[:-1], 0] if gaps else []


def sub_groups(counts: Counts, world: int, size: int) -> list[list[tuple[str, int]]]:
    """Divide a param group of ZeRO-3 in sub-groups of whole parameters.

    Args:
        counts: the parameters of the group.
        world: how many ranks.
        size: ``sub_group_size``; a sub-group ends with the parameter by which a rank has as many elements.
    """
    if size >= sum(part_of(count, world) for _, count in counts):
        return [list(counts)]
    found: list[list[tuple[str, int]]] = [[]]
    filled = 0
    for name, count in counts:
        if filled >= size:
            found.append([])
            filled = 0
        found[-1].append((name, count))
        filled += part_of(count, world)
    return found


def dealt(items: Sequence[T], world: int) -> list[T]:
    """Return items in the order that ``round_robin_gradients`` puts parameters in."""
    return [item for rank in range(world) for item in items[rank::world]]


def undealt(items: Sequence[T], world: int) -> list[T]:
    """Return items in the order that they had before they were dealt."""
    places = dealt(range(len(items)), world)
    return [item for _, item in sorted(zip(places, items, strict=True), key=lambda pair: pair[0])]
