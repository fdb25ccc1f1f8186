"""Repair plans: no name breaks out of its line, and of many damaged checkpoints none takes longer than one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor_dcp import LayerwisePlanner, LayerwiseWriter, merge, verify
from tailor_dcp.metadata.record import Origin
from tailor_dcp.recipes.documents import parse
from tailor_dcp.recipes.native_file import native
from tailor_dcp.units import WEIGHT, Unit
from tailor_dcp.verify import RepairPlan, repair_plans
from tailor_dcp.verifying.findings import Verdict
from tailor_dcp.verifying.repair import HEAD, Candidate, plan, units_to_take
from tests.flips import flipped
from tests.support.runs import L0, LAYERS, Run, due, metadata

pytestmark = pytest.mark.filterwarnings("ignore")

signs = st.sampled_from("\n\r\t\v\x85\u2028\u2029\ufeff\x00\x1b#:'\"-?[]{}*&!|>%@` a1.é🙂")
hostile = st.text(signs | st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
surrogates = st.text(signs | st.sampled_from("\udcff\ud800\udc00"), min_size=1, max_size=12)


def verdict(name: str, step: int) -> Verdict:
    return Verdict(name, f"/run/{name}", step, "id", float(step), "damaged", 0, 0, 0, 0)


def candidate(name: str, step: int, units: list[Unit], damaged: frozenset[Unit] = frozenset(), **how: Any) -> Candidate:
    origins = {unit: Origin(f"{step:032x}", step, name, 0) for unit in units}
    return Candidate(f"/run/{name}", float(step), step, True, damaged, damaged, origins, how.get("ties", ()))


@settings(max_examples=300)
@given(st.lists(hostile, min_size=1, max_size=3, unique=True), hostile, hostile)
def test_the_file_says_what_the_recipe_says_and_nothing_else(layers: list[str], mine: str, other: str) -> None:
    """Whatever names hold: lines of their own, comments, YAML's signs, what is no text."""
    units = [Unit(layer, WEIGHT) for layer in layers]
    others = [candidate(f"other-{other}", 1, units)]
    made = plan(candidate(mine, 2, units, frozenset(units)), verdict(mine, 2), others)
    text = checked(made)
    recipe = native(parse(text, "the plan"))
    assert {take.source for take in recipe.takes} == {f"/run/other-{other}"}
    assert recipe.base == f"/run/{mine}"
    lines = text.split("\n")
    comments = [HEAD, *["# "] * (1 + len(layers))]
    assert all(line.startswith(head) for line, head in zip(lines, comments, strict=False))
    assert not any(line.startswith("#") for line in lines[len(comments) :])
    assert all("".join(line.splitlines()) == line for line in made.lines())


@given(surrogates, surrogates)
def test_names_that_are_no_text_come_back_as_they_were(layer: str, mine: str) -> None:
    """Folders on a disk may have any bytes for names."""
    units = [Unit(layer, WEIGHT)]
    checked(plan(candidate(mine, 2, units, frozenset(units)), verdict(mine, 2), [candidate("other", 1, units)]))


def checked(made: RepairPlan) -> str:
    """Return the text of a plan that says what its recipe says, and can be written."""
    text = made.yaml()
    text.encode()
    assert yaml.safe_load(text) == made.recipe
    assert made.recipe is not None and made.recipe.keys() == {"base", "layers"}
    return text


def test_a_layer_of_a_name_that_breaks_lines_takes_from_nowhere_else(tmp_path: Path) -> None:
    """It would have the training state come from an address of whoever gave the layer its name."""
    name = "layers.0\ntrain: s3://attacker/x #"
    damage(tmp_path, name)
    (made,) = repair_plans(verify(tmp_path / "run"))
    told = yaml.safe_load(made.yaml())
    assert told.keys() == {"base", "layers"}
    assert [*told["layers"]] == [name]


