"""Tied weights: whether a result has one tensor or two is the base's to say, and what is not one is not made one."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tailor_dcp import LayerwisePlanner, open_checkpoint
from tailor_dcp.companions import put_files
from tailor_dcp.formats import formats
from tailor_dcp.merge import merge
from tailor_dcp.recipes.errors import RecipeError
from tests.support.hf_models import loaded, made

pytestmark = pytest.mark.filterwarnings("ignore::tailor_dcp.TailorWarning")

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYERS = ("model.embed_tokens", "lm_head")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied and an untied Llama, each as a Hugging Face folder, as our DCP and as torch alone saves it."""
    folder = tmp_path_factory.mktemp("models")
    for number, (name, family) in enumerate((("tied", "llama-tied"), ("untied", "llama"))):
        model = made(family)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(number)
        model.save_pretrained(folder / name)
        files = formats().open(folder / name).files
        for kind, planner in (("ours", LayerwisePlanner("full", base=None)), ("stock", None)):
            place = folder / f"{name}-{kind}" / "step-7"
            dcp.save({"model": model.state_dict()}, checkpoint_id=place, planner=planner)
            put_files(files, place)
    return folder


def source(models: Path, name: str) -> str:
    return str(models / name / "step-7" if "-" in name else models / name)


def takes(models: Path, base: str, other: str) -> dict[str, Any]:
    return {"base": source(models, base), "layers": dict.fromkeys(LAYERS, source(models, other))}


def ends(state: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    return (state[name] for name in (EMBED, HEAD))


def check(folder: Path, models: Path, origin: str, *, tied: bool) -> None:
    """See that a Hugging Face folder loads as it shall, with both ends of a model."""
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is tied
    model, state = loaded(folder)
    _, wanted = loaded(models / origin)
    assert all(torch.equal(*pair) for pair in zip(ends(state), ends(wanted), strict=True))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert len(formats().open(folder).ties) == tied


@pytest.mark.parametrize("other", ["tied", "tied-ours", "tied-stock"])
@pytest.mark.parametrize("base", ["untied", "untied-ours", "untied-stock"])
def test_an_untied_base_has_two_tensors(models: Path, tmp_path: Path, base: str, other: str) -> None:
    """Also of a source that has one; so in every format, and in what is made of it later."""
    recipe = takes(models, base, other)
    merge(recipe, tmp_path / "hf", to="hf")
    check(tmp_path / "hf", models, "tied", tied=False)
    merge(recipe, tmp_path / "dcp")
    assert formats().open(tmp_path / "dcp").ties == {}
    assert torch.equal(*(open_checkpoint(tmp_path / "dcp")[f"model.{name}"] for name in (EMBED, HEAD)))
    merge({"base": str(tmp_path / "dcp")}, tmp_path / "again", to="hf")
    check(tmp_path / "again", models, "tied", tied=False)


@pytest.mark.parametrize("other", ["tied", "tied-ours", "tied-stock"])
@pytest.mark.parametrize("base", ["tied", "tied-ours"])
def test_a_tied_base_stays_tied(models: Path, tmp_path: Path, base: str, other: str) -> None:
    """Also with a source that tells of no ties, and has the same twice: torch alone saves it so."""
    recipe = takes(models, base, other)
    merge(recipe, tmp_path / "hf", to="hf")
    check(tmp_path / "hf", models, "tied", tied=True)
    merge(recipe, tmp_path / "dcp")
    assert formats().open(tmp_path / "dcp").ties == {HEAD: EMBED}


@pytest.mark.parametrize("other", ["untied", "untied-ours", "untied-stock"])
@pytest.mark.parametrize("base", ["tied", "tied-ours"])
def test_two_tensors_are_not_put_into_one(models: Path, tmp_path: Path, base: str, other: str) -> None:
    """Training would have whichever was loaded last; a Hugging Face folder can have both, and says so."""
    recipe = takes(models, base, other)
    for to in ("dcp", "zero3"):
        with pytest.raises(RecipeError, match=r"share one storage in .* but are two tensors in .*--to hf") as refused:
            merge(recipe, tmp_path / "refused", to=to)
        assert all(layer in str(refused.value) for layer in LAYERS)
    assert list(tmp_path.iterdir()) == []
    merge(recipe, tmp_path / "hf", to="hf")
    check(tmp_path / "hf", models, "untied", tied=False)


def test_names_of_one_place_are_tied_where_nothing_is_remembered(models: Path, tmp_path: Path) -> None:
    base = tmp_path / "step-7"
    shutil.copytree(source(models, "tied-stock"), base)
    metadata = pickle.loads((base / ".metadata").read_bytes())
    places = {index.fqn: info for index, info in metadata.storage_data.items()}
    for index in metadata.storage_data:
        if index.fqn == f"model.{HEAD}":
            metadata.storage_data[index] = places[f"model.{EMBED}"]
    (base / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(RecipeError, match="share one storage in"):
        merge({**takes(models, "tied", "untied-stock"), "base": str(base)}, tmp_path / "refused")
    merge({**takes(models, "tied", "tied-stock"), "base": str(base)}, tmp_path / "dcp")
    assert formats().open(tmp_path / "dcp").ties == {HEAD: EMBED}


def test_the_head_of_a_tied_model_may_be_the_embedding(models: Path, tmp_path: Path) -> None:
    rename = {LAYERS[0]: list(LAYERS)}
    for base, ties in (("tied-ours", {HEAD: EMBED}), ("untied-ours", {})):
        merge({"base": source(models, base), "rename": rename}, tmp_path / base)
        assert formats().open(tmp_path / base).ties == ties


@pytest.mark.parametrize("kind", ["", "-ours"])
@pytest.mark.parametrize("method", ["passthrough", "linear"])
def test_a_plans_base_model_says_whether_there_are_two(models: Path, tmp_path: Path, kind: str, method: str) -> None:
    def plan(base: str, other: str) -> dict[str, Any]:
        slices = [{"sources": [{"model": source(models, other + kind), "layer_range": [0, 2]}]}]
        if method == "linear":
            slices[0]["sources"][0]["parameters"] = {"weight": 1.0}
        return {"merge_method": method, "base_model": source(models, base + kind), "slices": slices, "dtype": "float32"}

    for base, other in (("untied", "tied"), ("tied", "untied")):
        merge(plan(base, other), tmp_path / base, to="hf")
        check(tmp_path / base, models, other, tied=False)
    if kind:
        merge(plan("untied", "tied"), tmp_path / "dcp", to="dcp")
        assert formats().open(tmp_path / "dcp").ties == {}
