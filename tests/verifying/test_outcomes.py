"""Outcomes: what is packed is what was put in, in a tenth of the memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tailor_dcp.verifying.blob_checks import Seen, Want
from tailor_dcp.verifying.outcomes import Outcomes

sums = st.none() | st.integers(0, (1 << 32) - 1)
mosts = st.sampled_from([0, 5, 1000])
"""Outcomes that are held unpacked: none, few, all."""
wants = st.builds(
    Want,
    st.integers(0, 1 << 62),
    st.integers(0, 1 << 62),
    st.sampled_from(["tensor", "entry", "transformed"]),
    sums,
    st.none() | st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.sampled_from([None, torch.float32, torch.bfloat16]),
)
kept = st.one_of(
    st.builds(
        Seen, st.just("good"), st.just(""), sums | st.integers(-(1 << 63), (1 << 63) - 1).filter(lambda n: n != -1)
    ),
    st.builds(Seen, st.sampled_from(["damaged", "untold"]), st.text()),
)
forgotten = st.builds(Seen, st.sampled_from(["gone", "unread"]), st.text())


_WANT = Want(0, 0, "tensor", None, (0,), torch.bfloat16)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.dictionaries(wants, kept | forgotten, max_size=5), st.booleans())), mosts
)
@example([(1, {_WANT: Seen("gone")}, False), (1, {_WANT: Seen("good")}, True)], 0)
def test_it_remembers_all_but_what_could_not_be_read(notes: list[Any], most: int) -> None:
    outcomes, expected = Outcomes(most), dict[tuple[int, int], dict[Want, Seen]]()
    for number, seen, packs in notes:
        file = (0, number)
        outcomes.note(file, seen)
        expected[file] = {**expected.get(file, {}), **seen}
        if packs:
            outcomes.settle()
            expected = {
                file: {want: one for want, one in seen.items() if one.outcome not in ("gone", "unread")}
                for file, seen in expected.items()
            }
        assert all(outcomes.of(file) == seen for file, seen in expected.items())
    known = [one for seen in expected.values() for one in seen.values() if one.outcome not in ("gone", "unread")]
    assert outcomes.count() == len(known)
    for file, seen in expected.items():
        marks = [((want.offset, want.length), one.mark) for want, one in seen.items() if one.outcome == "good"]
        assert sorted(outcomes.marks(file)) == sorted(pair for pair in marks if pair[1] is not None)
    assert outcomes.count() == len(known)


def test_what_is_good_takes_little_memory() -> None:
    """A hundred full checkpoints of a large job have forty million stretches."""
    count = 20_000
    outcomes = Outcomes(0)
    tracemalloc.start()
    seen = {Want(1000 * n, 1000, "tensor", n, (n % 7, 100), torch.float32): Seen("good", mark=n) for n in range(count)}
    before, _ = tracemalloc.get_traced_memory()
    outcomes.note((0, 0), seen)
    outcomes.settle()
    del seen
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after < count * 60 < before / 4
