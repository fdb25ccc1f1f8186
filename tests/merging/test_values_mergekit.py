"""Plans merged by us and by mergekit itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tailor_dcp.converters.convert import convert
from tests.support.hf_models import equal, loaded
from tests.support.mergekit_oracle import FAMILIES, LAYERS, assert_alike, mergekit, save_family
from tests.support.value_merges import merged

pytest.importorskip("mergekit")

pytestmark = pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Three models of each family."""
    return {family: save_family(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def part(model: str, first: int, stop: int, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "layer_range": [first, stop], **({"parameters": parameters} if parameters else {})}


def franken(a: str, b: str, c: str) -> dict[str, Any]:
    parts = [part(a, 0, 3), part(b, 1, LAYERS), part(b, 1, 2), part(c, LAYERS - 1, LAYERS)]
    return {"merge_method": "passthrough", "slices": [{"sources": [one]} for one in parts]}


def ends(a: str, b: str, c: str) -> dict[str, Any]:
    """Embeddings of one model, layers of another, norm and head of a third."""
    parts = [part(b, 0, 0), part(a, 0, LAYERS), part(c, LAYERS, LAYERS)]
    return {"merge_method": "passthrough", "slices": [{"sources": [one]} for one in parts]}


def scaled(a: str, b: str, c: str) -> dict[str, Any]:
    scale = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": [0.5, 2]}, {"value": 1.0}]
    return {
        "merge_method": "passthrough",
        "slices": [{"sources": [part(a, 0, 3)]}, {"sources": [part(a, 2, LAYERS, scale=scale)]}],
    }


def linear(a: str, b: str, c: str) -> dict[str, Any]:
    weights = [
        0.5,
        [0.1, 0.9, 0.3],
        [{"filter": "mlp", "value": 0.7}, {"filter": "norm", "value": [1, 2]}, {"value": 2}],
    ]
    return {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": w}} for m, w in zip((a, b, c), weights, strict=True)],
    }


def slerp(a: str, b: str, c: str) -> dict[str, Any]:
    t = [
        {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
        {"filter": "mlp", "value": [1, 0.5, 0]},
        {"value": 0.4},
    ]
    return {
        "merge_method": "slerp",
        "base_model": a,
        "slices": [{"sources": [part(a, 0, 1), part(b, 0, 1)]}, {"sources": [part(a, 1, LAYERS), part(b, 1, LAYERS)]}],
        "parameters": {"t": t},
    }


def others(method: str, own: Mapping[str, Any], common: Mapping[str, Any] | None = None, **more: Any) -> Any:
    """Return a plan that merges b and c into a."""

    def plan(a: str, b: str, c: str) -> dict[str, Any]:
        models = [{"model": m, **({"parameters": dict(own)} if own else {})} for m in (b, c)]
        top = {"parameters": dict(common)} if common else {}
        return {"merge_method": method, "base_model": a, "models": models, **top, **more}

    return plan


def pair(method: str, common: Mapping[str, Any] | None = None) -> Any:
    """Return a plan that merges b into a."""

    def plan(a: str, b: str, c: str) -> dict[str, Any]:
        top = {"parameters": dict(common)} if common else {}
        return {"merge_method": method, "base_model": a, "models": [{"model": a}, {"model": b}], **top}

    return plan


EXACT = {"frankenmerge": franken, "ends moved": ends}
CLOSE = {
    "scaled": scaled,
    "linear": linear,
    "slerp": slerp,
    "nuslerp": others("nuslerp", {"weight": 0.4}),
    "multislerp": others("multislerp", {"weight": [0.4, 0.8]}),
    "karcher": lambda a, b, c: {"merge_method": "karcher", "models": [{"model": m} for m in (a, b, c)]},
    "task_arithmetic": others("task_arithmetic", {"weight": [0.3, 0.9]}, {"lambda": 0.8}),
    "ties": others("ties", {"weight": 0.6, "density": [{"filter": "mlp", "value": 0.5}, {"value": [0.3, 0.8]}]}),
    "breadcrumbs": others("breadcrumbs", {"weight": 0.5, "density": 0.8, "gamma": 0.05}),
    "breadcrumbs_ties": others("breadcrumbs_ties", {"weight": 0.5, "density": 0.8, "gamma": 0.05}),
    "model_stock": others("model_stock", {}),
    "sce": others("sce", {}, {"select_topk": 0.6}),
    "nearswap": pair("nearswap", {"t": 0.01}),
    "arcee_fusion": pair("arcee_fusion"),
}
CASTS: dict[str, tuple[torch.dtype, Any]] = {
    "inputs": (torch.bfloat16, lambda a, b, c: {**slerp(a, b, c), "dtype": "bfloat16"}),
    "both": (torch.float16, lambda a, b, c: {**linear(a, b, c), "dtype": "float16", "out_dtype": "float32"}),
    "outputs": (torch.bfloat16, lambda a, b, c: {**slerp(a, b, c), "out_dtype": "bfloat16"}),
    "a frankenmerge": (torch.bfloat16, lambda a, b, c: {**franken(a, b, c), "dtype": "bfloat16"}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", EXACT)
def test_passthrough_gives_the_same_bytes(zoo: dict[str, list[str]], tmp_path: Path, family: str, name: str) -> None:
    """Whole layers are moved as they are, and the model that comes of it generates."""
    plan = EXACT[name](*zoo[family])
    merged(plan, tmp_path / "ours")
    assert_alike(tmp_path / "ours", mergekit(plan, tmp_path / "theirs"), exact=True)
    model, _ = loaded(tmp_path / "ours")
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False).shape == (1, 4)


EVERYWHERE = ("scaled", "linear", "slerp", "task_arithmetic", "ties")
"""Those that are tried with all families; the others take the families in turn."""
TRIED = [(name, family) for name in EVERYWHERE for family in FAMILIES]
TRIED += [(name, list(FAMILIES)[n % len(FAMILIES)]) for n, name in enumerate(CLOSE) if name not in EVERYWHERE]


@pytest.mark.parametrize(("name", "family"), TRIED)
def test_values_are_mergekits(zoo: dict[str, list[str]], tmp_path: Path, family: str, name: str) -> None:
    """Computed tensors are the same up to rounding."""
    plan = CLOSE[name](*zoo[family])
    merged(plan, tmp_path / "ours")
    assert_alike(tmp_path / "ours", mergekit(plan, tmp_path / "theirs"))


@pytest.mark.parametrize("name", CASTS)
def test_dtypes_are_cast_as_there(zoo: dict[str, list[str]], tmp_path: Path, name: str) -> None:
    """``dtype`` casts inputs and ``out_dtype`` outputs, up to one rounding step."""
    rounding, plan_of = CASTS[name]
    plan = plan_of(*zoo["llama"])
    merged(plan, tmp_path / "ours")
    assert_alike(tmp_path / "ours", mergekit(plan, tmp_path / "theirs"), rounding=rounding)
    dtype = plan.get("out_dtype") or plan["dtype"]
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize(("name", "family"), [("slerp", "mixtral"), ("ties", "qwen2"), ("frankenmerge", "gpt2")])
def test_dcp_checkpoints_give_the_same(zoo: dict[str, list[str]], tmp_path: Path, name: str, family: str) -> None:
    """Models that were converted to DCP are merged to the same bytes, into either format."""
    plan_of = {**CLOSE, **EXACT}[name]
    merged(plan_of(*zoo[family]), tmp_path / "from-hf")
    folders = [str(tmp_path / Path(folder).name) for folder in zoo[family]]
    for source, target in zip(zoo[family], folders, strict=True):
        convert(source, target, "dcp")
    plan = plan_of(*folders)
    merged(plan, tmp_path / "from-dcp")
    merged(plan, tmp_path / "dcp", to="dcp")
    convert(tmp_path / "dcp", tmp_path / "back", "hf")
    want = loaded(tmp_path / "from-hf")[1]
    assert equal(loaded(tmp_path / "from-dcp")[1], want)
    assert equal(loaded(tmp_path / "back")[1], want)


def test_tied_and_untied_models(zoo: dict[str, list[str]], tmp_path: Path) -> None:
    """A tied model's head is its embeddings; the result has a head of its own, and says so."""
    model, _ = loaded(Path(zoo["qwen2"][1]))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 0.1)
    model.save_pretrained(tmp_path / "untied")
    plan = linear(zoo["qwen2"][0], str(tmp_path / "untied"), zoo["qwen2"][2])
    merged(plan, tmp_path / "ours")
    assert_alike(tmp_path / "ours", mergekit(plan, tmp_path / "theirs"))
    made, state = loaded(tmp_path / "ours")
    assert made.config.tie_word_embeddings is False
    assert not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])


def test_files_of_several_dtypes(zoo: dict[str, list[str]], tmp_path: Path) -> None:
    """Inputs of different dtypes are computed in the wider one."""
    narrow, _ = loaded(Path(zoo["llama"][1]), torch.bfloat16)
    narrow.save_pretrained(tmp_path / "narrow")
    plan = linear(zoo["llama"][0], str(tmp_path / "narrow"), zoo["llama"][2])
    merged(plan, tmp_path / "ours")
    assert_alike(tmp_path / "ours", mergekit(plan, tmp_path / "theirs"))


@pytest.mark.parametrize("method", ["dare_ties", "della"])
def test_a_seed_fixes_what_is_drawn(zoo: dict[str, list[str]], tmp_path: Path, method: str) -> None:
    """The same seed gives the same bytes, and another one others."""
    plan = others(method, {"weight": 0.5, "density": 0.5})(*zoo["llama"])
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        merged(plan, tmp_path / name, seed=seed)
    states = {name: loaded(tmp_path / name)[1] for name in ("one", "same", "other")}
    assert equal(states["one"], states["same"])
    assert not equal(states["one"], states["other"])
    assert any("with --seed" in note for note in merged(plan, tmp_path / "drawn", seed=None))
