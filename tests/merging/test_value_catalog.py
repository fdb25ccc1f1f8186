"""Catalogs of merged values, on models of a few tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tailor_dcp.catalog import Catalog
from tailor_dcp.formats import formats
from tailor_dcp.merging.values import checked, value_catalog
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.tensors import Given
from tests.support.value_merges import plan_of

Tensors = Mapping[str, torch.Tensor]


def model(name: str, **more: torch.Tensor) -> Catalog:
    tensors = {f"h.{n}.w": torch.full((2, 3), float(n + len(name))) for n in range(2)}
    return Catalog(Path(name), "test", {key: Given(value) for key, value in {**tensors, **more}.items()})


def catalog(plan: Mapping[str, Any], scratch: Path, *models: Catalog) -> Catalog:
    read = plan_of(plan)
    sources = {str(held.source): held for held in models}
    return value_catalog(checked(read, sources), sources, scratch, seed=0)


def linear(*weights: float) -> dict[str, Any]:
    models = [{"model": name, "parameters": {"weight": w}} for name, w in zip(("a", "bb"), weights, strict=True)]
    return {"merge_method": "linear", "models": models}


def test_what_has_no_mean(tmp_path: Path) -> None:
    """Counters and masks are taken over where all models agree, and refused before anything is written otherwise."""
    counts = torch.arange(4)
    made = catalog(linear(1, 1), tmp_path, model("a", count=counts), model("bb", count=counts.clone()))
    assert torch.equal(made.weights["count"].whole(), counts)
    assert made.weights["h.1.w"].whole()[0, 0] == 2.5
    with pytest.raises(RecipeError, match="count is not of floating point and differs between a and bb"):
        catalog(linear(1, 1), tmp_path, model("a", count=counts), model("bb", count=counts + 1))
    with pytest.raises(RecipeError, match="count is not of floating point"):
        catalog(linear(1, 1), tmp_path, model("a", count=counts), model("bb", count=counts.double()))


def test_a_layer_that_is_there_twice(tmp_path: Path) -> None:
    """It is no tied layer: both copies can be trained apart."""
    parts = [{"sources": [{"model": "a", "layer_range": r}]} for r in ([0, 2], [1, 2])]
    made = catalog({"merge_method": "passthrough", "slices": parts}, tmp_path, model("a"))
    assert made.ties == {} and len(made.stored) == 3
    assert torch.equal(made.weights["h.2.w"].whole(), made.weights["h.1.w"].whole())


@pytest.mark.parametrize("to", ["hf", "dcp"])
def test_what_a_method_cannot_do_leaves_nothing(tmp_path: Path, to: str) -> None:
    """An error while tensors are computed reaches the caller as it is, and no result is left."""
    made = catalog(linear(1, -1), tmp_path / "files", model("a"), model("bb"))
    with pytest.raises(RecipeError, match="add up to 0"):
        formats().write(made, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_files_without_a_configuration(tmp_path: Path) -> None:
    """Models of unknown origin are merged all the same, without files beside them."""
    made = catalog(linear(1, 3), tmp_path / "files", model("a"), model("bb"))
    assert made.files == {}
    formats().write(made, tmp_path / "out", "dcp")
    back = formats().open(tmp_path / "out")
    assert back.weights["h.0.w"].whole()[0, 0] == 1.75
