"""LLMTailor's plans become native recipes, or are refused in one sentence that says where and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.catalog import Catalog
from tailor_dcp.merging.index import Index, index_of_catalog
from tailor_dcp.merging.resolve import resolve, sources_of
from tailor_dcp.recipes.documents import Document, parse
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.llmtailor import is_plan, translate
from tailor_dcp.recipes.native import Recipe, Take
from tailor_dcp.tensors import Zeros
from tests.support.hf_models import made

LAYERS = 6
NORM, HEAD, EMBED = "model.norm", "lm_head", "model.embed_tokens"


def index(name: str, tied: bool = False, leave_out: tuple[str, ...] = (), more: tuple[str, ...] = ()) -> Index:
    """Return what a small checkpoint holds."""
    inner = ("self_attn.q_proj.weight", "input_layernorm.weight")
    names = [f"{EMBED}.weight", *(f"model.layers.{n}.{fqn}" for n in range(LAYERS) for fqn in inner)]
    names += [f"{NORM}.weight", f"{HEAD}.weight", *more]
    weights = {fqn: Zeros(torch.Size([2]), torch.float32) for fqn in names if not fqn.startswith(leave_out or ("-",))}
    if tied and f"{HEAD}.weight" in weights:
        weights[f"{HEAD}.weight"] = weights[f"{EMBED}.weight"]
    state = {fqn: {"exp_avg": Zeros(torch.Size([2]), torch.float32)} for fqn in weights if "rotary" not in fqn}
    return index_of_catalog(name, Catalog("x", "zero", weights, state, ({"params": [*state]},)))  # type: ignore[arg-type]


def tied_index(name: str) -> Index:
    """Return what a checkpoint of a tied model holds."""
    return index(name, tied=True)


def plan(tied: bool = False, **models: str) -> dict[str, Any]:
    """Return a plan by parity of two checkpoints; ``models`` has others for the norm, head and embeddings."""
    a, b = "out/checkpoint-100", "out/checkpoint-200"
    norm, head, embed = (models.get(name, a) for name in ("norm", "head", "embed"))
    slices = [(norm, 0, 0), *((b if n % 2 else a, n, n + 1) for n in range(LAYERS)), (head, LAYERS + 1, LAYERS + 1)]
    slices += [] if tied else [(embed, LAYERS + 2, LAYERS + 2)]
    post = [] if tied else [{"name": "lm_head.weight", "model": head}]
    return {
        "slices": [{"sources": [{"model": m, "layer_range": [i, j]}]} for m, i, j in slices],
        "post_weights": [*post, {"name": "model.norm.weight", "model": norm}],
        "pre_weights": [{"name": "model.embed_tokens.weight", "model": head if tied else embed}],
        "merge_method": "passthrough",
        "dtype": "bfloat16",
    }


def told(data: Any, sources: Callable[[str], Index] = index) -> Recipe:
    """Translate a plan as it would be in a file."""
    return translate(parse(yaml.safe_dump(data, sort_keys=False), "plan.yml"), sources)


def refused(data: Any, sources: Callable[[str], Index] = index) -> str:
    """Return the sentence by which a plan is refused."""
    with pytest.raises(RecipeError) as caught:
        told(data, sources)
    text = str(caught.value)
    assert text.startswith("plan.yml") and "\n" not in text and text.endswith((".", "?"))
    return text


def source_of(recipe: Recipe, layer: str) -> str:
    """Return where a layer of the result comes from, as the recipe is understood."""
    indexes = {name: index(name) for name in sources_of(recipe)}
    found = {slot.source for slot in resolve(recipe, indexes).slots.values() if slot.unit.layer == layer}
    assert len(found) == 1
    return found.pop()


# What plans mean --------------------------------------------------------------------------------------------


def test_a_plan_by_parity() -> None:
    """The newest checkpoint is the base; what comes from the other one is taken."""
    recipe = told(plan(head="out/checkpoint-200"))
    assert recipe.base == "out/checkpoint-200" and recipe.train is None and recipe.optimizer == "keep"
    layers = ["model.layers.0", "model.layers.2", "model.layers.4", NORM, EMBED]
    assert recipe.takes == tuple(Take(layer, "out/checkpoint-100") for layer in layers)
    assert recipe.name == "plan.yml" and "merge_method: passthrough" in recipe.text


def test_the_newest_is_the_one_of_the_highest_number() -> None:
    """Not the one that is named last, nor the highest by letters."""
    data = plan(head="out/checkpoint-1000", embed="other/checkpoint-99")
    assert told(data).base == "out/checkpoint-1000"


def test_a_base_model() -> None:
    """Is the base, and the training's progress still comes from the newest checkpoint."""
    recipe = told({**plan(), "base_model": "out/checkpoint-100/"})
    assert (recipe.base, recipe.train) == ("out/checkpoint-100", "out/checkpoint-200")
    assert [take.layers for take in recipe.takes] == [f"model.layers.{n}" for n in (1, 3, 5)]
    other = told({**plan(), "base_model": "hf/start", "tokenizer_source": "base"})
    assert (other.base, other.train, len(other.takes)) == ("hf/start", "out/checkpoint-200", LAYERS + 3)


