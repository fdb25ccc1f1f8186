"""Repair plans: what they name is the newest that is whole, and what merge makes of them loads with torch alone."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from tailor_dcp import LayerwisePlanner, LayerwiseWriter, merge, verify
from tailor_dcp.units import Unit
from tailor_dcp.verify import RepairPlan, repair_plans
from tests.flips import flipped
from tests.support.runs import HEAD, L0, L1, L2, LAYERS, Run, due, metadata

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=[None, LayerwiseWriter], ids=["stock writer", "layerwise"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """At step 100 all layers, at 200 two, at 300 one of these and another."""
    run, how = Run(tmp_path / "run"), {"writer": request.param} if request.param else {}
    run.save(100, due(*LAYERS), **how)
    run.save(200, due(L0, L1), **how)
    run.save(300, due(L1, L2), **how)
    return run


@contextlib.contextmanager
def damaged(folder: Path, key: str) -> Iterator[None]:
    """Flip a bit of a tensor's own bytes in a checkpoint, and wherever else they are linked to."""
    info = next(info for index, info in metadata(folder).storage_data.items() if index.fqn == key)
    with flipped(folder / info.relative_path, info.offset + 712, 2):
        yield


def planned(folder: Path) -> RepairPlan:
    (made,) = repair_plans(verify(folder))
    return made


def repaired(run: Run, made: RepairPlan, tmp_path: Path) -> dict[str, int]:
    """Do what a plan says, through a file as people do; return the step of each tensor's values by stock torch."""
    recipe = tmp_path / "plan.yaml"
    recipe.write_text(made.yaml())
    out = run.path("step-999")
    merge(recipe, out)
    assert verify(out).state == "good"
    found = run.steps_of(out)
    shutil.rmtree(out)
    return found


def test_a_weight_comes_from_the_newest_older_checkpoint(run: Run, tmp_path: Path) -> None:
    with damaged(run.path(300), f"model.{L1}.w"):
        made = planned(run.path(300))
        (taken,) = made.taken
        assert (taken.layer, taken.kinds, taken.origin_step, taken.same) == (L1, ("weight",), 200, False)
        assert Path(taken.source) == run.path(200)
        found = repaired(run, made, tmp_path)
    expected = run.steps_of(300)
    assert {key for key in found if found[key] != expected[key]} == {f"model.{L1}.w"}
    assert (expected[f"model.{L1}.w"], found[f"model.{L1}.w"]) == (300, 200)


def test_moments_come_together(run: Run, tmp_path: Path) -> None:
    """Half of them of another step would be worse than all of them."""
    with damaged(run.path(300), f"optim.state.{L1}.w.exp_avg"):
        made = planned(run.path(300))
        assert [(one.layer, one.kinds) for one in made.taken] == [(L1, ("exp_avg", "exp_avg_sq"))]
        found = repaired(run, made, tmp_path)
    changed = {key: step for key, step in found.items() if step != run.steps_of(300)[key]}
    assert set(changed.values()) == {200}
    assert changed.keys() == {key for key in found if L1 in key and key.startswith("optim.state")}


def test_the_very_values_are_preferred_wherever_they_are(run: Run, tmp_path: Path) -> None:
    """A copy that lost its links has them, though older values are in a newer checkpoint."""
    info = next(i for x, i in metadata(run.path(200)).storage_data.items() if x.fqn == f"model.{L0}.w")
    own = run.path(200) / info.relative_path
    shutil.copy(own, tmp_path / "copy")
    own.unlink()
    shutil.copy(tmp_path / "copy", own)
    expected = run.steps_of(200)
    with damaged(run.path(200), f"model.{L0}.w"):
        for path in (run.path(200), run.folder):
            made = next(one for one in repair_plans(verify(path)) if one.checkpoint == "step-200")
            (taken,) = made.taken
            assert (Path(taken.source), taken.origin_step, taken.same) == (run.path(300), 200, True)
            assert repaired(run, made, tmp_path) == expected


def test_a_missing_file_takes_whole_layers_with_it(run: Run, tmp_path: Path) -> None:
    """With DCP's own writer all that the save wrote, the training's progress, too."""
    for name in {i.relative_path for x, i in metadata(run.path(300)).storage_data.items() if L1 in x.fqn}:
        (run.path(300) / name).unlink()
    made = planned(run.path(300))
    assert {(one.layer, one.source) for one in made.taken} >= {(L1, str(run.path(200)))}
    steps = repaired(run, made, tmp_path)
    assert {steps[key] for key in steps if L1 in key} == {200}


def test_the_training_state_comes_from_an_older_one(run: Run, tmp_path: Path) -> None:
    run.save(400, due(), extra={"train": {"clock": torch.arange(5)}})
    run.save(500, due(), extra={"train": {"clock": torch.arange(5) + 1}})
    with damaged(run.path(500), "train.clock"):
        made = planned(run.path(500))
        assert made.recipe == {"base": str(run.path(500)), "train": str(run.path(400))}
        recipe = tmp_path / "plan.yaml"
        recipe.write_text(made.yaml())
        merge(recipe, run.path("step-999"))
    target = {"train": {"clock": torch.zeros(5, dtype=torch.int64)}}
    dcp.load(target, checkpoint_id=run.path("step-999"))
    assert torch.equal(target["train"]["clock"], torch.arange(5))


