"""Tying: which parameters of a result share one storage. The base says so; a source's ties alone make none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING

from tailor_dcp.merging.index import Index
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.ties import Tie, merge_ties

if TYPE_CHECKING:
    from tailor_dcp.merging.resolve import Slot


def shared(base: Index, indexes: Iterable[Index], slots: Iterable[Slot]) -> tuple[Tie, ...]:
    """Return the result's keys that share one storage: in their source, and in the base if that has the like.

    Args:
        base: the base, whose model and configuration the result has.
        indexes: all sources.
        slots: the result.
    """
    filled: dict[tuple[str, str], list[Slot]] = {}
    for slot in slots:
        filled.setdefault((slot.source, slot.held.key), []).append(slot)
    found: list[Tie] = []
    for index in indexes:
        for tie in index.ties:
            # Parameters that are there more than once share the storage of their own copies.
            copies = zip_longest(*(filled[index.name, key] for key in tie if (index.name, key) in filled))
            found += [keys for group in copies if None not in group for keys in _as_in(base, group)]
    return tuple(found)


def _as_in(base: Index, slots: Sequence[Slot]) -> Iterator[Tie]:
    """Split keys that share one storage into those that do in the base; what it has nothing like stays as it is."""
    home = {key: number for number, tie in enumerate(base.ties) for key in tie}
    strange = [slot.key for slot in slots if slot.like_source != base.name]
    groups: dict[int, list[str]] = {}
    for slot in slots:
        if slot.like_source == base.name and slot.like.key in home:
            groups.setdefault(home[slot.like.key], []).append(slot.key)
    first, *others = groups.values() or [[]]
    yield from (tuple(keys) for keys in ([*first, *strange], *others) if len(keys) > 1)


def loose(base: Index, ties: Iterable[Tie], slots: Mapping[str, Slot]) -> Iterator[tuple[Slot, Slot]]:
    """Yield the pairs that share one storage in the base, and of which the result's source does not say so.

    Raises:
        RecipeError: they come from two places; whichever was loaded last would win.
    """
    home = {key: number for number, tie in enumerate(ties) for key in tie}
    for tie in base.ties:
        for first, slot in pairwise(slots[key] for key in tie if key in slots):
            if slot.source != first.source:
                raise RecipeError(
                    f"{first.fqn} and {slot.fqn} share one storage, but come from {first.source} and {slot.source}; "
                    f"name both layers, {first.unit.layer} and {slot.unit.layer}, with one source."
                )
            if slot.key not in home or home[slot.key] != home.get(first.key):
                yield first, slot


def two_tensors(base: Index, first: Slot, slot: Slot) -> RecipeError:
    """Return the refusal of a pair that the base's model has one tensor for."""
    return RecipeError(
        f"{first.fqn} and {slot.fqn} share one storage in {base.name}, but are two tensors in {slot.source}; leave the "
        f"layers {first.unit.layer} and {slot.unit.layer} to {base.name}, or make a Hugging Face folder of it "
        f"(--to hf), which has both."
    )


def joined(ties: Iterable[Tie], pairs: Iterable[tuple[Slot, Slot]]) -> tuple[Tie, ...]:
    """Return ties with pairs that were found to hold the same values."""
    return merge_ties([*ties, *((first.key, slot.key) for first, slot in pairs)])
