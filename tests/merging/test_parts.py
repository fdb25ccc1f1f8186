"""Layers that are parts of others, as experts can be: a block's name means all of it, a part's own name that part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tailor_dcp import LayerwisePlanner, open_checkpoint
from tailor_dcp.formats import formats
from tailor_dcp.layers import LayerMap
from tailor_dcp.merge import merge
from tailor_dcp.merging.placing import named_by
from tailor_dcp.recipes.errors import RecipeError

pytestmark = pytest.mark.filterwarnings("ignore::tailor_dcp.TailorWarning")

L0, L1 = "model.layers.0", "model.layers.1"
ENDS = ("model.embed_tokens.weight", "lm_head.weight")
PARTS = ("attn.weight", "mlp.experts.0.w.weight", "mlp.experts.1.w.weight", "norm.weight")
EXPERT = f"{L1}.mlp.experts.1"
MAPS = {
    "experts": LayerMap(experts=True),
    "patterns": LayerMap(patterns=(r"(?P<layer>model\.layers\.\d+\.(?:attn|mlp|norm))\.",)),
}


def names(layers: int = 2) -> list[str]:
    return [ENDS[0], *(f"model.layers.{n}.{part}" for n in range(layers) for part in PARTS), ENDS[1]]


@pytest.fixture(scope="module", params=MAPS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps; every number in one is its step."""
    folder = tmp_path_factory.mktemp(request.param)
    for step in (1, 2):
        weights = {name: torch.full((2, 2), float(step)) for name in names()}
        state = {name: {"exp_avg": torch.full((2, 2), step / 10)} for name in names()}
        groups = [{"lr": 0.1, "params": names()}]
        planner = LayerwisePlanner("full", base=None, layers=MAPS[request.param])
        dcp.save(
            {"model": weights, "optim": {"state": state, "param_groups": groups}},
            checkpoint_id=folder / f"step-{step}",
            planner=planner,
        )
    return folder


def steps(folder: Path, layers: int = 2) -> dict[str, int]:
    """Return the step that each parameter comes from; its moments must be of the same."""
    held = open_checkpoint(folder)
    found = {name: int(held[f"model.{name}"][0, 0]) for name in names(layers)}
    assert {name: round(float(held[f"optim.state.{name}.exp_avg"][0, 0]) * 10) for name in found} == found
    return found


def mixed(*old: str, layers: int = 2) -> dict[str, int]:
    return {name: 1 if name.startswith(old) else 2 for name in names(layers)}


@pytest.mark.parametrize("layers", [L1, "model.layers.[1-9]", "model.layers.{1}"])
def test_a_block_is_taken_with_its_parts(run: Path, tmp_path: Path, layers: str) -> None:
    merge({"base": str(run / "step-2"), "layers": {layers: str(run / "step-1")}}, tmp_path / "out")
    assert steps(tmp_path / "out") == mixed(f"{L1}.")


def test_the_nearest_name_counts(run: Path, tmp_path: Path) -> None:
    part = EXPERT if "experts" in run.name else f"{L1}.mlp"
    for takes, wanted in (
        ({L1: "1", part: "2"}, mixed(f"{L1}.") | {name: 2 for name in names() if name.startswith(part)}),
        ({"model.layers.*": "2", L1: "1"}, mixed(f"{L1}.")),
        ({L1: "2", f"{part[:-1]}[{part[-1]}]": "1"}, mixed(part)),
        ({"model.layers.[01]": "2", part: "1"}, mixed(part)),
    ):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        merge({"base": str(run / "step-2"), "layers": {k: str(run / f"step-{v}") for k, v in takes.items()}}, out)
        assert steps(out) == wanted, takes
    with pytest.raises(RecipeError, match="name the layer itself"):
        layers = {"model.layers.[01]": str(run / "step-1"), "model.layers.*": str(run / "step-2")}
        merge({"base": str(run / "step-2"), "layers": layers}, tmp_path / "refused")


def test_a_block_is_dropped_and_repeated_with_its_parts(run: Path, tmp_path: Path) -> None:
    merge({"base": str(run / "step-2"), "rename": {L1: [L1, "model.layers.2"]}}, tmp_path / "deep")
    assert steps(tmp_path / "deep", 3) == mixed(layers=3)
    merge({"base": str(tmp_path / "deep"), "drop": ["model.layers.2"]}, tmp_path / "flat")
    assert steps(tmp_path / "flat") == mixed()
    assert not [key for key in open_checkpoint(tmp_path / "flat") if "layers.2" in key]


def test_a_plans_slices_are_the_same_in_every_format(run: Path, tmp_path: Path) -> None:
    one, two = (str(run / f"step-{step}") for step in (1, 2))
    plan: dict[str, Any] = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": two, "layer_range": [0, 1]}]},
            {"sources": [{"model": one, "layer_range": [1, 2]}]},
        ],
    }
    wanted = mixed(f"{L1}.", "lm_head")
    merge(plan, tmp_path / "dcp", to="dcp")
    assert steps(tmp_path / "dcp") == wanted
    merge(plan, tmp_path / "hf", to="hf")
    found = formats().open(tmp_path / "hf").weights
    assert {name: int(tensor.whole()[0, 0]) for name, tensor in found.items()} == wanted


def test_what_a_glob_calls_by_name() -> None:
    for pattern, name in (
        (L1, L1),
        ("model.layers.*", L1),
        ("model.layers.1.mlp.*", EXPERT[:-2]),
        (EXPERT, EXPERT),
        ("model", None),
        ("model.layers", None),
        (L0, None),
    ):
        assert named_by(EXPERT, pattern) == name, pattern
    assert named_by("lm_head", "lm_*") == "lm_head"
    assert named_by("model.norm", "model") is None
