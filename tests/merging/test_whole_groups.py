"""Param groups where the training's progress comes from a checkpoint of some layers only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tailor_dcp.catalog import Catalog
from tailor_dcp.merging.whole_groups import whole_groups


def catalog(*groups: dict[str, Any], **train: Any) -> Catalog:
    """Return a checkpoint with param groups."""
    return Catalog(Path("x"), "zero", groups=groups, train=train)


def group(names: str, lr: float, decay: float = 0.0) -> dict[str, Any]:
    """Return a param group."""
    return {"params": names.split(), "lr": lr, "weight_decay": decay}


BASE = catalog(group("norm", 0.3), group("a b", 0.3, 0.1), group("c", 0.3, 0.2), scheduler={"_last_lr": [0.3] * 3})


def test_all_groups_are_there() -> None:
    """Then they are the training's own, in its own order."""
    train = catalog(group("c", 0.1), group("a b", 0.1), group("norm", 0.1), group("more", 0.1))
    assert whole_groups(train, BASE) == train.groups


def test_groups_are_missing() -> None:
    """They come from the base, in its order, with the rates that the training's scheduler set."""
    train = catalog(group("c", 0.03, 0.5), scheduler={"_last_lr": [0.01, 0.02, 0.03], "last_epoch": 9})
    expected = (group("norm", 0.01), group("a b", 0.02, 0.1), group("c", 0.03, 0.5))
    assert whole_groups(train, BASE) == expected


def test_nothing_tells_the_rates() -> None:
    """No scheduler, or one of other groups: the base's are kept."""
    expected = (group("norm", 0.3), group("a b", 0.3, 0.1), group("c", 0.03))
    for train in ({}, {"scheduler": {}}, {"scheduler": {"_last_lr": [0.01]}}, {"scheduler": {"_last_lr": "abc"}}):
        assert whole_groups(catalog(group("c", 0.03), **train), BASE) == expected


def test_a_group_in_part() -> None:
    """Is made whole, and what only the training has comes last."""
    found = whole_groups(catalog(group("b more", 0.1)), BASE)
    assert found == (group("norm", 0.3), group("a b", 0.1), group("c", 0.3, 0.2), group("more", 0.1))


def test_nothing_is_changed() -> None:
    """The catalogs' own groups stay as they were."""
    train = catalog(group("c", 0.03))
    for held in whole_groups(train, BASE):
        held["params"].append("x")
    assert BASE.groups[0]["params"] == ["norm"] and train.groups[0]["params"] == ["c"]
