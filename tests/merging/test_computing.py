"""Plans of mergekit over training checkpoints: what only picks is a remap, what computes asks about moments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tailor_dcp import merge, open_checkpoint
from tailor_dcp.recipes.errors import RecipeError
from tests.support.runs import HEAD, L0, L1, L2, Run

FRANKEN = {
    "slices": [
        {"sources": [{"model": "old", "layer_range": [0, 2]}]},
        {"sources": [{"model": "new", "layer_range": [1, 3]}]},
    ],
    "merge_method": "passthrough",
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    made = Run(tmp_path)
    made.save(100, "full", to="old")
    made.save(200, "full", to="new")
    monkeypatch.chdir(tmp_path)
    return made


def same(run: Run, layer: str, origin: str, source: str) -> bool:
    """Tell whether a layer of the result is one of a source, moments included."""
    merged, held = open_checkpoint(run.path("out")), open_checkpoint(run.path(source))
    keys = [key for key in held if f".{origin}." in f".{key}" and isinstance(held[key], torch.Tensor)]
    assert len(keys) == 4  # the weight, two moments and the step
    return all(torch.equal(merged[key.replace(origin, layer)], held[key]) for key in keys)


def test_a_plan_that_picks_is_a_remap(run: Run) -> None:
    done = merge(FRANKEN, "out")
    assert (done.format, done.linked > 0) == ("dcp", True)
    assert same(run, L0, L0, "old")
    assert same(run, L1, L1, "old")
    assert same(run, L2, L1, "new")
    assert same(run, "model.layers.3", L2, "new")
    assert same(run, HEAD, HEAD, "new")
    groups = open_checkpoint("out")["optim.param_groups.0.params"]
    assert sorted(groups) == sorted([*(f"model.layers.{i}.w" for i in range(4)), "lm_head.w"])


def test_what_is_computed_must_say_what_becomes_of_moments(run: Run) -> None:
    plan: dict[str, Any] = {
        "models": [{"model": name, "parameters": {"weight": 0.5}} for name in ("old", "new")],
        "merge_method": "linear",
    }
    with pytest.raises(RecipeError, match="optimizer"):
        merge(plan, "out")
    assert not run.path("out").exists()
    merge({**plan, "optimizer": "average"}, "out")
    merged, old, new = (open_checkpoint(name) for name in ("out", "old", "new"))
    for key in (f"model.{L0}.w", f"optim.state.{L0}.w.exp_avg"):
        torch.testing.assert_close(merged[key], (old[key] + new[key]) / 2)


def test_a_part_of_a_model_dropped(run: Run) -> None:
    plan = {"slices": [{"sources": [{"model": "old", "layer_range": [0, 1]}]}], "merge_method": "passthrough"}
    merge(plan, "out")
    assert L1 not in open_checkpoint("out").layers
    assert same(run, L0, L0, "old")