def test_tied_embeddings() -> None:
    """Have one number, L+1, and both of their names are taken."""
    recipe = told(plan(tied=True, norm="out/checkpoint-200"), tied_index)
    taken = {take.layers for take in recipe.takes}
    assert {EMBED, HEAD} <= taken and NORM not in taken
    both = plan(tied=True)
    both["post_weights"].append({"name": "lm_head.weight", "model": "out/checkpoint-100"})
    assert {EMBED, HEAD} <= {take.layers for take in told(both, tied_index).takes}


def test_partial_checkpoints() -> None:
    """None needs to hold all of the model; the base is the newest that does."""

    def sources(name: str) -> Index:
        return index(name, leave_out=("model.layers.0", "model.layers.2", "lm_head")) if "200" in name else index(name)

    recipe = told(plan(), sources)
    assert (recipe.base, recipe.train) == ("out/checkpoint-100", "out/checkpoint-200")
    assert [take.layers for take in recipe.takes] == [f"model.layers.{n}" for n in (1, 3, 5)]


def test_layers_without_a_number() -> None:
    """Are named among the weights if they are trained; buffers may be left to the base."""

    def sources(name: str) -> Index:
        return index(name, more=("model.wpe.weight", "model.rotary.inv_freq"))

    assert "says nothing of model.wpe; name model.wpe.weight in pre_weights" in refused(plan(), sources)
    data = plan()
    data["pre_weights"].append({"name": "model.wpe.weight", "model": "out/checkpoint-100"})
    assert Take("model.wpe", "out/checkpoint-100") in told(data, sources).takes


@pytest.mark.parametrize(
    ("family", "norm", "head", "embed"),
    [
        ("llama", "model.norm", "lm_head", "model.embed_tokens"),
        ("qwen2-tied", "model.norm", "lm_head", "model.embed_tokens"),
        ("gpt2-tied", "transformer.ln_f", "lm_head", "transformer.wte"),
        ("gpt-neox", "gpt_neox.final_layer_norm", "lm_head", "gpt_neox.embed_in"),
        ("mixtral", "model.norm", "lm_head", "model.embed_tokens"),
    ],
)
def test_the_names_of_real_models(family: str, norm: str, head: str, embed: str) -> None:
    """Norm, head and embeddings are found whatever they are called."""
    seen: dict[int, Any] = {}
    state = made(family).state_dict()
    weights = {name: seen.setdefault(t.data_ptr(), Zeros(t.shape, t.dtype)) for name, t in state.items()}
    found = index_of_catalog("x", Catalog("x", "hf", weights))  # type: ignore[arg-type]
    data = plan(family.endswith("-tied"), norm="b/checkpoint-2", embed="b/checkpoint-3")
    text = yaml.safe_dump({**data, "slices": [s for s in data["slices"] if not _is_layer(s)]})
    for old, new in ((NORM, norm), (HEAD, head), (EMBED, embed)):
        text = text.replace(f"{old}.weight", f"{new}.weight")
    data = yaml.safe_load(text.replace(f"- {LAYERS + 1}", "- 3").replace(f"- {LAYERS + 2}", "- 4"))
    data["slices"].insert(1, {"sources": [{"model": "out/checkpoint-100", "layer_range": [0, 2]}]})
    recipe = translate(Document("plan.yml", {**data, "base_model": "other"}), lambda _: found)
    sources = {take.layers: take.source for take in recipe.takes}
    assert sources[norm] == "b/checkpoint-2" and sources[head] == "out/checkpoint-100"
    assert sources[embed] == ("out/checkpoint-100" if family.endswith("-tied") else "b/checkpoint-3")


def _is_layer(held: Mapping[str, Any]) -> bool:
    start, stop = held["sources"][0]["layer_range"]
    return bool(start != stop)


