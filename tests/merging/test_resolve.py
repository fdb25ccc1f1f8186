"""Resolving: what a recipe means, and every way in which it can be wrong: one sentence, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tailor_dcp.merge import merge
from tailor_dcp.recipes.errors import RecipeError
from tests.support.merges import Net, differing, loaded, save, tree
from tests.support.runs import unheard

NET = Net(3)
L0, L1, L2 = (f"model.layers.{n}" for n in range(3))


@dataclass(frozen=True)
class Sources:
    """Checkpoints of one kind of model, and others that differ from them in some way."""

    folder: Path

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)

    def merged(self, **recipe: Any) -> Path:
        """Merge, with the newest checkpoint of the run for a base, and return the result."""
        out = self.folder / "out" / str(len(list((self.folder / "out").iterdir())))
        merge({"base": self["run/step-300"], **recipe}, out)
        return out

    def refused(self, **recipe: Any) -> str:
        """Return why a merge is refused; nothing may be written or changed by it."""
        before = tree(self.folder), sorted(self.folder.rglob("*"))
        with pytest.raises(RecipeError) as refused:
            merge({"base": self["run/step-300"], **recipe}, self.folder / "new" / "deep" / "result")
        assert (tree(self.folder), sorted(self.folder.rglob("*"))) == before
        said = str(refused.value).replace(f"{self.folder}/", "")
        assert "\n" not in said
        assert said.endswith((".", "?"))
        return said


def put(folder: Path, model: dict[str, Any], optim: dict[str, Any] | None = None, **rest: Any) -> None:
    """Save whatever it is with torch alone."""
    state = {"model": model, **({} if optim is None else {"optim": optim}), **rest}
    dcp.save(state, checkpoint_id=folder)


def weights(scale: float = 1.0, layers: int = 3, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {fqn: torch.full(shape, scale) for fqn, shape in Net(layers).shapes().items()}
    return {**found, **{name.replace("__", "."): value for name, value in changes.items()}}


def moments(kinds: tuple[str, ...], names: Callable[[str], bool] = lambda _: True) -> dict[str, Any]:
    shapes = {fqn: shape for fqn, shape in NET.shapes().items() if names(fqn)}
    state = {fqn: {kind: torch.ones(shape) for kind in kinds} for fqn, shape in shapes.items()}
    return {"state": state, "param_groups": [{"lr": 0.1, "params": list(shapes)}]}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "out").mkdir()
    with unheard():
        for step in (100, 200, 300):
            save(folder / "run", NET, step, "full")
        save(folder / "deeper", Net(5), 150, None)
        save(folder / "tied", Net(3, tied=True), 100, "full")
        save(folder / "tied", Net(3, tied=True), 200, "full")
        put(folder / "bare", weights())
        put(folder / "deep-bare", weights(layers=4))
        put(folder / "narrow", weights(model__layers__1__mlp__weight=torch.ones(4, 2)), moments(("exp_avg",)))
        put(folder / "sgd", weights(), moments(("momentum_buffer",)))
        put(folder / "plain-sgd", weights(), {"state": {}, "param_groups": [{"lr": 0.1, "params": list(NET.shapes())}]})
        put(folder / "extra", weights(model__layers__1__extra=torch.ones(2)))
        lacking = weights()
        del lacking["model.layers.1.norm.weight"]
        put(folder / "lacking", lacking)
        numbered = {"state": {n: {"exp_avg": torch.ones(2)} for n in range(3)}, "param_groups": [{"params": [0, 1, 2]}]}
        put(folder / "numbered", weights(), numbered)
        put(folder / "pair", {}, actor=weights(2), critic=weights(3, lm_head__weight=torch.ones(1, 3)))
        put(folder / "pair2", {}, actor=weights(4), critic=weights(5, lm_head__weight=torch.ones(1, 3)))
        put(folder / "odd", weights(layers=2), None)
    return Sources(folder)


def value(folder: Path, key: str) -> torch.Tensor:
    """Load one tensor with torch alone."""
    size = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata[key].size
    target = {key: torch.zeros(size)}
    with unheard():
        dcp.load(target, checkpoint_id=folder)
    return target[key]


# What it means --------------------------------------------------------------------------


def test_a_layers_own_name_goes_before_a_glob(sources: Sources) -> None:
    out = sources.merged(layers={"model.layers.*": sources["run/step-100"], L1: sources["run/step-200"]})
    found = loaded(out, NET)
    of_step = {step: loaded(sources[f"run/step-{step}"], NET) for step in (100, 200, 300)}
    for key in found:
        step = 200 if f"{L1}." in key else 100 if "model.layers." in key else 300
        if ".params" not in key:
            assert differing({key: found[key]}, {key: of_step[step][key]}) == [], key


def test_step_goes_with_the_moments_unless_it_is_named(sources: Sources) -> None:
    """One counter cannot come from two checkpoints."""
    a, b = sources["run/step-100"], sources["run/step-200"]
    both = [{"from": a, "kinds": ["exp_avg"]}, {"from": b, "kinds": ["exp_avg_sq"]}]
    assert "takes the step of model.layers.1 from run/step-100 and run/step-200; name step" in sources.refused(
        layers={L1: both}
    )
    both[1]["kinds"] = ["exp_avg_sq", "step"]
    out = sources.merged(layers={L1: both})
    assert value(out, f"optim.state.{L1}.mlp.weight.step") == 200
    assert value(out, f"optim.state.{L0}.mlp.weight.step") == 300


def test_the_whole_optimizer_may_come_from_one_source(sources: Sources) -> None:
    out = sources.merged(layers={L1: sources["run/step-100"]}, optimizer=sources["run/step-200"])
    expected = {
        **loaded(sources["run/step-300"], NET),
        **{k: v for k, v in loaded(sources["run/step-200"], NET).items() if k.startswith("optim.state.")},
        **{k: v for k, v in loaded(sources["run/step-100"], NET).items() if k.startswith(f"model.{L1}.")},
    }
    assert differing(loaded(out, NET), expected) == []


def test_without_an_optimizer_nothing_of_it_stays(sources: Sources) -> None:
    keys = dcp.FileSystemReader(sources.merged(optimizer="drop")).read_metadata().state_dict_metadata
    assert not [key for key in keys if "optim" in key]
    assert "train.step" in keys
    keys = dcp.FileSystemReader(sources.merged(train="drop")).read_metadata().state_dict_metadata
    assert not [key for key in keys if key.startswith("train.") or "param_groups" in key]


def test_param_groups_stay_where_an_optimizer_has_no_state(sources: Sources) -> None:
    """SGD without momentum has learning rates all the same."""
    out = sources.merged(base=sources["plain-sgd"], layers={L1: sources["bare"]})
    assert "optim.param_groups.0.lr" in dcp.FileSystemReader(out).read_metadata().state_dict_metadata


def test_two_models_in_one_checkpoint_are_taken_together(sources: Sources) -> None:
    """Their layers have the same names, and their tensors need not have the same shapes."""
    out = sources.merged(base=sources["pair"], layers={L1: sources["pair2"], "lm_head": sources["pair2"]})
    for key, expected in (("actor", 4), ("critic", 5)):
        assert value(out, f"{key}.{L1}.mlp.weight").eq(expected).all()
        assert value(out, f"{key}.{L0}.mlp.weight").eq(expected - 2).all()
    assert value(out, "critic.lm_head.weight").shape == (1, 3)


def test_a_frozen_layer_has_no_state_and_that_is_no_fault(sources: Sources, tmp_path: Path) -> None:
    net = Net(3, frozen=frozenset({0}))
    with unheard():
        a, b = (save(tmp_path / "run", net, step, None) for step in (100, 200))
    merge({"base": b, "layers": {L0: a, L1: a}}, tmp_path / "out")
    expected = loaded(b, net) | {k: v for k, v in loaded(a, net).items() if L0 in k or L1 in k}
    assert differing(loaded(tmp_path / "out", net), expected) == []


def test_a_layer_that_was_frozen_may_be_trained_where_the_groups_name_it(tmp_path: Path) -> None:
    """One that has no state yet is in its group all the same, and only reading the group's list can tell."""
    with unheard():
        a = save(tmp_path / "a", Net(3, frozen=frozenset({1})), 100, None)
        b = save(tmp_path / "b", NET, 200, None)
    merge({"base": a, "layers": {L1: b}}, tmp_path / "out")
    assert value(tmp_path / "out", f"optim.state.{L1}.mlp.weight.step") == 200


