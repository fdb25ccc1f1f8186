"""Flat intervals as boxes: every element once, in order, in few boxes."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.flat_boxes import Box, boxes

SIZES = st.lists(st.integers(0, 5), max_size=4)
HUGE = st.lists(st.integers(1, 2**40), min_size=1, max_size=5)


def most(size: list[int]) -> int:
    return max(1, 2 * len(size) - 1)


def elements(box: Box, size: list[int]) -> list[int]:
    """Return the flat places of a box's elements, counted out one by one."""
    places = {index: place for place, index in enumerate(itertools.product(*map(range, size)))}
    ranges = [range(start, start + length) for start, length in zip(box.offsets, box.sizes, strict=True)]
    return [places[index] for index in itertools.product(*ranges)]


@given(st.data(), SIZES)
def test_boxes_cover_the_interval_once_and_in_order(data: st.DataObject, size: list[int]) -> None:
    start = data.draw(st.integers(0, math.prod(size)))
    length = data.draw(st.integers(0, math.prod(size) - start))
    found = list(boxes(start, length, size))
    assert [place for box in found for place in elements(box, size)] == list(range(start, start + length))
    assert len(found) <= most(size)


@given(st.data(), HUGE)
def test_huge_tensors_need_no_more(data: st.DataObject, size: list[int]) -> None:
    start = data.draw(st.integers(0, math.prod(size)))
    length = data.draw(st.integers(0, math.prod(size) - start))
    found = list(boxes(start, length, size))
    assert sum(math.prod(box.sizes) for box in found) == length
    assert len(found) <= most(size)


def test_as_many_as_that_can_be_needed() -> None:
    """The bound is not a guess: this interval begins and ends askew in each dimension."""
    assert list(boxes(23, 74, (5, 4, 5))) == [
        Box((1, 0, 3), (1, 1, 2)),
        Box((1, 1, 0), (1, 3, 5)),
        Box((2, 0, 0), (2, 4, 5)),
        Box((4, 0, 0), (1, 3, 5)),
        Box((4, 3, 0), (1, 1, 2)),
    ]


def test_no_dimensions_and_no_elements() -> None:
    assert list(boxes(0, 1, ())) == [Box((), ())]
    assert list(boxes(0, 0, ())) == []
    assert list(boxes(0, 0, (3, 0, 2))) == []
    assert list(boxes(7, 0, (3, 5))) == []


@pytest.mark.parametrize("interval", [(-1, 2), (0, 7), (6, 1), (2, -1)])
def test_what_is_no_part_is_refused(interval: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"no part of a tensor of size \(2, 3\)"):
        list(boxes(*interval, (2, 3)))
