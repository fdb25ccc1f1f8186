"""The arithmetic of flat streams, as laws."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.converters.zero_layout import (
    Flat,
    cut_each,
    cut_whole,
    dealt,
    gaps_of,
    part_of,
    sub_groups,
    undealt,
)

worlds = st.integers(1, 9)
counts = st.lists(st.integers(1, 70), min_size=1, max_size=8).map(lambda ns: [(f"p{i}", n) for i, n in enumerate(ns)])


def _check(flat: Flat, parameters: list[tuple[str, int]], world: int) -> None:
    """Every element is on one rank, at a place of its own, in the order of the parameter."""
    taken: set[tuple[int, int]] = set()
    for name, count in parameters:
        assert [piece.start for piece in flat.held[name]] == sorted({piece.start for piece in flat.held[name]})
        elements = [e for piece in flat.held[name] for e in range(piece.start, piece.start + piece.length)]
        assert elements == list(range(count))
        for piece in flat.held[name]:
            assert piece.length > 0 and 0 <= piece.rank < world
            places = {(piece.rank, at) for at in range(piece.offset, piece.offset + piece.length)}
            assert not places & taken and piece.offset + piece.length <= flat.filled[piece.rank] <= flat.length
            taken |= places


@given(counts, worlds)
def test_zero3_gives_each_rank_an_equal_part_of_each_parameter(parameters: list[tuple[str, int]], world: int) -> None:
    """At the same offset on all ranks, and as long as DeepSpeed's own rounding up makes it."""
    flat = cut_each(parameters, world)
    _check(flat, parameters, world)
    assert flat.length == sum(math.ceil(count / world) for _, count in parameters)
    for name, _ in parameters:
        assert len({piece.offset for piece in flat.held[name]}) == 1


@given(counts, worlds, st.booleans(), st.sampled_from([2, 4]))
def test_zero12_lays_parameters_end_to_end(
    parameters: list[tuple[str, int]], world: int, aligned: bool, width: int
) -> None:
    """Padded at the end to twice the number of ranks; a rank's part is what lies within."""
    gaps = gaps_of(parameters, width) if aligned else []
    flat = cut_whole(parameters, world, gaps)
    _check(flat, parameters, world)
    total = sum(count for _, count in parameters) + sum(gaps)
    assert flat.length * world == math.ceil(total / (2 * world)) * 2 * world
    assert sum(flat.filled) == total
    at = 0
    for (name, count), gap in zip(parameters, gaps or [0] * len(parameters), strict=True):
        first = flat.held[name][0]
        assert first.rank * flat.length + first.offset == at
        at += count + gap


@given(counts, st.sampled_from([2, 4]))
def test_aligned_parameters_begin_at_16_bytes(parameters: list[tuple[str, int]], width: int) -> None:
    """All but the first follow a gap; nothing follows the last."""
    gaps = gaps_of(parameters, width)
    at = 0
    for (_, count), gap in zip(parameters, gaps, strict=True):
        assert at * width % 16 == 0
        at += count + gap
    assert gaps[-1] == 0


@given(counts, worlds, st.integers(1, 200))
def test_sub_groups_are_whole_parameters_in_order(parameters: list[tuple[str, int]], world: int, size: int) -> None:
    """Each but the last reaches the size, and would not without its last parameter."""
    groups = sub_groups(parameters, world, size)
    assert [p for group in groups for p in group] == parameters
    if len(groups) == 1:
        return
    for group in groups[:-1]:
        lengths = [part_of(count, world) for _, count in group]
        assert sum(lengths) >= size > sum(lengths[:-1])


def test_sub_groups_as_deepspeed_makes_them() -> None:
    """The last parameter ends a sub-group, however small; a group that fits is not divided."""
    parameters = [("a", 4), ("b", 4), ("c", 2)]
    assert sub_groups(parameters, 2, 2) == [[("a", 4)], [("b", 4)], [("c", 2)]]
    assert sub_groups(parameters, 2, 3) == [[("a", 4), ("b", 4)], [("c", 2)]]
    assert sub_groups(parameters, 2, 5) == [parameters]


@given(st.lists(st.integers(), unique=True), worlds)
def test_dealing_and_gathering_again(items: list[int], world: int) -> None:
    """Both ways, for any number of ranks."""
    assert undealt(dealt(items, world), world) == items
    assert sorted(dealt(items, world)) == sorted(items)


def test_dealt_as_round_robin_gradients() -> None:
    """The first rank's are every third, from the first on."""
    assert dealt("abcdefg", 3) == list("adgbecf")