@given(st.lists(st.sampled_from([100, 200, 300]), min_size=LAYERS + 3, max_size=LAYERS + 3))
def test_every_unit_comes_from_where_the_plan_says(steps: list[int]) -> None:
    """Whatever is chosen for each, and however slices are joined."""
    model = [f"run/checkpoint-{step}" for step in steps]
    spans: list[tuple[str, int, int]] = []
    for n in range(LAYERS):
        if spans and spans[-1][0] == model[n]:
            spans[-1] = (model[n], spans[-1][1], n + 1)
        else:
            spans.append((model[n], n, n + 1))
    norm, head, embed = model[LAYERS:]
    data = {**plan(norm=norm, head=head, embed=embed), "slices": []}
    for m, i, j in [(norm, 0, 0), *spans, (head, LAYERS + 1, LAYERS + 1), (embed, LAYERS + 2, LAYERS + 2)]:
        data["slices"].append({"sources": [{"model": m, "layer_range": [i, j]}]})
    recipe = translate(Document("plan", data), index)
    expected = {f"model.layers.{n}": model[n] for n in range(LAYERS)} | {NORM: norm, HEAD: head, EMBED: embed}
    assert {layer: source_of(recipe, layer) for layer in expected} == expected
    assert recipe.base == f"run/checkpoint-{max(steps)}"


# What is refused ------------------------------------------------------------------------------------------


def test_halves_that_disagree() -> None:
    """Both lines are named, with both checkpoints."""
    data = plan()
    data["post_weights"][0]["model"] = "out/checkpoint-200"
    text = parse(yaml.safe_dump(data, sort_keys=False), "plan.yml")
    lines = text.line(("post_weights", 0)), text.line(("slices", LAYERS + 1, "sources", 0))
    said = refused(data)
    assert said.startswith(f"plan.yml, line {lines[0]}: post_weights takes lm_head.weight from out/checkpoint-200")
    assert f"out/checkpoint-100 by [{LAYERS + 1}, {LAYERS + 1}] (line {lines[1]})" in said


@pytest.mark.parametrize(("number", "what"), [(0, NORM), (LAYERS + 1, HEAD), (LAYERS + 2, EMBED)])
def test_a_half_that_is_missing(number: int, what: str) -> None:
    """Is named, whichever it is; and so are both."""
    data, other = plan(), plan()
    data["slices"] = [s for s in data["slices"] if s["sources"][0]["layer_range"] != [number, number]]
    assert f"moves the weights of {what} and nothing its optimizer state" in refused(data)
    for key in ("pre_weights", "post_weights"):
        other[key] = [w for w in other[key] if not w["name"].startswith(what)] or None
    assert f"moves the optimizer state of {what} and nothing its weights" in refused(other)
    neither = {**other, "slices": data["slices"]}
    assert f"says nothing of {what}" in refused(neither)


def _slices(*spans: tuple[int, int]) -> dict[str, Any]:
    """Return a plan with other slices of layers."""
    data = plan()
    kept = [s for s in data["slices"] if not _is_layer(s)]
    given = [{"sources": [{"model": "out/checkpoint-100", "layer_range": [*span]}]} for span in spans]
    return {**data, "slices": [kept[0], *given, *kept[1:]]}


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([(0, 2), (3, 6)], "[3, 6] follows [0, 2] (line 8), so that model.layers.2 comes from nowhere"),
        ([(0, 4), (3, 6)], "[3, 6] follows [0, 4] (line 8), so that model.layers.3 would come twice"),
        ([(3, 6), (0, 3)], "[3, 6] is the first one, so that model.layers.0 comes from nowhere"),
        ([(0, 5)], "has slices of 5 layers, and model.layers has 6: model.layers.5 comes from nowhere"),
        ([(0, 7)], "[0, 7] goes beyond the 6 layers of model.layers"),
        ([(0, 6), (0, 6)], "model.layers.0 would come twice"),
        ([], "has slices of 0 layers"),
        ([(0, 6), (6, 6)], "layer_range [6, 6] means nothing: with 6 layers [0, 0] is model.norm, [7, 7] is lm_head"),
        ([(0, 6), (9, 9)], "layer_range [9, 9] means nothing"),
        ([(0, 6), (7, 7)], "layer_range [7, 7] (line 13) is there twice"),
        ([(4, 2)], "layer_range [4, 2] is no range"),
        ([(-1, 6)], "layer_range [-1, 6] is no range"),
    ],
)
def test_layers_that_are_not_there_once(spans: list[tuple[int, int]], words: str) -> None:
    """Gaps, overlaps, a wrong order, numbers beyond the end."""
    assert words in refused(_slices(*spans))


def test_the_last_number_in_a_tied_model() -> None:
    """Means nothing, as the embeddings are one unit; and their two names cannot come from two checkpoints."""
    data = plan(tied=True)
    data["slices"].append({"sources": [{"model": "out/checkpoint-100", "layer_range": [LAYERS + 2] * 2}]})
    assert "[7, 7] is model.embed_tokens with lm_head" in refused(data, tied_index)
    data = plan(tied=True)
    data["post_weights"].append({"name": "lm_head.weight", "model": "out/checkpoint-200"})
    assert "they are one tensor; name one checkpoint for both" in refused(data, tied_index)


