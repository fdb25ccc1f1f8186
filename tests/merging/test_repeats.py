"""Layers that are in a model several times: each is one of its own in whatever is made of it afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tailor_dcp.catalog import Catalog
from tailor_dcp.formats import formats
from tailor_dcp.materialize import materialize
from tailor_dcp.merge import merge
from tailor_dcp.merging.catalogs import Repeated
from tests.support.hf_models import loaded, made

pytestmark = pytest.mark.filterwarnings("ignore::tailor_dcp.TailorWarning")

L0, L1 = "model.layers.0", "model.layers.1"
RENAME = {L0: [L0, "model.layers.2"], L1: [L1, "model.layers.3"]}
KINDS = {"exp_avg", "exp_avg_sq"}


@pytest.fixture(scope="module", params=["llama", "llama-tied"])
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little Llama in training, and a composite that has each of its layers twice."""
    folder = tmp_path_factory.mktemp(request.param)
    made(request.param).save_pretrained(folder / "model")
    catalog = formats().open(folder / "model")
    own = {name: tensor for name, tensor in catalog.weights.items() if name not in catalog.ties}
    state = {name: {kind: Repeated(tensor) for kind in KINDS} for name, tensor in own.items()}
    groups = ({"lr": 0.1, "params": list(own)},)
    trained = Catalog(**{**vars(catalog), "state": state, "groups": groups, "train": {"step": 7}})
    formats().write(trained, folder / "step-7", "dcp")
    merge({"base": str(folder / "step-7"), "rename": RENAME}, folder / "deep")
    return folder


def wanted(folder: Path) -> dict[str, torch.Tensor]:
    """Return the deep model's state dict, put together by hand."""
    _, state = loaded(folder / "model")
    copies = {RENAME[layer][1] + name[len(layer) :]: name for name in state for layer in RENAME if f"{layer}." in name}
    return {**state, **{new: state[old] for new, old in copies.items()}}


def check(catalog: Catalog, folder: Path, *, moments: bool = True) -> None:
    """See that a deep checkpoint has everything, each copy for itself, and the head tied only where it was."""
    expected = wanted(folder)
    assert catalog.weights.keys() == expected.keys()
    for name, tensor in catalog.weights.items():
        assert torch.equal(tensor.whole(), expected[name]), name
    tied = {"lm_head.weight"} if "tied" in folder.name else set()
    pairs = [{*pair} for pair in catalog.ties.items()]
    assert pairs == [{name, "model.embed_tokens.weight"} for name in tied]
    if moments:
        assert {name for name, kinds in catalog.state.items() if kinds.keys() >= KINDS} == expected.keys() - tied
        for name, kinds in catalog.state.items():
            assert torch.equal(kinds["exp_avg"].whole(), expected[name]), name


@pytest.mark.parametrize("copied", ["linked", "merged anew", "materialized"])
def test_every_conversion_has_each_copy(deep: Path, tmp_path: Path, copied: str) -> None:
    source = deep / "deep"
    if copied == "merged anew":
        merge({"base": str(source)}, source := tmp_path / "source", materialize=True)
    elif copied == "materialized":
        materialize(source, source := tmp_path / "source")
    check(formats().open(source), deep)
    merge({"base": str(source)}, tmp_path / "hf", to="hf")
    model, state = loaded(tmp_path / "hf")
    assert model.config.num_hidden_layers == 4
    expected = wanted(deep)
    assert state.keys() == expected.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []
    for to in ("dcp", "zero3"):
        formats().write(formats().open(source), tmp_path / to, to, world_size=2)
        check(formats().open(tmp_path / to), deep)


def test_a_mean_has_each_copy(deep: Path, tmp_path: Path) -> None:
    models = [{"model": str(deep / "deep"), "parameters": {"weight": 1.0}}]
    plan: dict[str, Any] = {"merge_method": "linear", "models": models, "optimizer": "drop"}
    merge(plan, tmp_path / "hf", to="hf")
    check(formats().open(tmp_path / "hf"), deep, moments=False)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_hidden_layers"] == 4


def test_a_layer_of_both_is_not_tied_in_a_straight_conversion(deep: Path, tmp_path: Path) -> None:
    """Renamed and written in one go."""
    for to in ("hf", "zero3"):
        merge({"base": str(deep / "step-7"), "rename": RENAME}, tmp_path / to, to=to)
        check(formats().open(tmp_path / to), deep, moments=to != "hf")
