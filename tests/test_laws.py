"""Laws 1 and 3, as properties: any sequence of saves, any policy, any number of ranks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fleet import Fleet
from tests.support.world import Model, Param, full_value, keys

POLICIES = {
    # policy: the most saves that a unit of each kind may lie back
    "full": (0, 0),
    "parity": (1, 1),
    "parity:groups=3": (2, 2),
    "filter:head=1,tail=1,every=3": (2, 2),
    "filter:head=0,tail=1,every=2,aux=rest": (1, 1),
    "moments:every=3": (0, 2),
    "moments:every=2,weights=bf16,moments=bf16": (0, 1),
    "parity|filter:head=1,tail=0,every=4": (1, 1),
    # Every value changes in every step, of frozen parameters too.
    "unchanged+full": (0, 0),
    "unchanged+parity:groups=3": (2, 2),
    "unchanged+moments:every=3,weights=bf16": (0, 2),
}
UNTRAINED = ".(untrained)"


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Return a small transformer-like model; some parameters sharded, replicated, frozen, tied, or odd."""
    spread = st.sampled_from(["plain", "shard", "shard", "replicate"])
    wide = st.sampled_from([(4, 3), (1, 2), (7,), (5, 2, 2), (3, 4)])
    params = [Param("model.embed_tokens.weight", (6, 2), draw(spread))]
    for i in range(draw(st.integers(1, 4))):
        params.append(Param(f"model.layers.{i}.attn.weight", draw(wide), draw(spread)))
        params.append(Param(f"model.layers.{i}.mlp.weight", draw(wide), draw(spread), draw(st.booleans())))
    params.append(Param("model.norm.weight", (3,), draw(spread)))
    params.append(Param("model.norm.count", (), trained=False, dtype="int64"))
    tied = draw(st.booleans())
    if tied:
        params.append(replace(params[0], fqn="lm_head.weight", trained=False))
    else:
        params.append(Param("lm_head.weight", (6, 2), draw(spread), dtype="bfloat16"))
    return Model(tuple(params), (("model.embed_tokens.weight", "lm_head.weight"),) if tied else ())


@st.composite
def changes(draw: st.DrawFn, model: Model) -> Model:
    """Return the model with a parameter added, removed, reshaped or retyped."""
    blocks = [p for p in model.params if ".layers." in p.fqn]
    victim = draw(st.sampled_from(blocks))
    how = draw(st.sampled_from(["add", "remove", "reshape", "retype"]))
    if how == "add":
        new = Param(f"model.layers.{len(blocks)}.extra.weight", (3, 2), draw(st.sampled_from(["plain", "shard"])))
        return replace(model, params=(*model.without(new.fqn).params, new))
    if how == "remove":
        return model.without(victim.fqn) if len(blocks) > 1 else model
    changed = replace(victim, shape=(9, 2)) if how == "reshape" else replace(victim, dtype="bfloat16")
    return replace(model, params=tuple(changed if p is victim else p for p in model.params))


@dataclass
class Saved:
    """A checkpoint as this test remembers it: what it may hold, told by nobody else."""

    path: Path
    step: int
    model: Model
    policy: str
    lineage: list[int] = field(default_factory=list)  # steps of the saves it descends from, itself last


def unit_of(saved: Saved, param: Param, kind: str) -> tuple[str, str]:
    """Return layer and kind by this test's own rule; the tied head is one with the embeddings."""
    model, layer = saved.model, layer_of(saved.model, param)
    alone = param.trained or is_tied(model, param) or not saved.policy.startswith("unchanged+")
    split = not alone and any(p.trained and layer_of(model, p) == layer for p in model.params)
    return layer + UNTRAINED * split, kind


def layer_of(model: Model, param: Param) -> str:
    parts = next((a for a, b in model.ties if param.fqn == b), param.fqn).split(".")
    return ".".join(parts[:3] if parts[1] == "layers" else parts[:-1])


def is_tied(model: Model, param: Param) -> bool:
    return any(param.fqn == b for _, b in model.ties)


def origin(key: str, loaded: torch.Tensor, param: Param, kind: str, saved: Saved) -> int:
    """Tell from a tensor's value the step at which it was saved, bit for bit."""
    name = next((f"model.{a}" for a, b in saved.model.ties if key == f"model.{b}"), key)
    for step in reversed(saved.lineage):
        for stored in (None, torch.bfloat16):
            want = full_value(name, param, kind, step)
            want = want if stored is None or not want.is_floating_point() else want.to(stored).to(want.dtype)
            if torch.equal(loaded, want):
                return step
    raise AssertionError(f"{key} in {saved.path} has a value of none of the steps {saved.lineage}")


