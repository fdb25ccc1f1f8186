"""Placing: which layers a result has and what fills them, and what cannot be a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tailor_dcp.layers import LayerMap
from tailor_dcp.merging.index import Held, Index
from tailor_dcp.merging.placing import Placing, placed
from tailor_dcp.metadata.compose import Shape
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.native import Recipe, Take


def index(name: str, *layers: str) -> Index:
    """Return the index of a source that has a weight in each of these layers."""
    shape = Shape(torch.Size([2]), torch.float32)
    fqns = [f"{layer}.w" for layer in layers]
    assert [LayerMap().layer(fqn) for fqn in fqns] == list(layers)
    return Index(name, {f: Held(f, f, "weight", layer, shape, 1) for f, layer in zip(fqns, layers, strict=True)})


def stack(count: int, *others: str, name: str = "layers") -> tuple[str, ...]:
    """Return the names of an embedding, some layers, other layers and a head."""
    return ("embed", *(f"{name}.{n}" for n in range(count)), *others, "head")


def place(base: tuple[str, ...] = stack(3), other: tuple[str, ...] = (), **recipe: Any) -> Placing:
    sources = {"base": index("base", *base), "other": index("other", *(other or base))}
    takes = tuple(Take(layers, "other") for layers in recipe.pop("take", ()))
    return placed(Recipe("base", takes, **recipe), sources["base"], sources)


def test_without_a_word_everything_is_the_bases() -> None:
    assert place() == Placing({name: name for name in stack(3)})


def test_rename_fills_and_what_is_not_filled_stays() -> None:
    found = place(rename={"layers.2": ("layers.0",)})
    assert dict(found.fills) == {"embed": "embed", "layers.0": "layers.2", "layers.1": "layers.1",
                                 "layers.2": "layers.2", "head": "head"}  # fmt: skip
    assert not found.resized


def test_a_layer_may_be_there_several_times_and_the_stack_grows_in_its_place() -> None:
    found = place(rename={"layers.2": ("layers.2", "layers.3"), "layers.0": ("layers.1",)})
    assert list(found.fills.items()) == [
        ("embed", "embed"), ("layers.0", "layers.0"), ("layers.1", "layers.0"), ("layers.2", "layers.2"),
        ("layers.3", "layers.2"), ("head", "head"),
    ]  # fmt: skip
    assert found.resized == {"layers"}


def test_layers_can_be_swapped() -> None:
    fills = place(rename={"layers.0": ("layers.1",), "layers.1": ("layers.0",)}).fills
    assert (fills["layers.0"], fills["layers.1"]) == ("layers.1", "layers.0")


def test_a_prefix_renames_all_layers_below_it() -> None:
    fills = place(("h.0", "h.1", "hx.0"), rename={"h": ("model.layers",)}, drop=("h.*",)).fills
    assert dict(fills) == {"model.layers.0": "h.0", "model.layers.1": "h.1", "hx.0": "hx.0"}


def test_layers_that_only_another_source_has_are_added_where_they_are_taken() -> None:
    found = place(stack(2), stack(4), take=("layers.[23]",))
    assert list(found.fills) == list(stack(4))
    assert found.resized == {"layers"}
    assert "layers.3" not in place(stack(2), stack(4), take=("layers.[01]",)).fills
    assert list(place(stack(2), stack(4), take=("layers.*",)).fills) == list(stack(2))


def test_the_last_layers_can_be_dropped() -> None:
    found = place(drop=("layers.2", "head"))
    assert list(found.fills) == ["embed", "layers.0", "layers.1"]
    assert found.resized == {"layers"}
    assert "layers.0" not in place(drop=("layers.*",)).fills


def test_a_stack_that_never_counted_from_0_may_stay_so() -> None:
    """As the rest of a sequence whose other members have no parameters, or one stage of a pipeline."""
    assert list(place(("net.0", "net.2", "net.5"), drop=("net.2",)).fills) == ["net.0", "net.5"]


def test_ten_comes_after_nine() -> None:
    fills = place(stack(3), stack(12), take=("layers.{3,4,5,6,7,8,9,10,11}",)).fills
    assert list(fills) == list(stack(12))


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"take": ("layers.7",)}, "takes layers.7 from other, but the result has no such layer; did you mean layers."),
        ({"take": ("layers.{1,7}",)}, "takes layers.7 from other"),
        ({"take": ("layer.*",)}, "takes layer.* from other"),
        ({"take": ("layers.2",), "drop": ("layers.2",)}, "takes layers.2 from other, but the result has no"),
        ({"drop": ("layers.9",)}, "drops layers.9, which is no layer; did you mean layers."),
        ({"drop": ("layers.0",)}, "leaves no layers.0 before layers.2"),
        ({"drop": ("layers.1",)}, "leaves no layers.1 before layers.2"),
        ({"rename": {"layers.1": ("layers.4",)}}, "leaves no layers.3 before layers.4"),
        ({"rename": {"layer.1": ("layers.0",)}}, "renames layer.1, which is no layer; did you mean layers.1"),
        ({"rename": {"layers.1.w": ("layers.0.w",)}}, "which is a part of the layer layers.1: name whole layers"),
        (
            {"rename": {"layers.1": ("layers.0",), "layers.2": ("layers.0",)}},
            "fills layers.0 with layers.1 and with layers.2; give each layer one.",
        ),
        ({"rename": {"layers.1": ("layers.2.inner",)}}, "would fill layers.2.inner"),
        ({"rename": {"layers.1": ("",)}}, "would fill"),
        ({"rename": {"layers.1": ("layers.03",)}}, "would fill layers.03"),
        ({"drop": ("*",)}, "drops all layers"),
    ],
)
def test_what_can_be_no_model_is_refused(recipe: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        place(**recipe)
    assert f"{refused.value}".startswith("the recipe ")
    assert said in str(refused.value)
    assert str(refused.value).endswith((".", "?"))
