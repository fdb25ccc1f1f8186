"""Parameter groups of a checkpoint and of an optimizer, matched by what is in them."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from tailor_dcp.integrations.param_groups import group_places, hyperparameters


def test_groups_in_another_order_find_their_own() -> None:
    loaded = [{"lr": 1, "params": ["b"]}, {"lr": 2, "params": ["c", "a"]}]
    assert hyperparameters(loaded, [["a", "c"], ["b"]]) == ([{"lr": 2}, {"lr": 1}], [])


def test_one_group_serves_two() -> None:
    assert hyperparameters([{"lr": 1, "params": ["a", "b"]}], [["a"], ["b"]]) == ([{"lr": 1}, {"lr": 1}], [])


def test_groups_that_disagree_are_told_of() -> None:
    loaded: list[dict[str, Any]] = [{"lr": 1, "params": ["a"]}, {"lr": 2, "params": ["b"]}]
    values, notes = hyperparameters(loaded, [["b", "a"]])
    assert values == [{"lr": 1}]
    assert "groups [0, 1], which differ in their options; those of group 0 count" in notes[0]
    loaded[1]["lr"] = 1
    assert hyperparameters(loaded, [["b", "a"]]) == ([{"lr": 1}], [])


def test_a_group_that_is_not_there_is_told_of() -> None:
    values, notes = hyperparameters([{"lr": 1, "params": ["a"]}], [["a"], ["z"]])
    assert values == [{"lr": 1}, {}]
    assert notes == ["The checkpoint has no group with z, so group 1 keeps the options it has."]


def test_what_was_not_loaded_changes_nothing() -> None:
    """A load of some layers only leaves the places as they are, without any parameter in them."""
    assert hyperparameters([{"lr": 9, "params": []}], [["a"]]) == ([{}], [])


def test_places_are_the_checkpoints() -> None:
    """Two groups there and one here; an option that this optimizer does not have, a learning rate as a tensor."""
    number = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(()), [])
    names: dict[str, Any] = {"0.lr": BytesStorageMetadata(), "0.params": BytesStorageMetadata(), "1.lr": number}
    names |= {"1.fused": BytesStorageMetadata(), "1.params": BytesStorageMetadata()}
    metadata = Metadata({f"optim.param_groups.{name}": stored for name, stored in names.items()})
    first, second = group_places([{"lr": 0.5, "betas": (0.9, 0.99), "params": ["a"]}], metadata)
    assert first == {"lr": 0.5, "params": []}
    assert second.keys() == {"lr", "params"}
    assert isinstance(second["lr"], torch.Tensor)
