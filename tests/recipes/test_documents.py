"""Documents: YAML that remembers its lines, refuses what is no recipe, and runs nothing."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.recipes.documents import Document, load, parse
from tailor_dcp.recipes.errors import RecipeError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text("ab: -#'\"\n", max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


def places(value: Any, place: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Return the place of every value within a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, one in inner for found in places(one, (*place, key)))]


@given(value=VALUES.filter(lambda value: value is not None), flow=st.booleans())
def test_it_is_what_yaml_says_and_every_value_has_a_line(value: Any, flow: bool) -> None:
    """Data as SafeLoader has it; no value without a line, none beyond the end, none before what it is in."""
    text = yaml.safe_dump(value, default_flow_style=flow, sort_keys=False)
    document = parse(text, "r.yaml")
    assert document.data == value
    for place in places(value):
        line = document.line(place)
        assert line is not None
        assert 1 <= line <= max(1, text.count("\n"))
        assert line >= (document.line(place[:-1]) or 0)


def test_a_value_is_found_by_its_line() -> None:
    text = textwrap.dedent(
        """\
        # a comment
        base: a

        layers:
          "model.layers.0": b
          model.layers.1:
            from: c
            kinds: [weight,
              exp_avg]
        drop:
          - x
          - y
        """
    )
    document = parse(text, "r.yaml")
    assert document.line(("base",)) == 2
    assert document.line(("layers", "model.layers.0")) == 5
    assert document.line(("layers", "model.layers.1", "from")) == 7
    assert document.line(("layers", "model.layers.1", "kinds", 1)) == 9
    assert document.line(("drop", 1)) == 12
    assert document.line(("drop", 7, "nothing")) == 10, "what is not there is where it should be"
    assert document.where(("drop", 0)) == "r.yaml, line 11"
    assert Document("given", {"a": 1}).where(("a",)) == "given"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: a\nlayers: [\n", "r.yaml, line 3: this is no YAML"),
        ("a: 1\n\tb: 2\n", "r.yaml, line 2: this is no YAML"),
        ("base: a\nbase: b\n", "r.yaml, line 2: 'base' is there twice; leave one."),
        ("a:\n  x: 1\n  y: 2\n  x: 3\n", "r.yaml, line 4: 'x' is there twice; leave one."),
        ("", "r.yaml is empty"),
        ("# nothing\n", "r.yaml is empty"),
        ("--- a\n--- b\n", "r.yaml, line 2: this is no YAML"),
        ("a: !!python/object/apply:os.system ['touch /tmp/never']\n", "r.yaml, line 1: this is no YAML"),
        ("a: 2024-13-77\n", "r.yaml is no YAML that can be read"),
        ("a: &a [*a]\n", "r.yaml"),
        ("a: \x00\n", "r.yaml is no YAML that can be read"),
        ("? [1, 2]\n: 3\n", "r.yaml"),
    ],
)
def test_what_is_no_yaml_is_refused_with_its_line(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse(text, "r.yaml")
    assert str(refused.value).startswith(said)
    assert str(refused.value).count("\n") == 0
    assert str(refused.value).endswith(".")


def test_a_small_file_that_stands_for_a_large_one_is_refused() -> None:
    """Nine levels of nine aliases each are a billion values."""
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    with pytest.raises(RecipeError, match="more than 100000 values"):
        parse("\n".join(levels), "bomb.yaml")


def test_a_file_of_more_values_than_a_recipe_has_is_refused_before_all_are_made() -> None:
    """What comes after them is not even looked at: it is no YAML."""
    with pytest.raises(RecipeError, match="more than 100000 values"):
        parse("[" + "x," * 100_000 + "}", "long.yaml")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, content, said in (
        (tmp_path / "none.yaml", None, "cannot be read: No such file or directory"),
        (tmp_path, None, "cannot be read: Is a directory"),
        (tmp_path / "pipe.yaml", None, "is no regular file"),
        (tmp_path / "weights.bin", b"\xff\xfe\x00", "is not UTF-8 text"),
        (tmp_path / "large.yaml", b"a: " + b"x" * (5 << 20), "is larger than 4 MiB"),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(RecipeError) as refused:
            load(path)
        assert str(refused.value).startswith(f"{path} {said}")
