"""Laws 1 and 3, as properties: any sequence of saves, any policy, any number of ranks, every way to save and load."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fleet import Fleet
from tests.support.saving import LEFT, Trouble, Way
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
    "drift:threshold=1e-06,max_stale=2": (0, 0),
    "drift:threshold=1e9,max_stale=2": (2, 2),
    "budget:fraction=0.4,max_stale=3,first=weights": (0, 3),
    # Every value changes in every step, of frozen parameters too.
    "unchanged+full": (0, 0),
    "unchanged+parity:groups=3": (2, 2),
    "unchanged+moments:every=3,weights=bf16": (0, 2),
}
UNTRAINED = ".(untrained)"
SAVE, LOAD = "tests.support.saving:save", "tests.support.saving:load"
NOW, THREAD, PROCESS = Way(), Way("thread"), Way("process")


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


def check(saved: Saved, loaded: dict[str, Any], record: dict[str, Any]) -> dict[str, int]:
    """Everything has the value of its unit's origin, an ancestor not too long ago; return each key's origin."""
    found: dict[str, int] = {}
    origins: dict[tuple[str, str], set[int]] = {}
    for key, (param, kind) in keys(saved.model).items():
        found[key] = origin(key, loaded[key], param, kind, saved)
        origins.setdefault(unit_of(saved, param, kind), set()).add(found[key])
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
    return found


class History:
    """Drives real processes through a run and remembers what it must have become."""

    def __init__(self, run: Path, fleet: Fleet, stock: Fleet) -> None:
        self.run, self.fleet, self.stock = run, fleet, stock
        self.saves: list[Saved] = []
        self.current: Saved | None = None
        self.clock = 0
        fleet.call("tests.support.world:forget")

    @property
    def alive(self) -> list[Saved]:
        """The checkpoints whose folders are still there."""
        return [saved for saved in self.saves if saved.path.exists()]

    def save(self, model: Model, policy: str, ranks: int, way: Way, **options: Any) -> None:
        path = self._tick()
        self.fleet.call(SAVE, model, self.clock, str(path), policy, way, ranks=ranks, **options)
        before = self.current.lineage if self.current else []
        saved = Saved(path, self.clock, model, policy, [*before, self.clock])
        self.saves.append(saved)
        self.current = saved

    def fail(self, model: Model, policy: str, ranks: int, way: Way, onto: Saved | None, **options: Any) -> None:
        """Try a save that fails, into a folder of its own or onto a checkpoint; what is known stays as it is."""
        path = self._tick() if onto is None else onto.path
        said = self.fleet.call(SAVE, model, self.clock, str(path), policy, way, ranks=ranks, **options)
        assert all("failed as it was told to" in words for words in said), said
        assert (path / ".metadata").exists() == (onto is not None)

    def _tick(self) -> Path:
        self.clock += 10
        return self.run / f"step-{self.clock}"

    def go_back(self, to: Saved, ranks: int, how: str) -> None:
        """Load a checkpoint by torch alone or by our planner, or a single layer of it, which descends from nothing."""
        if how == "stock":
            self.fleet.call("tests.support.world:load", to.model, str(to.path), ranks=ranks)
        else:
            options = {"layers": sorted(layers_of(to))[:1]} if how == "a layer" else {}
            self.fleet.call(LOAD, to.model, str(to.path), ranks=ranks, **options)
        # Ranks that take no part must not remember what was abandoned, as a new process would not.
        self.current = None if how == "a layer" else to

    def check_all(self, tmp: Path, ranks: int) -> dict[int, dict[str, int]]:
        """Hold everything to the law, loaded by torch alone; return each checkpoint's origins by its step."""
        origins = {}
        for saved in self.alive:
            record = self.stock.one("tests.support.world:record", str(saved.path))
            for loaded in self.stock.call("tests.support.world:load", saved.model, str(saved.path), ranks=ranks):
                origins[saved.step] = check(saved, loaded, record)
        newest = self.saves[-1]
        if newest.path.exists():
            record = self.stock.one("tests.support.world:record", str(newest.path))
            converted = self.stock.one("tests.support.world:through_torch_save", str(newest.path), str(tmp / "all.pt"))
            check(newest, converted, record)
        return origins

    def check_choice(self, choice: Choice, origins: dict[int, dict[str, int]], ranks: int) -> None:
        """Layers that our planner loads, each from its step, are what the law says; all else is left alone."""
        saved, bare = choice.saved, Model(choice.saved.model.params)
        options = {"layers": choice.layers, "steps": {layer: at.step for layer, at in choice.steps.items()}}
        for loaded in self.fleet.call(LOAD, bare, str(saved.path), ranks=ranks, **options):
            for layer, held in layers_of(saved).items():
                source = choice.steps.get(layer, saved)
                for key, (param, kind) in held.items():
                    if choice.layers is None or layer in choice.layers:
                        assert origin(key, loaded[key], param, kind, source) == origins[source.step][key], key
                    else:
                        assert torch.equal(loaded[key], full_value(key, param, kind, LEFT)), key
            rest = saved.step if choice.layers is None else LEFT
            assert loaded["lr"] == float(rest)
            assert loaded["train.step"] == rest
            assert (loaded["train.rng"] == rest % 251).all()


