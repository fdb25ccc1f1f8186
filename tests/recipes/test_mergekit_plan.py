"""What each tensor of the result is made of, for any plan and any names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.catalog import Catalog
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.mergekit_plan import Merge, picks, resolve
from tailor_dcp.recipes.mergekit_schema import parse
from tailor_dcp.tensors import Readable, Zeros

BEFORE = ["model.embed_tokens.weight"]
INSIDE = [".self_attn.q_proj.weight", ".mlp.up_proj.weight", ".mlp.up_proj.bias"]
AFTER = ["model.norm.weight", "lm_head.weight"]
STACK = "model.layers"


def catalog(
    name: str, layers: int, *, tied: bool = False, dtype: torch.dtype = torch.float32, **sizes: Sequence[int]
) -> Catalog:
    """A model with names alone; ``sizes`` gives tensors other shapes, or none, by the end of their names."""
    names = [*BEFORE, *(f"{STACK}.{n}{end}" for n in range(layers) for end in INSIDE), *AFTER]

    def size(fqn: str) -> Sequence[int]:
        plain = (8,) if fqn.endswith(("norm.weight", "bias")) else (6, 8)
        return next((s for end, s in sizes.items() if fqn.removesuffix(".weight").endswith(end)), plain)

    weights: dict[str, Readable] = {fqn: Zeros(torch.Size(size(fqn)), dtype) for fqn in names if size(fqn)}
    if tied:
        weights["lm_head.weight"] = weights[BEFORE[0]]
    return Catalog(source=Path(name), format="test", weights=weights)


def resolved(plan: Mapping[str, Any], **catalogs: Catalog) -> Merge:
    return resolve(parse(plan, lambda place: "plan"), catalogs)


def sliced(method: str, *slices: Sequence[tuple[str, int, int]], **more: Any) -> dict[str, Any]:
    held = [{"sources": [{"model": m, "layer_range": [a, b]} for m, a, b in parts]} for parts in slices]
    return {"merge_method": method, "slices": held, **more}


counts = {"a": 4, "b": 6, "c": 3}
ranges = st.sampled_from(list(counts)).flatmap(
    lambda m: st.tuples(st.integers(0, counts[m]), st.integers(0, counts[m])).map(lambda r: (m, min(r), max(r)))
)


@given(st.lists(ranges, min_size=1, max_size=5).filter(lambda parts: any(b > a for _, a, b in parts)))
def test_every_tensor_of_the_result_comes_from_one_place(parts: list[tuple[str, int, int]]) -> None:
    """Layers are numbered through; what is before them is the first slice's, and what is after them the last's."""
    catalogs = {name: catalog(name, count) for name, count in counts.items()}
    plan = sliced("passthrough", *([one] for one in parts))
    merge = resolved(plan, **catalogs)
    numbers = [(model, number) for model, first, stop in parts for number in range(first, stop)]
    expected = {f"{STACK}.{n}{end}": (m, f"{STACK}.{k}{end}") for n, (m, k) in enumerate(numbers) for end in INSIDE}
    expected |= {name: (parts[0][0], name) for name in BEFORE} | {name: (parts[-1][0], name) for name in AFTER}
    assert picks(merge) == expected
    assert merge.layers == {STACK: tuple(k for _, k in numbers)}
    assert merge.ties == {}


@given(st.integers(1, 6), st.lists(st.floats(-3, 3), min_size=1, max_size=5))
def test_gradients_run_over_a_slice(count: int, values: list[float]) -> None:
    """The first layer has the first value and the last layer the last; a single layer has the last."""
    plan = sliced("linear", [("a", 0, count), ("b", 0, count)], parameters={"weight": values})
    merge = resolved(plan, a=catalog("a", count), b=catalog("b", count))
    weight = {name: made.inputs[0].parameters["weight"] for name, made in merge.tensors.items()}
    assert weight[f"{STACK}.{count - 1}{INSIDE[0]}"] == pytest.approx(values[-1])
    assert count == 1 or weight[f"{STACK}.0{INSIDE[0]}"] == pytest.approx(values[0])
    assert weight[BEFORE[0]] == weight[AFTER[0]] == pytest.approx(values[0])


@given(st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_whole_models_give_what_a_slice_of_all_layers_gives(count: int, models: int, tied: bool) -> None:
    """``models`` is short for one slice."""
    names = "abc"[:models]
    catalogs = {name: catalog(name, count, tied=tied) for name in names}
    common = {"parameters": {"weight": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]}}
    one = resolved({"merge_method": "linear", "models": [{"model": n} for n in names], **common}, **catalogs)
    other = resolved(sliced("linear", [(n, 0, count) for n in names], **common), **catalogs)
    assert one.tensors == other.tensors
    assert one.ties == other.ties == ({"lm_head.weight": BEFORE[0]} if tied else {})
    assert not one.layers and other.layers == {STACK: tuple(range(count))}


def test_ties_hold_only_where_all_models_are_tied() -> None:
    """A head of its own in one model gives the result one."""
    plan = {"merge_method": "linear", "models": [{"model": n} for n in "ab"], "parameters": {"weight": 1}}
    merge = resolved(plan, a=catalog("a", 2, tied=True), b=catalog("b", 2))
    assert merge.ties == {} and len(merge.tensors["lm_head.weight"].inputs) == 2
    franken = sliced("passthrough", [("a", 0, 2)], [("b", 1, 2)])
    tied = resolved(franken, a=catalog("a", 2, tied=True), b=catalog("b", 2, tied=True))
    assert tied.ties == {"lm_head.weight": BEFORE[0]}
    assert (picks(tied) or {})["lm_head.weight"] == ("a", "lm_head.weight")
    half = resolved(franken, a=catalog("a", 2, tied=True), b=catalog("b", 2))
    assert half.ties == {} and (picks(half) or {})["lm_head.weight"] == ("b", "lm_head.weight")


def test_picks_are_plain_selections() -> None:
    """A scale or another dtype makes them computed; the dtype that is there does not."""
    plan = sliced("passthrough", [("a", 0, 2)])
    assert picks(resolved(plan, a=catalog("a", 2)))
    assert picks(resolved({**plan, "dtype": "float32"}, a=catalog("a", 2)))
    assert picks(resolved({**plan, "out_dtype": "bfloat16"}, a=catalog("a", 2))) is None
    scale = {"parameters": {"scale": [{"filter": "mlp", "value": 1}]}}
    assert picks(resolved({**plan, **scale}, a=catalog("a", 2))) is None
    one = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}
    assert picks(resolved(one, a=catalog("a", 2))) is None


def test_the_base_is_told_apart() -> None:
    """A base model that is not listed is an input, which takes no weight of its own."""
    plan = {"merge_method": "ties", "base_model": "a", "models": [{"model": "b", "parameters": {"weight": 1}}]}
    made = resolved(plan, a=catalog("a", 1), b=catalog("b", 1)).tensors["model.norm.weight"]
    assert [taken.model for taken in made.inputs] == ["b", "a"] and made.base == 1
    assert "weight" not in made.inputs[1].parameters
    assert made.parameters["normalize"] is True


def test_dtypes_are_promoted() -> None:
    """Inputs are computed in the dtype that holds all of them, unless the plan names one."""
    plan = {"merge_method": "linear", "models": [{"model": n} for n in "ab"], "parameters": {"weight": 1}}
    catalogs = {"a": catalog("a", 1, dtype=torch.bfloat16), "b": catalog("b", 1, dtype=torch.float16)}
    made = resolved(plan, **catalogs).tensors[BEFORE[0]]
    assert (made.computed, made.dtype) == (torch.float32, torch.float32)
    made = resolved({**plan, "dtype": "float16", "out_dtype": "bfloat16"}, **catalogs).tensors[BEFORE[0]]
    assert (made.computed, made.dtype) == (torch.float16, torch.bfloat16)


def test_other_stacks_and_names() -> None:
    """No architecture is known: a stack of any name is found, and several are merged as whole models."""
    names = ["enc.block.0.w", "enc.block.1.w", "dec.block.0.w", "dec.block.1.w", "wte.weight", "classifier.0.weight"]
    several = Catalog(Path("a"), "test", {name: Zeros(torch.Size([4, 4]), torch.float32) for name in names})
    plan = {"merge_method": "linear", "models": [{"model": "a"}], "parameters": {"weight": [1, 2]}}
    merge = resolved(plan, a=several)
    assert set(merge.tensors) == set(names)
    assert merge.tensors["dec.block.1.w"].inputs[0].parameters["weight"] == 2
    with pytest.raises(RecipeError, match=r"a has several stacks of layers \(enc.block and dec.block\)"):
        resolved(sliced("passthrough", [("a", 0, 1)]), a=several)


PAIR = {"parameters": {"weight": 1}}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Catalog]]] = {
    r"a has the layers 0 to 1 and no layer 2; end the layer_range at 2": (
        sliced("passthrough", [("a", 0, 3)]), {"a": catalog("a", 2)},
    ),
    r"have as many layers each, and these are 2 of a and 1 of b": (
        sliced("linear", [("a", 0, 2), ("b", 0, 1)], **PAIR), {"a": catalog("a", 2), "b": catalog("b", 2)},
    ),
    r"no slice has layers": (sliced("passthrough", [("a", 0, 0)], [("a", 2, 2)]), {"a": catalog("a", 2)}),
    r"b has no model.layers.2.* which a has; merge models of one architecture and number of layers": (
        {"merge_method": "linear", "models": [{"model": n} for n in "ab"], **PAIR},
        {"a": catalog("a", 3), "b": catalog("b", 2)},
    ),
    r"vocabulary has 6 tokens in a and 7 in b \(model.embed_tokens.weight\)": (
        {"merge_method": "linear", "models": [{"model": n} for n in "ab"], **PAIR},
        {"a": catalog("a", 2), "b": catalog("b", 2, embed_tokens=(7, 8))},
    ),
    r"vocabulary has 6 tokens in a and 7 in b \(lm_head.weight\)": (
        sliced("passthrough", [("a", 0, 1)], [("b", 0, 1)]),
        {"a": catalog("a", 2), "b": catalog("b", 2, lm_head=(7, 8))},
    ),
    r"model.layers.0.mlp.up_proj.weight has the shape \(6, 9\) in b and \(6, 8\) in a": (
        sliced("passthrough", [("a", 0, 1)], [("b", 0, 1)]),
        {"a": catalog("a", 2), "b": catalog("b", 2, up_proj=(6, 9))},
    ),
    r"layer 0 of b is built otherwise than those of a \(mlp.up_proj.bias is in one alone\)": (
        sliced("passthrough", [("a", 0, 1)], [("b", 0, 1)]),
        {"a": catalog("a", 2), "b": catalog("b", 2, **{"up_proj.bias": ()})},
    ),
    r"b has no lm_head.weight, which a has": (
        sliced("linear", [("a", 0, 2), ("b", 0, 2)], **PAIR),
        {"a": catalog("a", 2), "b": catalog("b", 2, lm_head=())},
    ),
    r"a is merged with itself": (sliced("linear", [("a", 0, 1), ("a", 1, 2)], **PAIR), {"a": catalog("a", 2)}),
    r"'slerp' needs a base model": (
        sliced("slerp", [("a", 0, 2), ("b", 0, 2)], parameters={"t": 1}), {"a": catalog("a", 2), "b": catalog("b", 2)},
    ),
    r"the base model c is not among the sources": (
        sliced("slerp", [("a", 0, 2), ("b", 0, 2)], base_model="c", parameters={"t": 1}),
        {n: catalog(n, 2) for n in "abc"},
    ),
    r"takes exactly one|takes exactly 1 model, not 2": (
        sliced("passthrough", [("a", 0, 2), ("b", 0, 2)]), {"a": catalog("a", 2), "b": catalog("b", 2)},
    ),
    r"model.embed_tokens.weight of a has no 'weight'; give it there": (
        sliced("linear", [("a", 0, 2)]), {"a": catalog("a", 2)},
    ),
    r"The parameter 'weight' is a number, not 'much'": (
        sliced("linear", [("a", 0, 2)], parameters={"weight": "much"}), {"a": catalog("a", 2)},
    ),
    r"'linear' has no parameter 'wieght'; did you mean 'weight'": (
        sliced("linear", [("a", 0, 2)], parameters={"wieght": 1}), {"a": catalog("a", 2)},
    ),
    r"no merge method 'linaer'; did you mean 'linear'": (sliced("linaer", [("a", 0, 2)]), {"a": catalog("a", 2)}),
    r"a has no numbered layers": (
        sliced("passthrough", [("a", 0, 1)]),
        {"a": Catalog(Path("a"), "test", {"w": Zeros(torch.Size([1]), torch.float32)})},
    ),
}  # fmt: skip


@pytest.mark.parametrize("problem", REFUSED)
def test_what_is_refused(problem: str) -> None:
    """The plan is checked against its models before any tensor is read: one sentence, with the place."""
    plan, catalogs = REFUSED[problem]
    with pytest.raises(RecipeError, match=problem) as caught:
        resolved(plan, **catalogs)
    assert "\n" not in str(caught.value)


def test_what_has_no_effect_is_noted() -> None:
    """A parameter of other methods, and a buffer that one model's files still have."""
    plan = sliced("linear", [("a", 0, 2), ("b", 0, 2)], parameters={"weight": 1, "density": 0.5})
    old = catalog("b", 2)
    extra = {f"{STACK}.0.self_attn.rotary_emb.inv_freq": Zeros(torch.Size([4]), torch.float32)}
    old = Catalog(old.source, old.format, {**old.weights, **extra})
    merge = resolved(plan, a=catalog("a", 2), b=old)
    assert len(merge.notes) == 2
    assert "'linear' does not take 'density'" in merge.notes[0] and "inv_freq of b is left out" in merge.notes[1]