@pytest.mark.parametrize("to", ["dcp", "zero3"])
def test_moments_that_no_param_group_knows_are_refused(sources: Sources, tmp_path: Path, to: str) -> None:
    """A layer that was frozen has no place in its optimizer; training would go on without those moments."""
    put(tmp_path / "frozen", weights(), moments(("exp_avg", "exp_avg_sq", "step"), lambda name: f"{L1}." not in name))
    put(tmp_path / "whole", weights(), moments(("exp_avg", "exp_avg_sq", "step")))
    base, whole = str(tmp_path / "frozen"), str(tmp_path / "whole")
    with pytest.raises(RecipeError, match=rf"know {L1}\.mlp\.weight with its exp_avg from .*train: .*whole.*: drop\)"):
        merge({"base": base, "layers": {L1: whole}}, tmp_path / "out", to=to)
    with pytest.raises(RecipeError, match="does not know"):
        merge({"base": whole, "train": base}, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()
    if to == "dcp":
        merge({"base": base, "layers": {L1: whole}, "train": whole}, tmp_path / "out")
        merge({"base": base, "layers": {L1: whole}, "optimizer": "drop"}, tmp_path / "dropped")


def test_state_under_numbers_is_dropped_only_if_that_is_said(sources: Sources, tmp_path: Path) -> None:
    """A checkpoint of DCP takes it over as it is; ZeRO has no place for it."""
    merge({"base": sources["numbered"], "layers": {L1: {"from": sources["bare"], "kinds": "weight"}}}, tmp_path / "out")
    assert "optim.state.1.exp_avg" in dcp.FileSystemReader(tmp_path / "out").read_metadata().state_dict_metadata
    with pytest.raises(RecipeError, match="numbered keeps its optimizer's state under numbers"):
        merge({"base": sources["numbered"]}, tmp_path / "zero", to="zero3")
    merge({"base": sources["numbered"], "optimizer": "drop"}, tmp_path / "hf", to="hf")


# What it must not be --------------------------------------------------------------------


def test_two_sources_for_one_layer(sources: Sources) -> None:
    said = sources.refused(layers={"model.layers.[01]": sources["run/step-100"], "model.*.1": sources["run/step-200"]})
    assert said == (
        "the recipe takes the weight of model.layers.1 from run/step-100 and run/step-200; name the layer itself to "
        "say which."
    )


def test_moments_where_there_are_none(sources: Sources) -> None:
    said = sources.refused(layers={L1: sources["bare"]})
    assert said == (
        "bare has no exp_avg of model.layers.1: take the weights alone from there (kinds: [weight]), or drop the "
        "optimizer (optimizer: drop)."
    )
    assert (
        value(sources.merged(layers={L1: {"from": sources["bare"], "kinds": ["weight"]}}), f"model.{L1}.norm.weight")
        .eq(1)
        .all()
    )
    assert value(sources.merged(layers={L1: sources["bare"]}, optimizer="drop"), f"model.{L1}.norm.weight").eq(1).all()


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"layers": {L1: {"from": "@bare", "kinds": ["exp_avg"]}}}, "bare has no exp_avg of model.layers.1, which is"),
        (
            {"layers": {L1: {"from": "@run/step-100", "kinds": ["exp_avgg"]}}},
            "step-100 has no exp_avgg of model.layers.1",
        ),
        ({"layers": {L1: "@sgd"}}, "sgd has momentum_buffer of model.layers.1.mlp.weight, which run/step-300 has not."),
        (
            {"base": "@bare", "layers": {L1: "@run/step-100"}},
            "bare has no optimizer state, so model.embed_tokens would",
        ),
        ({"optimizer": "@bare"}, "bare has no optimizer state that could be taken"),
        ({"optimizer": "@sgd"}, "sgd has momentum_buffer of model.embed_tokens.weight, which run/"),
        ({"optimizer": "average"}, "optimizer: average has no meaning"),
        (
            {"optimizer": "drop", "layers": {L1: {"from": "@run/step-100", "kinds": ["exp_avg"]}}},
            "takes exp_avg of some",
        ),
        ({"base": "@bare", "optimizer": "@run/step-100"}, "bare, from which the param groups come, does not know"),
        ({"layers": {L1: "@narrow"}}, "has the shape (4, 2), and model.layers.1.mlp.weight in run/step-300 has (4, 3)"),
        ({"rename": {"model.norm": "lm_head"}}, "has the shape (3,), and lm_head.weight in run/step-300 has (6, 3)"),
        (
            {"layers": {L1: {"from": "@extra", "kinds": "weight"}}},
            "extra has weight of model.layers.1.extra, which run/",
        ),
        (
            {"layers": {L1: {"from": "@lacking", "kinds": "weight"}}},
            "lacking has no weight of model.layers.1.norm.weight, which model.layers.1 has in run/step-300",
        ),
        (
            {"layers": {"model.layers.3": "@deeper@150"}},
            "does not know model.layers.3.mlp.weight with its exp_avg from deeper@150",
        ),
        (
            {"layers": {"model.layers.3": {"from": "@deeper@150", "kinds": "weight"}}},
            "run/step-300 has no layer model.layers.3, which model.layers.3 shall be filled with (exp_avg)",
        ),
        (
            {"layers": {"model.layers.3": {"from": "@deeper@150", "kinds": ["exp_avg", "exp_avg_sq"]}}},
            "run/step-300 has no layer model.layers.3, which model.layers.3 shall be filled with (weight)",
        ),
        (
            {"rename": {"model.layers.4": "model.layers.1"}, "layers": {L0: "@deeper@150"}},
            "has no layer model.layers.4",
        ),
        ({"rename": {"model.layers.4": "model.layers.1"}}, "renames model.layers.4, which is no layer; did you mean"),
        ({"layers": {L1: "@numbered"}}, "numbered keeps its optimizer's state under numbers"),
        ({"base": "@numbered", "rename": {L1: L2}}, "save it by names (TrainState"),
        ({"base": "@numbered", "drop": [L2]}, "numbered keeps its optimizer's state under numbers"),
        (
            {"base": "@numbered", "layers": {"model.layers.3": {"from": "@deep-bare", "kinds": "weight"}}},
            "numbered keeps its optimizer's state under numbers",
        ),
        ({"train": "@numbered"}, "numbered keeps its optimizer's state under numbers"),
        ({"base": "@numbered", "train": "@run/step-300"}, "numbered keeps its optimizer's state under numbers"),
        ({"base": "@numbered", "optimizer": "@run/step-300"}, "numbered keeps its optimizer's state under numbers"),
        ({"max_stale_steps": 150, "layers": {L1: "@run/step-100"}}, "200 steps older than the result's 300"),
        ({"max_stale_steps": 150, "layers": {L1: {"from": "@bare", "kinds": "weight"}}}, "bare does not tell the step"),
        ({"base": "@tied/step-200", "layers": {"lm_head": "@tied/step-100"}}, "share one storage, but come from"),
        ({"base": "@pair", "layers": {L1: "@bare"}}, "bare has no weight of model.layers.1.mlp.weight, which"),
        ({"base": "@run/step-900"}, "run/step-900 does not exist"),
        ({"base": "@run@900"}, "run has no checkpoint of step 900; it has 100, 200 or 300"),
        ({"base": "@ruin@300"}, "there is no run"),
        ({"base": "memory://bucket/run/step-300"}, "does not exist"),
    ],
)
def test_what_cannot_be_is_refused(sources: Sources, recipe: dict[str, Any], said: str) -> None:
    def named(what: Any) -> Any:
        if isinstance(what, dict):
            return {key: named(one) for key, one in what.items()}
        return sources[what[1:]] if isinstance(what, str) and what.startswith("@") else what

    assert said in sources.refused(**named(recipe))


