"""Merging by picking: whatever layers of whatever checkpoints are asked for, loading gives just them, bit for bit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp import inspect
from tailor_dcp.merge import merge
from tests.support.merges import ENDS, STACK, Net, Plan, differing, key_of, layer_of, loaded, save, tree
from tests.support.runs import unheard

pytestmark = pytest.mark.filterwarnings("ignore::tailor_dcp.TailorWarning", "ignore:Detected an existing checkpoint")

POLICIES = [None, "full", "parity", "filter:head=1,tail=1,every=2", "moments:every=2,weights=fp32,moments=bf16"]


@st.composite
def nets(draw: st.DrawFn) -> Net:
    """Draw a model."""
    layers = draw(st.integers(2, 4))
    frozen = draw(st.sampled_from([frozenset(), frozenset(), frozenset({0})]))
    return Net(layers, draw(st.booleans()), frozen, draw(st.booleans()))


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[str, Net, int, Any, str]]:
    """Draw what is saved: a run of two or three steps, and perhaps another one of a deeper model."""
    net = draw(nets())
    carry = draw(st.sampled_from(["link", "reference", "copy"]))
    steps = range(100, 100 * draw(st.integers(3, 4)), 100)
    saves = [("run", net, step, draw(st.sampled_from(POLICIES)), carry) for step in steps]
    if draw(st.booleans()):
        saves.append(("other", replace(net, layers=net.layers + draw(st.integers(0, 2))), 150, "full", "link"))
    return saves


@st.composite
def plans(draw: st.DrawFn, models: dict[str, Net]) -> Plan:
    """Draw what shall come of these checkpoints."""
    sources = list(models)
    base = draw(st.sampled_from(sources[:2]))
    net = models[base]
    depth = draw(st.integers(1, net.layers + 2)) if draw(st.booleans()) else net.layers
    moving = depth != net.layers or not net.frozen
    weights, moments, frozen = {}, {}, set()
    ends = draw(st.sampled_from(sources))
    for name in ENDS:
        tied = net.tied and name != ENDS[1]
        weights[name] = (ends if tied else draw(st.sampled_from(sources)), name)
        moments[name] = weights[name][0] if tied else draw(st.sampled_from(sources))
    for n in range(depth):
        source = draw(st.sampled_from(sources))
        # Param groups are the base's: they must know what fills a layer, or the layer itself.
        most = models[source].layers if n < net.layers else min(net.layers, models[source].layers)
        origin = draw(st.integers(0, most - 1)) if moving and draw(st.booleans()) else min(n, most - 1)
        weights[f"{STACK}.{n}"] = (source, f"{STACK}.{origin}")
        knows = [name for name in sources if origin < models[name].layers]
        if origin in net.frozen:
            frozen.add(n)
            knows = [source]
        moments[f"{STACK}.{n}"] = draw(st.sampled_from(knows))
    train = draw(st.sampled_from([None, *sources]))
    if train is not None and models[train] != net:
        train = None
    ordered = {name: weights[name] for name in [ENDS[0], *(f"{STACK}.{n}" for n in range(depth)), *ENDS[1:]]}
    return Plan(replace(net, layers=depth, frozen=frozenset(frozen)), base, models, ordered, moments, train)


def saved(folder: Path, saves: list[tuple[str, Net, int, Any, str]]) -> dict[str, Net]:
    """Save, and return the model of each checkpoint."""
    return {save(folder / run, net, step, policy, carry): net for run, net, step, policy, carry in saves}


@given(data=st.data())
def test_loading_the_result_gives_what_the_recipe_says(tmp_path_factory: Any, data: st.DataObject) -> None:
    """Any steps, policies, ways of carrying and layouts; layers moved, repeated, left out; any order of sources."""
    folder: Path = tmp_path_factory.mktemp("merge")
    with unheard():
        models = saved(folder, data.draw(runs()))
    plan = data.draw(plans(models))
    recipe, before, expected = plan.recipe(data.draw(st.booleans())), tree(folder), plan.expected()
    outs = {name: folder / "merged" / name for name in ("step-900", "whole", "reversed", "again", "other")}
    done = merge(recipe, outs["step-900"])
    assert done.layers == len(plan.net.names)
    assert differing(loaded(outs["step-900"], plan.net), expected) == []
    merge(recipe, outs["whole"], materialize=True)
    merge({**recipe, "layers": dict(reversed(recipe["layers"].items()))}, outs["reversed"])
    merge({"base": str(outs["step-900"])}, outs["again"])
    for out in outs.values():
        if out.exists():
            assert differing(loaded(out, plan.net), expected) == [], out.name
    check_origins(plan, outs["step-900"])
    assert {name: tree(folder)[name] for name in before} == before, "a source was changed"
    check_merge_of_merge(plan, outs["step-900"], outs["other"], expected)
    for name in {Path(source).parent for source in models}:
        shutil.rmtree(name)
    for out in outs.values():
        assert out.name == "other" or differing(loaded(out, plan.net), expected) == []
        assert inspect(out).missing == ()
    assert sorted(path.name for path in (folder / "merged").iterdir()) == sorted(outs)


def check_origins(plan: Plan, out: Path) -> None:
    """Every unit must have the origin that it has in its source."""
    of_source = {
        source: {(unit.layer, unit.kind): unit.origin_step for unit in inspect(source).units} for source in plan.models
    }
    found = inspect(out)
    assert found.step == of_source_step(plan)
    assert found.missing == ()
    units = {(unit.layer, unit.kind): unit.origin_step for unit in found.units if unit.kind != "other"}
    assert {layer for layer, _ in units} == set(plan.net.names)
    for (layer, kind), step in units.items():
        source, origin = plan.weights[layer]
        source = source if kind == "weight" else plan.moments[layer]
        assert step == of_source[source][origin, kind], (layer, kind)


def of_source_step(plan: Plan) -> int:
    return int(Path(plan.train or plan.base).name.removeprefix("step-"))


def check_merge_of_merge(plan: Plan, merged: Path, out: Path, expected: dict[str, Any]) -> None:
    """Take one layer of the base back; its first one, which every model has."""
    layer = f"{STACK}.0"
    if plan.net.frozen or plan.models[plan.base].frozen:
        shutil.copytree(merged, out)
        return
    merge({"base": str(merged), "layers": {layer: plan.base}}, out)
    of_base = loaded(plan.base, plan.models[plan.base])
    for fqn in plan.net.shapes():
        if layer_of(fqn) == layer:
            keys = [
                key for kind in ("weight", "exp_avg", "exp_avg_sq", "step") if (key := key_of(fqn, kind)) in of_base
            ]
            expected = {**expected, **{key: of_base[key] for key in keys}}
    assert differing(loaded(out, plan.net), expected) == []