def _changed(**changes: Any) -> dict[str, Any]:
    return {**plan(), **changes}


def _with(place: list[Any], value: Any) -> dict[str, Any]:
    data = plan()
    at: Any = data
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    return data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({**plan(), "llmtailor": {"copy_optimizer": True}}, "'llmtailor' does nothing: LLMTailor's README names"),
        ({**plan(), "llmtailor.num_gpu": 8}, "'llmtailor.num_gpu' does nothing"),
        (_with(["slices", 0, "llmtailor.optimizer"], True), "line 7: 'llmtailor.optimizer' does nothing"),
        (_with(["slices", 0, "sources", 0, "llmtailor.x"], 1), "'llmtailor.x' does nothing"),
        (_changed(postweights=[]), "the key 'postweights' is unknown; did you mean 'post_weights'?"),
        (_with(["slices", 0, "sources", 0, "layers"], [0, 1]), "the key 'layers' is unknown"),
        (_with(["post_weights", 0, "nam"], "x"), "the key 'nam' is unknown; did you mean 'name'?"),
        (_changed(models=[]), "the key 'models' is mergekit's"),
        (_with(["slices", 0, "sources", 0, "parameters"], {"scale": 2}), "the key 'parameters' is mergekit's"),
        (_changed(merge_method="slerp"), "can only be passthrough, not slerp"),
        (_changed(dtype="fp8"), "dtype 'fp8' is unknown; use bfloat16, float16 or float32"),
        (_changed(tokenizer_source="union"), "tokenizer_source 'union' is not taken"),
        (_changed(slices=[]), "'slices' is a list of at least one entry"),
        (_changed(slices=None), "there is no 'slices' here"),
        (_with(["slices", 0], "x"), "there should be sources, not 'x'"),
        (_with(["slices", 0, "sources"], plan()["slices"][0]["sources"] * 2), "has one source in a passthrough plan"),
        (_with(["slices", 0, "sources", 0, "model"], 3), "a checkpoint is named by its path, not by 3"),
        (_with(["slices", 0, "sources", 0, "layer_range"], [0, True]), "is no range"),
        (_with(["slices", 0, "sources", 0, "layer_range"], "0-3"), "is no range"),
        (
            _with(["post_weights", 0, "name"], "lm_head.wieght"),
            "has a weight lm_head.wieght; did you mean lm_head.weig",
        ),
        (_with(["post_weights", 0, "name"], "model.layers.1.input_layernorm.weight"), "belongs to model.layers.1"),
        (_with(["post_weights", 1, "name"], "lm_head.weight"), "lm_head.weight is named twice, before (line"),
        (_with(["post_weights"], {"name": "x"}), "'post_weights' is a list"),
        ([], "there should be slices"),
    ],
)
def test_what_a_plan_may_not_say(data: Any, words: str) -> None:
    """Each in its own words, with the line."""
    assert words in refused(data)


def test_no_checkpoint_tells_its_step() -> None:
    """Then nothing says where the training's progress comes from."""
    text = yaml.safe_dump(plan()).replace("checkpoint-", "ckpt_")
    with pytest.raises(RecipeError, match="none of its checkpoints tells its step"):
        translate(parse(text, "plan.yml"), index)


# Which plans are LLMTailor's --------------------------------------------------------------------------------


def _mergekit(*spans: tuple[str, int, int], **more: Any) -> Mapping[str, Any]:
    slices = [{"sources": [{"model": m, "layer_range": [i, j]}]} for m, i, j in spans]
    return {"slices": slices, "merge_method": "passthrough", **more}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (plan(), True),
        ({**plan(), "slices": []}, True),
        ({"llmtailor.x": 1}, True),
        (_mergekit(("a/checkpoint-1", 0, 0), ("b/checkpoint-2", 0, 4)), True),
        (_mergekit(("a/checkpoint-1", 0, 3), ("b/checkpoint-2", 2, 4)), False),
        (_mergekit(("a", 0, 0), ("b/checkpoint-2", 0, 4)), False),
        (_mergekit(("a/checkpoint-1", 0, 0), ("b/checkpoint-2", 0, 4), merge_method="slerp"), False),
        ({"models": [{"model": "a/checkpoint-1"}], "merge_method": "linear"}, False),
        ({"base": "run/step-1"}, False),
        ({"slices": [None, {"sources": 3}], "merge_method": "passthrough"}, False),
        (None, False),
        ("x", False),
    ],
)
def test_recognising_plans(data: Any, expected: bool) -> None:
    """By keys that mergekit does not have, or by paths and slices of no length together."""
    assert is_plan(data) is expected
