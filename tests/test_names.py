"""Names as people write them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.errors import TailorError
from tailor_dcp.names import alternatives, literal, matches


@given(st.lists(st.lists(st.sampled_from(["0", "1", "a", ""]), min_size=1, max_size=3), max_size=4))
def test_braces_stand_for_every_combination(parts: list[list[str]]) -> None:
    pattern = "x" + "".join(f".{{{','.join(part)}}}" for part in parts)
    expected = {"x" + "".join(f".{word}" for word in words) for words in itertools.product(*parts)}
    assert set(alternatives(pattern)) == expected


def test_braces_within_braces() -> None:
    assert set(alternatives("a{1,{2,3}b}")) == {"a1", "a2b", "a3b"}
    assert matches("model.layers.9", "model.layers.{8,9}")
    assert not matches("model.layers.7", "model.layers.{8,9}")


def test_a_few_letters_do_not_stand_for_more_names_than_there_is_memory() -> None:
    with pytest.raises(TailorError, match="more than 10000 names"):
        alternatives("{a,b}" * 40)


@given(st.text("ab[]{},*?!.\n", max_size=8), st.text("ab[]{},*?!.\n", max_size=8))
def test_a_name_taken_literally_means_itself_alone(name: str, other: str) -> None:
    assert matches(name, literal(name))
    assert matches(other, literal(name)) == (other == name)
