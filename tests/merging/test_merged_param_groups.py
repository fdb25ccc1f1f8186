"""Lists of names follow the renames."""

from __future__ import annotations

from typing import Any

import pytest

from tailor_dcp.merging.param_groups import is_list, renamed_keys, renamed_list


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("optim.param_groups.0.params", True),
        ("param_groups.11.params", True),
        ("optim.param_groups.0.param_names", True),
        ("optimizers.a.param_groups.0.params", True),
        ("train.zero.frozen", True),
        ("train.zero.buffers", True),
        ("optim.param_groups.0.lr", False),
        ("optim.param_groups.layers.0.params", False),
        ("train.zero.stage", False),
        ("model.params", False),
    ],
)
def test_lists_of_names_are_known_by_their_keys(key: str, expected: bool) -> None:
    assert is_list(key) is expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b", "c"], ["a", "b1", "b2"]),
        (["b"], ["b1", "b2"]),
        ([], []),
        (["b1", "b"], ["b1", "b2"]),
        ([0, 1], [0, 1]),
        ("abc", "abc"),
        (None, None),
    ],
)
def test_names_are_renamed_repeated_and_dropped(names: Any, expected: Any) -> None:
    """What is no list of names stays as it is; no name is there twice."""
    assert renamed_list(names, {"b": ("b1", "b2")}, ["c"]) == expected


def test_what_is_renamed_is_not_dropped() -> None:
    assert renamed_list(["b"], {"b": ("c",)}, ["b"]) == ["c"]


def test_keys_with_names_in_them_are_renamed_repeated_and_dropped() -> None:
    keys = ["optim.param_groups.l.0.w.lr", "optim.param_groups.l.1.w.lr", "param_groups.l.2.w.betas", "train.l.0.w.lr"]
    found = renamed_keys(keys, {"l.0.w": ("l.0.w", "l.3.w")}, ["l.2.w"])
    assert {old: [key for key, _, _ in new] for old, new in found.items()} == {
        keys[0]: [keys[0], "optim.param_groups.l.3.w.lr"],
        keys[1]: [keys[1]],
        keys[2]: [],
        keys[3]: [keys[3]],
    }