def test_a_bound_that_is_held_is_no_reason_to_refuse(sources: Sources) -> None:
    out = sources.merged(layers={L1: sources["run/step-200"]}, max_stale_steps=100)
    assert value(out, f"optim.state.{L1}.mlp.weight.step") == 200


def test_layers_of_unequal_shape_may_move_where_a_stack_is_cut(sources: Sources, tmp_path: Path) -> None:
    """Then it is another model's, and its layers have the shapes of what fills them."""
    put(tmp_path / "a", {f"layers.{n}.w": torch.full((n + 1,), float(n)) for n in range(3)})
    renames = {"layers.1": "layers.0", "layers.2": "layers.1"}
    merge({"base": str(tmp_path / "a"), "rename": renames, "drop": ["layers.2"]}, tmp_path / "cut")
    assert value(tmp_path / "cut", "model.layers.1.w").tolist() == [2, 2, 2]
    with pytest.raises(RecipeError, match="only layers of one shape"):
        merge({"base": str(tmp_path / "a"), "rename": {"layers.1": "layers.0"}}, tmp_path / "same")


def test_a_mixture_of_dtypes_is_told(sources: Sources, tmp_path: Path) -> None:
    put(tmp_path / "bf16", {name: one.bfloat16() for name, one in weights().items()})
    recipe = {"base": sources["bare"], "layers": {L1: str(tmp_path / "bf16")}}
    assert "float32 from" in merge(recipe, tmp_path / "out").notes[0]