def test_what_nobody_else_has_is_lost(run: Run, tmp_path: Path) -> None:
    """All three checkpoints share these bytes; then only what is older and whole is left, which is nothing."""
    run.save(50, due(*LAYERS), base=None)
    with damaged(run.path(300), f"model.{HEAD}.w"):
        plans = {one.checkpoint: one for one in repair_plans(verify(run.folder))}
    assert set(plans) == {"step-100", "step-200", "step-300"}
    for made in plans.values():
        assert made.recipe is None
        assert f"{HEAD}/weight" in made.lost
        assert "nothing can be put in its place" in next(iter(made.lines()))


def test_unbelievable_metadata_means_an_older_checkpoint(run: Run, tmp_path: Path) -> None:
    path = run.path(300) / ".metadata"
    path.write_bytes(path.read_bytes()[:-30])
    for found in (verify(run.path(300)), verify(run.folder)):
        (made,) = repair_plans(found)
        assert made.recipe == {"base": str(run.path(200))}
        assert repaired(run, made, tmp_path) == run.steps_of(200)


def test_a_damaged_candidate_is_passed_over(run: Run, tmp_path: Path) -> None:
    with damaged(run.path(300), f"model.{L1}.w"), damaged(run.path(200), f"model.{L1}.w"):
        plans = {one.checkpoint: one for one in repair_plans(verify(run.folder))}
        alone = planned(run.path(300))
        assert alone == plans["step-300"]
        assert repaired(run, alone, tmp_path)[f"model.{L1}.w"] == 100
    assert [one.origin_step for one in plans["step-200"].taken] == [100]


def test_tied_layers_come_from_one_checkpoint(tmp_path: Path) -> None:
    def state(step: int) -> dict[str, Any]:
        shared = torch.full((4, 3), float(step))
        return {"model": {"embed.w": shared, "layers.0.w": torch.full((3,), float(step)), "lm_head.w": shared}}

    for step in (100, 200):
        where = tmp_path / "run" / f"step-{step}"
        dcp.save(state(step), storage_writer=LayerwiseWriter(where), planner=LayerwisePlanner("full"))
    last = tmp_path / "run" / "step-200"
    with damaged(last, "model.embed.w"):
        made = planned(last)
        assert {one.layer for one in made.taken} == {"embed", "lm_head"}
        merge(yaml.safe_load(made.yaml()), tmp_path / "run" / "step-201")
    target = {"model": {key: torch.zeros_like(value) for key, value in state(0)["model"].items()}}
    dcp.load(target, checkpoint_id=tmp_path / "run" / "step-201")
    assert {key: float(value.reshape(-1)[0]) for key, value in target["model"].items()} == {
        "embed.w": 100,
        "layers.0.w": 200,
        "lm_head.w": 100,
    }


def test_only_what_may_be_taken_is_read(run: Run) -> None:
    """Of the other checkpoints no bytes but those of the damaged unit."""
    with damaged(run.path(300), f"model.{L1}.w"):
        assert verify(run.path(200), units={Unit(L1, "weight")}).bytes < verify(run.path(200)).bytes / 5


@pytest.mark.parametrize("saved_by", ["ours", "stock"])
def test_a_copy_gives_back_also_the_training_state(tmp_path: Path, saved_by: str) -> None:
    run = Run(tmp_path / "run")
    for step in (100, 200):
        if saved_by == "ours":
            run.save(step, due(*LAYERS), writer=LayerwiseWriter, extra={"train": {"clock": torch.arange(5) + step}})
        else:
            run.stock(step)
    shutil.copytree(run.path(200), run.folder / "keep")
    key = "train.clock" if saved_by == "ours" else f"model.{L0}.w"
    with damaged(run.path(200), key):
        made = planned(run.path(200))
    assert [(one.source, one.same) for one in made.taken] == [(str(run.folder / "keep"), True)]


def test_in_a_copied_run_older_is_what_has_the_lower_step(tmp_path: Path) -> None:
    """There files have the time of the copying, and stock metadata has no other."""
    run = Run(tmp_path / "run")
    for step in (100, 200, 300):
        run.stock(step)
    for step, seconds in ((300, 1e9), (200, 2e9), (100, 3e9)):
        os.utime(run.path(step) / ".metadata", (seconds, seconds))
    with damaged(run.path(200), f"model.{L0}.w"):
        (taken,) = planned(run.path(200)).taken
        assert taken.source == str(run.path(100))
    (run.path(200) / ".metadata").write_bytes(b"nothing")
    os.utime(run.path(200) / ".metadata", (4e9, 4e9))
    assert planned(run.path(200)).recipe == {"base": str(run.path(100))}


def test_a_checkpoint_behind_a_link_is_repaired_from_the_run_that_it_is_in(run: Run, tmp_path: Path) -> None:
    link = tmp_path / "home" / "ckpt"
    link.parent.mkdir()
    link.symlink_to(run.path(300))
    with damaged(run.path(300), f"model.{L1}.w"):
        made = planned(link)
        assert [(one.source, one.origin_step) for one in made.taken] == [(str(run.path(200)), 200)]
        assert repaired(run, made, tmp_path)[f"model.{L1}.w"] == 200