def check(saved: Saved, loaded: dict[str, Any], record: dict[str, Any]) -> None:
    """Everything in a checkpoint has the value of its unit's origin, an ancestor not too long ago."""
    origins: dict[tuple[str, str], set[int]] = {}
    for key, (param, kind) in keys(saved.model).items():
        unit = unit_of(saved, param, kind)
        if param.shape == () and kind == "weight" and not param.dtype.startswith("float"):
            unit = (unit[0], "weight")
        origins.setdefault(unit, set()).add(origin(key, loaded[key], param, kind, saved))
    told = {
        (layer, kind): record["origins"][number][1]
        for layer, kinds in record["units"].items()
        for kind, (number, _) in kinds.items()
    }
    for (layer, kind), steps in origins.items():
        assert len(steps) == 1, f"{layer}/{kind} is torn between steps {steps}"
        assert told[layer, kind] in steps, "the record tells another origin than the bytes"
        back = len(saved.lineage) - 1 - saved.lineage.index(min(steps))
        bound = POLICIES[saved.policy][0 if kind == "weight" else 1]
        assert back <= bound, f"{layer}/{kind} lies {back} saves back under {saved.policy}"
    for layer in {layer for layer, kind in origins if kind == "step"}:
        assert origins[layer, "step"] <= origins[layer, "exp_avg"] | origins[layer, "exp_avg_sq"]
    assert loaded["lr"] == float(saved.step)
    assert loaded["train.step"] == saved.step
    assert (loaded["train.rng"] == saved.step % 251).all()


class History:
    """Drives real processes through a run and remembers what it must have become."""

    def __init__(self, run: Path, fleet: Fleet, stock: Fleet) -> None:
        self.run, self.fleet, self.stock = run, fleet, stock
        self.saves: list[Saved] = []
        self.current: Saved | None = None
        self.clock = 0
        fleet.call("tests.support.world:forget")

    def save(self, model: Model, policy: str, ranks: int, how: dict[str, Any], **options: Any) -> None:
        self.clock += 10
        path = self.run / f"step-{self.clock}"
        function = "tests.support.world:async_save" if "staged" in how else "tests.support.world:save"
        self.fleet.call(function, model, self.clock, str(path), policy, ranks=ranks, **how, **options)
        before = self.current.lineage if self.current else []
        saved = Saved(path, self.clock, model, policy, [*before, self.clock])
        self.saves.append(saved)
        self.current = saved

    def go_back(self, to: Saved, ranks: int) -> None:
        self.fleet.call("tests.support.world:load", to.model, str(to.path), ranks=ranks)
        # Ranks that take no part must not remember what was abandoned, as a new process would not.
        self.current = to

    def check_all(self, tmp: Path, ranks: int) -> None:
        for saved in self.saves:
            if not saved.path.exists():
                continue
            record = self.stock.one("tests.support.world:record", str(saved.path))
            for loaded in self.stock.call("tests.support.world:load", saved.model, str(saved.path), ranks=ranks):
                check(saved, loaded, record)
        newest = self.saves[-1]
        if newest.path.exists():
            record = self.stock.one("tests.support.world:record", str(newest.path))
            converted = self.stock.one("tests.support.world:through_torch_save", str(newest.path), str(tmp / "all.pt"))
            check(newest, converted, record)


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Any]:
    """Return a maker of empty folders: one for each example that Hypothesis tries."""
    count = iter(range(10**6))

    def make() -> Path:
        path = tmp_path / f"example{next(count)}"
        path.mkdir()
        return path

    yield make
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_stock_processes_cannot_import_us(stock_fleet: Fleet) -> None:
    """What the stock fleet loads, it loads without this package."""
    assert stock_fleet.call("tests.support.world:can_import_tailor") == [False, False]


@given(data=st.data())
def test_every_checkpoint_holds_each_unit_as_it_was_at_its_origin(
    data: st.DataObject, fresh: Any, fleet: Fleet, stock_fleet: Fleet
) -> None:
    """Changing ranks and models, rollbacks, deleted folders, every way to save: laws 1 and 3 hold for what is left."""
    root = fresh()
    model = data.draw(models())
    policy = data.draw(st.sampled_from(sorted(POLICIES)))
    writer = data.draw(st.sampled_from(["stock", "layerwise"]))
    full_every = data.draw(st.sampled_from([None, None, 3]))
    carry = data.draw(st.sampled_from(["link", "link", "reference", "copy"]))
    ways = st.sampled_from([{}, {}, {"staged": False}, {"staged": True}])
    history = History(root / "run", fleet, stock_fleet)
    for _ in range(data.draw(st.integers(2, 6), label="saves")):
        actions = ["go on", "go on", "go on", "go back", "delete", "change"]
        action = data.draw(st.sampled_from(actions), label="action")
        ranks = data.draw(st.integers(1, 4), label="ranks")
        alive = [s for s in history.saves if s.path.exists()]
        if action == "go back" and alive:
            history.go_back(data.draw(st.sampled_from(alive), label="to"), ranks)
        elif action == "delete" and len(alive) > 1 and carry != "reference":
            victim = data.draw(st.sampled_from([s for s in alive if s is not history.current]), label="victim")
            shutil.rmtree(victim.path)
        elif action == "change":
            model = data.draw(changes(model))
        how = data.draw(ways, label="how")
        history.save(model, policy, ranks, how, writer=writer, full_every=full_every, carry=carry)
    history.check_all(root, data.draw(st.integers(1, 2), label="loading ranks"))
