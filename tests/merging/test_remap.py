"""Remapping: what the merged checkpoint's metadata says, seen by stock torch and by whoever merges on from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tailor_dcp import inspect
from tailor_dcp.merge import merge
from tests.support.merges import Net, Plan, loaded, save
from tests.support.runs import metadata, record, unheard

RENAMES = {"model.layers.1": "model.layers.2", "model.layers.2": ["model.layers.1", "model.layers.3"]}
"""Of three layers four: 0, 2, 1, 2."""
FILLED = {0: 0, 1: 2, 2: 1, 3: 2}


def put(folder: Path, state: dict[str, Any]) -> str:
    with unheard():
        dcp.save(state, checkpoint_id=folder)
    return str(folder)


def nested(folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Return a checkpoint as torch's own converter rebuilds it: by its paths, not by its keys."""
    dcp_to_torch_save(folder, tmp_path / "whole.pt")
    return torch.load(tmp_path / "whole.pt", weights_only=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("flat", [False, True])
def test_values_sit_where_their_new_names_say(tmp_path: Path, flat: bool) -> None:
    """Keys and paths are renamed alike, in nested and in flattened optimizers."""
    net = Net(3, flat=flat)
    with unheard():
        base = save(tmp_path / "run", net, 100, "full")
    merge({"base": base, "rename": RENAMES}, tmp_path / "out")
    found, source = nested(tmp_path / "out", tmp_path), loaded(base, net)
    for new, old in FILLED.items():
        name = f"model.layers.{new}.mlp.weight"
        old_name = f"model.layers.{old}.mlp.weight"
        assert torch.equal(found["model"][name], source[f"model.{old_name}"])
        state = found["optim"][f"state.{name}.exp_avg"] if flat else found["optim"]["state"][name]["exp_avg"]
        assert torch.equal(state, source[f"optim.state.{old_name}.exp_avg"])
    if flat:
        rates = {key: value for key, value in found["optim"].items() if key.startswith("param_groups.model.layers")}
        assert rates == {
            f"param_groups.model.layers.{new}.{name}.weight.lr": 0.1 + (name == "norm")
            for new in FILLED
            for name in ("mlp", "norm")
        }


LAYOUTS: dict[str, Any] = {
    "modules nested": lambda w: {"model": {"layers": {str(n): {"w": w(n)} for n in range(3)}}},
    "a list of layers": lambda w: {"model": {"layers": [{"w": w(n)} for n in range(3)]}},
    "flat": lambda w: {f"layers.{n}.w": w(n) for n in range(3)},
    "two models": lambda w: {name: {f"layers.{n}.w": w(n) for n in range(3)} for name in ("actor", "critic")},
    "wrapped within": lambda w: {"model": {f"layers.{n}._checkpoint_wrapped_module.w": w(n) for n in range(3)}},
    "wrapped before": lambda w: {"model": {f"_orig_mod.module.layers.{n}.w": w(n) for n in range(3)}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_can_be_renamed(tmp_path: Path, layout: str) -> None:
    """However the state dict has the names of its layers: as keys, as indexes, within others."""
    made = LAYOUTS[layout](lambda n: torch.full((2,), float(n)))
    base = put(tmp_path / "step-1", made)
    merge({"base": base, "rename": {"layers.2": "layers.0"}}, tmp_path / "out")
    expected = LAYOUTS[layout](lambda n: torch.full((2,), float({0: 2}.get(n, n))))
    target = LAYOUTS[layout](lambda _: torch.zeros(2))
    with unheard():
        dcp.load(target, checkpoint_id=tmp_path / "out")
    assert str(target) == str(expected)
    assert str(nested(tmp_path / "out", tmp_path)) == str(nested(Path(base), tmp_path)).replace("0., 0.", "2., 2.")


@pytest.mark.parametrize("layout", ["flat", "modules nested", "wrapped before"])
def test_layers_of_another_layout_come_under_the_bases_keys(tmp_path: Path, layout: str) -> None:
    """Also layers that the base has not, which are called as its others are."""
    base = put(tmp_path / "step-1", LAYOUTS[layout](lambda n: torch.zeros(2)))
    other = put(tmp_path / "step-2", {"model": {f"layers.{n}.w": torch.full((2,), float(n)) for n in range(4)}})
    merge({"base": base, "layers": {"layers.[13]": other}}, tmp_path / "out")
    paths = metadata(Path(base)).planner_data
    found = metadata(tmp_path / "out").planner_data
    assert {key: path for key, path in found.items() if key in paths} == paths
    (new,) = found.keys() - paths.keys()
    assert new == next(key for key in paths if "layers.2" in key).replace("layers.2", "layers.3")
    assert str(found[new]) == str(paths[new.replace("layers.3", "layers.2")]).replace("2", "3")
    merge({"base": str(tmp_path / "out"), "rename": {"layers.3": "layers.0"}}, tmp_path / "again")
    first = next(key for key in paths if "layers.0" in key)
    target = {first: torch.zeros(2)}
    with unheard():
        dcp.load(target, checkpoint_id=tmp_path / "again")
    assert target[first].tolist() == [3, 3]


def test_a_parameter_is_in_the_group_of_what_fills_it_and_in_no_other(tmp_path: Path) -> None:
    """Layer-wise learning rates: layer 2 is filled by layer 0, and learns as that did."""
    weights = {f"layers.{n}.w": torch.zeros(2) for n in range(3)}
    state = {"state": {fqn: {"exp_avg": torch.zeros(2)} for fqn in weights}}
    groups = [{"lr": 10.0**-n, "params": [f"layers.{n}.w"]} for n in range(3)]
    base = put(tmp_path / "step-1", {"model": weights, "optim": {**state, "param_groups": groups}})
    merge({"base": base, "rename": {"layers.0": "layers.2"}}, tmp_path / "out")
    found = nested(tmp_path / "out", tmp_path)["optim"]["param_groups"]
    assert [group["params"] for group in found] == [["layers.0.w", "layers.2.w"], ["layers.1.w"], []]


def test_an_engines_lists_of_names_follow_too(tmp_path: Path) -> None:
    """What an engine says of frozen parameters and buffers, for converters to its own files."""
    weights = {f"layers.{n}.w": torch.zeros(2) for n in range(2)}
    train = {"zero": {"frozen": ["layers.1.w"], "buffers": [], "stage": 3}, "step": 1}
    base = put(tmp_path / "step-1", {"model": weights, "train": train})
    merge({"base": base, "rename": {"layers.1": ["layers.1", "layers.2"]}}, tmp_path / "out")
    assert nested(tmp_path / "out", tmp_path)["train"]["zero"] == {
        "frozen": ["layers.1.w", "layers.2.w"],
        "buffers": [],
        "stage": 3,
    }


def test_param_groups_of_a_deeper_training_lose_what_is_not_there(tmp_path: Path) -> None:
    shallow, deep = Net(2), Net(4)
    with unheard():
        base, other = save(tmp_path / "a", shallow, 100, None), save(tmp_path / "b", deep, 200, "full")
    merge({"base": base, "train": other}, tmp_path / "out")
    groups = nested(tmp_path / "out", tmp_path)["optim"]["param_groups"]
    assert [sorted(group["params"]) for group in groups] == [sorted(names) for names in shallow.groups()]
    assert inspect(tmp_path / "out").step == 200


def test_the_record_tells_origins_ties_and_dtypes(tmp_path: Path) -> None:
    """Of each source, under the result's names; two copies of tied layers are tied each for itself."""
    net = Net(2, tied=True)
    with unheard():
        a = save(tmp_path / "a", net, 100, "moments:every=2,weights=fp32,moments=bf16")
        b = save(tmp_path / "b", net, 200, "full")
    first = "model.layers.0"
    merge({"base": b, "layers": {first: a}}, tmp_path / "step-250")
    told = record(tmp_path / "step-250")
    assert told["step"] == 200
    assert told["parent"][2] == "step-200"
    assert {step for _, step, _, _ in told["origins"]} == {100, 200}
    assert [sorted(tie) for tie in told["ties"]] == [["model.lm_head.weight", "model.model.embed_tokens.weight"]]
    assert {key for key in told["narrowed"] if "exp_avg" in key} == {
        f"optim.state.{first}.{name}.weight.{kind}" for name in ("mlp", "norm") for kind in ("exp_avg", "exp_avg_sq")
    }
    units = {(unit.layer, unit.kind): unit for unit in inspect(tmp_path / "step-250").units}
    assert units[first, "weight"].stale_steps == 100
    assert units["lm_head", "weight"].stale_steps == 0


def test_a_layer_that_is_there_twice_costs_its_bytes_once(tmp_path: Path) -> None:
    with unheard():
        base = save(tmp_path / "run", Net(2), 100, "full")
    merge({"base": base, "rename": {"model.layers.1": ["model.layers.1", "model.layers.2"]}}, tmp_path / "out")
    plan = Plan(Net(3), base, {base: Net(2)}, {}, {})
    assert loaded(tmp_path / "out", plan.net)
    assert inspect(tmp_path / "out").live < inspect(base).live + 4000
    merge({"base": base, "rename": {"model.layers.1": ["model.layers.1", "model.layers.2"]}}, tmp_path / "copy",
          materialize=True)  # fmt: skip
    assert inspect(tmp_path / "copy").live == inspect(tmp_path / "out").live
