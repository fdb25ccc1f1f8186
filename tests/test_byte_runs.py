"""Runs of bytes: every element of a box goes from where it is to where it belongs, once."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.byte_runs import Box, runs_of


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    stored = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    offsets = tuple(draw(st.integers(0, n - 1)) for n in stored)
    return Box(stored, offsets, tuple(draw(st.integers(1, n - o)) for n, o in zip(stored, offsets, strict=True)))


def placed(box: Box, target: np.ndarray) -> None:
    """Do with the runs what a reader does."""
    source = np.arange(int(np.prod(box.stored, dtype=int)))
    whole = target.base if target.base is not None else target
    first = (target.__array_interface__["data"][0] - whole.__array_interface__["data"][0]) // target.itemsize
    runs = runs_of(box, [stride // target.itemsize for stride in target.strides])
    assert runs is not None
    assert list(runs.sources) == sorted(runs.sources)
    flat = whole.reshape(-1)
    for start, place in zip(runs.sources, runs.targets, strict=True):
        flat[first + place : first + place + runs.length] = source[start : start + runs.length]


def expected(box: Box) -> np.ndarray:
    stored = np.arange(int(np.prod(box.stored, dtype=int))).reshape(box.stored)
    return stored[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.lengths, strict=True))]


@given(boxes())
def test_into_a_tensor_of_its_own(box: Box) -> None:
    target = np.full(box.lengths, -1)
    placed(box, target)
    np.testing.assert_array_equal(target, expected(box))


@given(boxes(), st.data())
def test_into_a_part_of_a_larger_tensor(box: Box, data: st.DataObject) -> None:
    margins = [data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2))) for _ in box.lengths]
    whole = np.full([low + n + high for (low, high), n in zip(margins, box.lengths, strict=True)], -1)
    part = tuple(slice(low, low + n) for (low, _), n in zip(margins, box.lengths, strict=True))
    if box.lengths:
        placed(box, whole[part])
        np.testing.assert_array_equal(whole[part], expected(box))
        whole[part] = -1
        assert (whole == -1).all(), "something outside of the part was overwritten"


@given(boxes())
def test_the_shortest_run_and_the_widened_box(box: Box) -> None:
    wide = box.widened()
    assert wide.is_rows
    assert set(expected(box).reshape(-1)) <= set(expected(wide).reshape(-1))
    runs = runs_of(box, np.zeros(box.lengths, np.int8).strides)
    assert runs is not None
    assert box.shortest_run <= runs.length


def test_a_target_that_keeps_nothing_together() -> None:
    assert runs_of(Box((4, 6), (0, 0), (4, 6)), (1, 4)) is None