@dataclass
class Choice:
    """Layers of a checkpoint, None for all, and the checkpoints that some of them come from instead."""

    saved: Saved
    layers: list[str] | None
    steps: dict[str, Saved]


def layers_of(saved: Saved) -> dict[str, dict[str, tuple[Param, str]]]:
    """Return a checkpoint's tensors by their layers, the names of a tie each in the layer that its own name tells."""
    untied = replace(saved, model=Model(saved.model.params))
    found: dict[str, dict[str, tuple[Param, str]]] = {}
    for key, (param, kind) in keys(saved.model).items():
        found.setdefault(unit_of(untied, param, kind)[0], {})[key] = (param, kind)
    return found


@st.composite
def choices(draw: st.DrawFn, alive: list[Saved]) -> Choice:
    """Return what to load of a run: some layers of one checkpoint, some of these as they are in another."""
    saved = draw(st.sampled_from(alive))
    held = layers_of(saved)
    some = st.lists(st.sampled_from(sorted(held)), min_size=1, unique=True)
    layers = draw(st.one_of(st.none(), some))
    steps = {}
    for layer in sorted(held) if layers is None else layers:
        alike = [s for s in alive if all(keys(s.model).get(key) == what for key, what in held[layer].items())]
        if draw(st.booleans()):
            steps[layer] = draw(st.sampled_from(alike))
    return Choice(saved, layers, steps)


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


def live_through(data: st.DataObject, root: Path, fleet: Fleet, stock_fleet: Fleet, ways: list[Way]) -> None:
    """Save, fail, go back, delete and change as drawn, then hold every checkpoint that is left to the laws."""
    model = data.draw(models())
    policy = data.draw(st.sampled_from(sorted(POLICIES)))
    options = {
        "writer": data.draw(st.sampled_from(["stock", "layerwise"])),
        "full_every": data.draw(st.sampled_from([None, None, 3])),
        "carry": data.draw(st.sampled_from(["link", "link", "reference", "copy"])),
    }
    history = History(root / "run", fleet, stock_fleet)

    def drawn_way(ranks: int) -> tuple[int, Way]:
        way = data.draw(st.sampled_from(ways), label="way")
        # The processes that save in the background are as many as there are workers.
        return (fleet.size if way.executor == "process" else ranks), way

    for _ in range(data.draw(st.integers(2, 6), label="saves")):
        actions = ["go on", "go on", "go on", "go back", "delete", "change", "fail"]
        action = data.draw(st.sampled_from(actions), label="action")
        ranks = data.draw(st.integers(1, fleet.size), label="ranks")
        alive = history.alive
        if action == "go back" and alive:
            how = data.draw(st.sampled_from(["stock", "stock", "planner", "a layer"]), label="how")
            history.go_back(data.draw(st.sampled_from(alive), label="to"), ranks, how)
        elif action == "delete" and len(alive) > 1 and options["carry"] != "reference":
            victim = data.draw(st.sampled_from([s for s in alive if s is not history.current]), label="victim")
            shutil.rmtree(victim.path)
        elif action == "change":
            model = data.draw(changes(model))
        elif action == "fail":
            failing, way = drawn_way(ranks)
            moment = data.draw(st.sampled_from(["writing", "written", "commit"]), label="moment")
            trouble = Trouble(moment, data.draw(st.integers(0, failing - 1), label="failing rank"))
            onto = data.draw(st.sampled_from([None, None, *alive]), label="onto")
            history.fail(model, policy, failing, way, onto, trouble=trouble, **options)
        saving, way = drawn_way(ranks)
        history.save(model, policy, saving, way, **options)
    origins = history.check_all(root, data.draw(st.integers(1, 2), label="loading ranks"))
    for _ in range(2):
        choice = data.draw(choices(history.alive), label="choice")
        history.check_choice(choice, origins, data.draw(st.integers(1, fleet.size), label="choosing ranks"))


@given(data=st.data())
def test_every_checkpoint_holds_each_unit_as_it_was_at_its_origin(
    data: st.DataObject, fresh: Any, fleet: Fleet, stock_fleet: Fleet
) -> None:
    """Changing ranks and models, rollbacks, failures, deleted folders: laws 1 and 3 hold for what is left."""
    live_through(data, fresh(), fleet, stock_fleet, [NOW, NOW, THREAD, THREAD._replace(staged=True)])


@pytest.fixture(scope="module")
def daemons() -> Iterator[Fleet]:
    """Two processes, each of which starts one more in its first save by the process executor, and keeps it."""
    workers = Fleet(2)
    yield workers
    workers.call("tests.support.saving:stop_daemon")
    workers.close()


@settings(max_examples=max(1, settings().max_examples // 4))
@given(data=st.data())
def test_processes_that_save_in_the_background_obey_the_same_laws(
    data: st.DataObject, fresh: Any, daemons: Fleet, stock_fleet: Fleet
) -> None:
    """What they save and fail to save, between saves of other ways: laws 1 and 3 hold for what is left."""
    staged = PROCESS._replace(staged=True)
    live_through(data, fresh(), daemons, stock_fleet, [PROCESS, staged, PROCESS, staged, NOW, THREAD])