def damage(tmp_path: Path, layer: str) -> None:
    """Save a layer at two steps, and flip a bit of it at the later."""
    for step in (100, 200):
        state = {"model": {f"{layer}.w": torch.full((30, 30), float(step)), "b.w": torch.ones(3)}}
        writer = LayerwiseWriter(tmp_path / "run" / f"step-{step}")
        dcp.save(state, storage_writer=writer, planner=LayerwisePlanner("full"))
    folder = tmp_path / "run" / "step-200"
    info = next(i for x, i in metadata(folder).storage_data.items() if x.fqn == f"model.{layer}.w")
    path = folder / info.relative_path
    data = bytearray(path.read_bytes())
    data[info.offset + 1200] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("layer", ["blk[0]", "a*b", "a?b", "{a,b}", "a{b", "[!a]", "x]", "a,b"])
def test_a_layer_whose_name_would_be_a_pattern_is_merged(tmp_path: Path, layer: str) -> None:
    """By stock torch its values are those of the older step, and nothing else's are."""
    damage(tmp_path, layer)
    (made,) = repair_plans(verify(tmp_path / "run"))
    (tmp_path / "plan.yaml").write_text(made.yaml())
    merge(tmp_path / "plan.yaml", tmp_path / "out")
    assert verify(tmp_path / "out").state == "good"
    target = {"model": {f"{layer}.w": torch.zeros(30, 30), "b.w": torch.zeros(3)}}
    dcp.load(target, checkpoint_id=tmp_path / "out")
    assert target["model"][f"{layer}.w"].eq(100).all()
    assert target["model"]["b.w"].eq(1).all()


def test_many_damaged_checkpoints_are_each_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file that all of them have is damaged: a plan for each, and no look at all others for each."""
    run = Run(tmp_path / "run")
    run.save(50, due(*LAYERS), base=None)
    for step in range(100, 1200, 100):
        run.save(step, due(*LAYERS) if step == 100 else due(), **({"base": None} if step == 100 else {}))
    info = next(i for x, i in metadata(run.path(100)).storage_data.items() if x.fqn == f"model.{L0}.w")
    module = sys.modules["tailor_dcp.verify"]  # the package has a function of this name
    opened: list[Path] = []
    real: Callable[[Path], Any] = module.open_base  # type: ignore[attr-defined]

    def counted(folder: Path) -> Any:
        opened.append(folder)
        return real(folder)

    with flipped(run.path(100) / info.relative_path, info.offset + 712, 1):
        found = verify(run.folder)
        monkeypatch.setattr(module, "open_base", counted)
        plans = repair_plans(found)
    assert [len(made.taken) for made in plans] == [1] * 11
    assert {one.source for made in plans for one in made.taken} == {str(run.path(50))}
    assert sorted(opened) == sorted(map(run.path, [50, *range(100, 1200, 100)]))


units = st.builds(Unit, st.sampled_from("abcd"), st.sampled_from([WEIGHT, "exp_avg", "exp_avg_sq"]))


@given(st.data())
def test_what_belongs_together_comes_together(data: st.DataObject) -> None:
    """Groups are disjoint, hold all that is damaged, and break neither ties nor the moments of a layer apart."""
    there = data.draw(st.lists(units, min_size=1, unique=True))
    damaged = data.draw(st.frozensets(st.sampled_from(there)))
    ties = data.draw(st.lists(st.frozensets(st.sampled_from(there)), max_size=3))
    groups = units_to_take(candidate("mine", 2, there, damaged, ties=tuple(ties)))
    assert sum(map(len, groups)) == len(frozenset().union(*groups))
    assert damaged <= frozenset().union(*groups)
    assert all(group & damaged for group in groups)
    for group in groups:
        assert all(tie <= group for tie in ties if tie & group)
        for one in group & damaged - {unit for unit in there if unit.kind == WEIGHT}:
            assert {unit for unit in there if unit.layer == one.layer and unit.kind != WEIGHT} <= group
