"""Ties: what shares storage is one, whoever sees it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.ties import find_ties, merge_ties

names = st.sampled_from("abcdefgh")
groups = st.lists(st.lists(names, min_size=1, max_size=3, unique=True).map(tuple), max_size=8)


def connected(ties: list[tuple[str, ...]]) -> set[frozenset[str]]:
    """Return what belongs together, by walking from name to name."""
    found = set()
    for start in {name for tie in ties for name in tie}:
        seen, todo = {start}, [start]
        while todo:
            here = todo.pop()
            more = {name for tie in ties if here in tie for name in tie} - seen
            seen |= more
            todo += more
        found.add(frozenset(seen))
    return found


@given(groups)
def test_merged_ties_are_what_is_connected(ties: list[tuple[str, ...]]) -> None:
    """Two ranks that each see one end of a chain make one group of three."""
    assert {frozenset(group) for group in merge_ties(ties)} == connected(ties)


@given(groups)
def test_merging_is_done_once(ties: list[tuple[str, ...]]) -> None:
    """What comes from the record merges with itself to itself, every name in one group and once."""
    merged = merge_ties(ties)
    assert merge_ties(merged) == merged
    listed = [name for group in merged for name in group]
    assert len(listed) == len(set(listed))


def test_one_storage_under_two_names_is_a_tie() -> None:
    """The tensor itself, its transpose, a detached alias: all are the same memory."""
    weight = torch.zeros(3, 4)
    tied = {"a": weight, "b": torch.zeros(3, 4), "c": weight.t(), "d": weight.detach()}
    assert [set(group) for group in find_ties(tied)] == [{"a", "c", "d"}]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), min_size=1, max_size=8))
def test_views_are_tied_exactly_where_they_overlap(spans: list[tuple[int, int]]) -> None:
    """Shards of one flat parameter share a storage but not a byte, so they are not tied."""
    flat = torch.zeros(64)
    views = {f"p{i}": flat[start : start + length] for i, (start, length) in enumerate(spans)}
    overlaps = [
        (f"p{i}", f"p{j}")
        for i, (a, n) in enumerate(spans)
        for j, (b, m) in enumerate(spans)
        if i < j and a < b + m and b < a + n
    ]
    assert {frozenset(group) for group in find_ties(views)} == connected(overlaps)


def test_what_has_no_memory_is_tied_to_nothing() -> None:
    """Empty shards and meta tensors all have the address 0; other values have none."""
    empty = torch.zeros(0, 4)
    assert find_ties({"a": empty, "b": empty, "c": torch.zeros(2, device="meta"), "d": 1, "e": "text", "f": None}) == []


def test_an_expanded_tensor_covers_what_it_can_reach() -> None:
    """A stride of 0 or a gap between rows does not fool the comparison."""
    flat = torch.zeros(12)
    expanded, columns = flat[:1].expand(5), flat.view(3, 4)[:, :2]
    assert find_ties({"a": expanded, "b": flat[1:2]}) == []
    assert [set(group) for group in find_ties({"a": columns, "b": flat[9:10]})] == [{"a", "b"}]
