"""Coverage of tensors by chunks, against counting every element."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_dcp.verifying.coverage import Miscovered, TooManyCornersError, miscovered

Box = tuple[tuple[int, ...], tuple[int, ...]]


@st.composite
def cut(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A tensor cut into boxes, of which some may then be moved, doubled or dropped."""
    size = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    boxes: list[Box] = [(tuple(0 for _ in size), size)]
    for _ in range(draw(st.integers(0, 4)) if size else 0):
        offsets, sizes = boxes[number := draw(st.integers(0, len(boxes) - 1))]
        dim = draw(st.integers(0, len(size) - 1))
        at = draw(st.integers(0, sizes[dim]))
        boxes[number] = offsets, (*sizes[:dim], at, *sizes[dim + 1 :])
        behind = (*offsets[:dim], offsets[dim] + at, *offsets[dim + 1 :])
        boxes.append((behind, (*sizes[:dim], sizes[dim] - at, *sizes[dim + 1 :])))
    for _ in range(draw(st.integers(0, 2))):
        number = draw(st.integers(0, len(boxes) - 1))
        how = draw(st.sampled_from(["drop", "double", "move"]))
        if how == "drop" and len(boxes) > 1:
            del boxes[number]
        elif how == "double":
            boxes.append(boxes[number])
        else:
            sizes = boxes[number][1]
            boxes[number] = tuple(draw(st.integers(0, w - s)) for w, s in zip(size, sizes, strict=True)), sizes
    return size, boxes


@settings(max_examples=300)
@given(cut())
def test_it_is_what_counting_finds(case: tuple[tuple[int, ...], list[Box]]) -> None:
    size, boxes = case
    times = np.zeros(size, int)
    for offsets, sizes in boxes:
        times[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    odd = np.argwhere(times != 1)
    found = miscovered(size, boxes)
    if not len(odd):
        assert found is None
    else:
        first = tuple(int(i) for i in odd[0])
        assert found == Miscovered(first, int(times[first]))


def test_huge_sizes_do_not_overflow() -> None:
    """Of a tensor that no memory holds, with places in more dimensions than their product has room for."""
    side = 1 << 50
    halves = [(0, side // 2), (side // 2, side - side // 2)]
    boxes = [((a, b, c), (d, e, f)) for a, d in halves for b, e in halves for c, f in halves]
    assert miscovered((side, side, side), boxes) is None
    found = miscovered((side, side, side), boxes[:-1])
    assert found == Miscovered((side // 2, side // 2, side // 2), 0)
    draw = np.random.default_rng(0)
    many = [(tuple(draw.integers(0, 1 << 40, 5).tolist()), (1, 1, 1, 1, 1)) for _ in range(20_000)]
    assert miscovered((1 << 41,) * 5, many) == Miscovered((0, 0, 0, 0, 0), 0)


def test_a_hundred_thousand_chunks() -> None:
    rows = [((8 * number, 0), (8, 512)) for number in range(100_000)]
    assert miscovered((800_000, 512), rows) is None
    assert miscovered((800_000, 512), rows[:70_000] + rows[70_001:]) == Miscovered((560_000, 0), 0)
    assert miscovered((800_000, 512), [*rows, ((4, 3), (1, 1))]) == Miscovered((4, 3), 2)


def test_dimensions_that_are_not_cut_cost_nothing() -> None:
    """And what is cut along more than any tensor is refused, instead of taking all memory."""
    size = (2,) * 60
    first, second = (0,) * 60, (*(0,) * 59, 1)
    assert miscovered(size, [(first, (*size[:59], 1)), (second, (*size[:59], 1))]) is None
    assert miscovered(size, [(first, (*size[:59], 1)), (first, (*size[:59], 1))]) == Miscovered(first, 2)
    with pytest.raises(TooManyCornersError):
        miscovered(size, [(first, (1,) * 60)])
