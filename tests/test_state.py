"""``TrainState``: what it saves, that nothing of it is lost, and that it knows what it descends from."""

from __future__ import annotations

import itertools
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, RAdam, RMSprop, lr_scheduler

from tailor_dcp import LayerwisePlanner, TailorError, TailorWarning, TrainState, forget, inspect, rank_state
from tests.support.fleet import Fleet
from tests.support.training import (
    MODELS,
    RESERVED,
    WRAPPINGS,
    Loaded,
    Loader,
    Net,
    Outcome,
    Resumed,
    Training,
    draws,
    origin_steps,
    seed,
)

ROOT = Path(__file__).parents[1]
WORKER = "tests.support.training"


def save(state: dict[str, Any], path: Path, policy: Any = "parity") -> None:
    dcp.save(state, checkpoint_id=path, planner=LayerwisePlanner(policy))


def load(state: dict[str, Any], path: Path) -> None:
    dcp.load(state, checkpoint_id=path)


def warned(act: Callable[[], Any]) -> list[str]:
    """Return what this package warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(w.message) for w in caught if w.category is TailorWarning]


def stored(path: Path) -> set[str]:
    return set(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)


# Real trainings, wrapped in every way -------------------------------------------------------


@pytest.fixture(scope="module", params=itertools.product(WRAPPINGS, MODELS), ids="-".join)
def resumed(request: pytest.FixtureRequest, fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> list[Resumed]:
    """Two ranks with data of their own that trained, saved, resumed and went back."""
    wrapping, model = request.param
    path = tmp_path_factory.mktemp("run") / "step-3"
    return fleet.call(f"{WORKER}:resume", wrapping, model, str(path), ranks=2)


def same(a: Outcome, b: Outcome) -> bool:
    weights = all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights | b.weights)
    return weights and a._replace(weights={}) == b._replace(weights={})


def test_a_resumed_training_goes_on_bit_for_bit(resumed: list[Resumed]) -> None:
    """Losses, weights, rates and random numbers of every rank, from other weights and another seed on."""
    for rank in resumed:
        assert len(rank.expected.losses) == 3
        assert same(rank.resumed, rank.expected)
        assert same(rank.gone_back, rank.expected)
    first, second = (rank.expected for rank in resumed)
    assert first.losses != second.losses, "the ranks must differ, or nothing is shown"
    assert not {*first.draws} & {*second.draws}


def test_keys_are_those_that_torchs_get_state_dict_flattens_to(resumed: list[Resumed]) -> None:
    """And everything else lies below train., each rank's own values in one entry."""
    for rank in resumed:
        rest = rank.keys - rank.stock_keys
        assert rank.keys >= rank.stock_keys
        assert rest >= RESERVED | {"train.step", "train.dataloader", "train.scheduler.last_epoch"}
        assert {key.split(".")[0] for key in rest} == {"train"}
        assert {key.split(".")[0] for key in rank.stock_keys} == {"model", "optim"}
        assert {"optim.param_groups.0.lr", "optim.param_groups.0.params"} <= rank.stock_keys


def test_keys_name_model_optimizer_state_and_groups(tmp_path: Path) -> None:
    """Exactly model.<fqn>, optim.state.<fqn>.<kind> and optim.param_groups.<i>.<name>."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    save(TrainState(model, SGD(model.parameters(), 0.1, momentum=0.9)), tmp_path / "step-1")
    groups = {key for key in stored(tmp_path / "step-1") if key.startswith("optim.param_groups.0.")}
    assert stored(tmp_path / "step-1") - groups == {
        "model.0.weight",
        "optim.state.0.weight.momentum_buffer",
        "train.rng",
        "train.token",
    }


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_run_that_went_back_carries_nothing_of_what_it_abandoned(wrapping: str, fleet: Fleet, tmp_path: Path) -> None:
    """Back at step 100, steps 120 and 200 lie beside, saved by these very processes."""
    assert fleet.call(f"{WORKER}:keep_training", wrapping, str(tmp_path), ranks=2) == [[100, 140]] * 2


@pytest.mark.parametrize(
    ("source", "before", "target", "after"),
    [("fsdp1", 2, "fsdp2", 3), ("fsdp2", 2, "plain", 1), ("ddp", 2, "fsdp1", 3), ("plain", 1, "fsdp2", 2)],
)
def test_what_one_wrapping_saved_another_loads(
    source: str, before: int, target: str, after: int, fleet: Fleet, tmp_path: Path
) -> None:
    """At another number of ranks too: every weight, moment and hyper-parameter is the same."""
    fleet.call(f"{WORKER}:train_and_save", source, str(tmp_path / "step-1"), ranks=before)
    fleet.call(f"{WORKER}:load_and_save", target, str(tmp_path / "step-1"), str(tmp_path / "step-2"), ranks=after)
    first, second = (contents(tmp_path / name) for name in ("step-1", "step-2"))
    assert len(first) > 60
    assert [key for key in first | second if not rank_state.same(first.get(key), second.get(key))] == []


def contents(path: Path) -> dict[str, Any]:
    """Return the weights and the optimizer's state of a checkpoint, whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        everything = flatten_state_dict(_load_state_dict_from_keys(checkpoint_id=path))[0]
    return {key: value for key, value in everything.items() if not key.startswith("train.")}


# Another number of ranks --------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 4), (1, 2), (2, 2)])
@pytest.mark.parametrize("together", [True, False], ids=["loaders together", "loaders apart"])
def test_at_another_number_of_ranks_what_happens_is_defined_and_said_once(
    before: int, after: int, together: bool, fleet: Fleet, tmp_path: Path
) -> None:
    """Old ranks keep their generators, new ones get others; a loader's position is kept if all had the same."""
    path = str(tmp_path / "step-1")
    saved = fleet.call(f"{WORKER}:save_ranks", path, together, ranks=before)
    ranks: list[Loaded] = fleet.call(f"{WORKER}:load_ranks", path, ranks=after)
    kept = min(before, after)
    assert [rank.draws for rank in ranks[:kept]] == saved[:kept]
    numbers = [number for rank in [*saved, *(r.draws for r in ranks[kept:])] for drawn in rank for number in drawn]
    assert len(set(numbers)) == len(numbers), "no two ranks draw the same numbers"
    alike = together or before == 1
    positions = [7 + rank if before == after and not together else 7 * alike for rank in range(after)]
    assert [rank.position for rank in ranks] == positions
    said = [len(rank.warnings) for rank in ranks]
    assert said == [int(before != after), *[0] * (after - 1)]
    if before != after:
        assert f"saved by {before} ranks and loaded by {after}" in ranks[0].warnings[0]
        assert ("position differs" in ranks[0].warnings[0]) is not alike
        again: list[Loaded] = fleet.call(f"{WORKER}:load_ranks", path, ranks=after)
        assert [rank.draws for rank in again] == [rank.draws for rank in ranks]


# Scheduler, data loader, extra --------------------------------------------------------------


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "milestones": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.5, 20),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "a partial": lambda o: lr_scheduler.LambdaLR(o, partial(pow, 0.5)),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_goes_on_where_it_was(make: Callable[[Any], Any], tmp_path: Path) -> None:
    """Whatever its state is made of."""

    def begin() -> tuple[TrainState, Any, Any]:
        model = nn.Linear(2, 2)
        optimizer = AdamW(model.parameters(), lr=0.1)
        scheduler = make(optimizer)
        return TrainState(model, optimizer, scheduler), optimizer, scheduler

    def rates(optimizer: Any, scheduler: Any) -> list[float]:
        seen = []
        for _ in range(4):
            optimizer.step()
            scheduler.step(*[1.0] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
            seen.append(optimizer.param_groups[0]["lr"])
        return seen

    state, *first = begin()
    rates(*first)
    save(state, tmp_path / "step-1")
    expected = rates(*first)
    again, *second = begin()
    load(again, tmp_path / "step-1")
    assert second[1].state_dict().keys() == first[1].state_dict().keys()
    save(again, tmp_path / "step-2")
    load(again, tmp_path / "step-2")
    assert rates(*second) == expected


def some_model() -> tuple[nn.Module, AdamW]:
    model = nn.Linear(2, 2)
    return model, AdamW(model.parameters())


class Counter:
    """Something with a state."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


def test_extra_values_are_restored_in_place(tmp_path: Path) -> None:
    """Numbers, tensors, nested dicts, lists that grew; what has a state takes it over itself."""
    grown = [(1, 0.5), (2, 0.25)]
    filled = {
        "step": 7,
        "best": {"loss": 0.5, "at": {"step": 3}},
        "mean": torch.arange(3.0),
        "history": grown,
        "losses": {0: 0.5, 1: 0.25, None: [{2: 3}]},
        "scaler": Counter(5),
        "average": nn.Linear(2, 2),
    }
    save(TrainState(*some_model(), extra=filled), tmp_path / "step-1")
    assert {"train.step", "train.best.at.step", "train.mean", "train.scaler.count"} <= stored(tmp_path / "step-1")

    counter, average, inner = Counter(), nn.Linear(2, 2), {"loss": 9.0, "at": {"step": 0}}
    empty = {"step": 0, "best": inner, "mean": torch.zeros(3), "history": [], "scaler": counter, "average": average}
    empty["losses"] = {0: 0.0, 1: 0.0, None: [{2: 0}]}
    assert warned(lambda: load(TrainState(*some_model(), extra=empty), tmp_path / "step-1")) == []
    assert empty["losses"] == filled["losses"]
    assert (empty["step"], empty["history"], counter.count) == (7, grown, 5)
    assert empty["scaler"] is counter
    assert empty["average"] is average
    assert torch.equal(average.weight, filled["average"].weight)
    assert inner == {"loss": 0.5, "at": {"step": 3}}
    assert torch.equal(empty["mean"], torch.arange(3.0))


def test_extra_may_be_something_with_a_state(tmp_path: Path) -> None:
    """Its entries lie below train. too."""
    save(TrainState(*some_model(), extra=Counter(5)), tmp_path / "step-1")
    counter = Counter()
    load(TrainState(*some_model(), extra=counter), tmp_path / "step-1")
    assert counter.count == 5
    assert "train.count" in stored(tmp_path / "step-1")


@pytest.mark.parametrize("name", ["scheduler", "dataloader", "rng", "token"])
def test_names_that_are_taken_are_refused(name: str) -> None:
    """At once, in one sentence."""
    with pytest.raises(TailorError) as caught:
        TrainState(*some_model(), extra={name: 1})
    assert (
        str(caught.value) == f"extra= holds the name {name!r}, which TrainState itself keeps under train.; rename it."
    )


def test_names_that_a_state_gives_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    """They are not known earlier."""
    extra = Counter()
    extra.state_dict = lambda: {"rng": 1}  # type: ignore[method-assign]
    with pytest.raises(TailorError, match="extra= holds the name 'rng'"):
        save(TrainState(*some_model(), extra=extra), tmp_path / "step-1")
    assert not (tmp_path / "step-1" / ".metadata").exists()


@pytest.mark.parametrize("name", ["scheduler", "dataloader", "extra"])
def test_what_has_no_state_is_refused(name: str) -> None:
    """A plain DataLoader, for example: at once, not at the first save."""
    with pytest.raises(TailorError, match=rf"^{name}= is a range, which has no state_dict\(\)"):
        TrainState(*some_model(), **{name: range(3)})


class Odd(Loader):
    """A data loader with a class of its own in its state."""

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "counter": Counter(1)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert isinstance(state_dict["counter"], Counter)


def test_an_unknown_class_in_a_data_loaders_state_is_named(tmp_path: Path) -> None:
    """One sentence says what to do; then it loads."""
    save(TrainState(*some_model(), dataloader=Odd()), tmp_path / "step-1")
    with pytest.raises(TailorError) as caught:
        load(TrainState(*some_model(), dataloader=Odd()), tmp_path / "step-1")
    assert str(caught.value).startswith("train.dataloader of the checkpoint holds a tests.test_state.Counter, a class")
    assert "\n" not in str(caught.value)
    with torch.serialization.safe_globals([Counter]):
        load(TrainState(*some_model(), dataloader=Odd()), tmp_path / "step-1")


def test_what_a_checkpoint_has_and_the_script_has_not_is_said(tmp_path: Path) -> None:
    """DCP alone would leave it out silently: an entry that only grew later, or one that was renamed."""
    save(TrainState(*some_model(), extra={"step": 1, "best": {"a": 1, "b": 2}}), tmp_path / "step-1")
    said = warned(lambda: load(TrainState(*some_model(), extra={"step": 0, "best": {}}), tmp_path / "step-1"))
    assert said == [
        f"Loading {tmp_path}/step-1: train.best.a (and 1 more) in it is not restored, "
        f"as the script has no place for it."
    ]


def test_a_checkpoint_of_another_tool_loads_without_generators(tmp_path: Path) -> None:
    """Converters know the weights, the optimizer and perhaps the step; the generators go on."""
    model, optimizer = some_model()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": moments, "train": {"step": 5}}, checkpoint_id=tmp_path / "step-5")
    progress, other = {"step": 0}, some_model()
    seed(3)
    expected = draws()
    seed(3)
    said = warned(lambda: load(TrainState(*other, extra=progress), tmp_path / "step-5"))
    assert said == [
        f"Loading {tmp_path}/step-5: it holds no random number generators, so they go on as the script seeded them."
    ]
    assert progress == {"step": 5}
    assert torch.equal(other[0].weight, model.weight)
    assert draws() == expected


# Optimizers ---------------------------------------------------------------------------------


class TwoHeads(nn.Module):
    """A trunk and two heads, of which a step trains one."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 3)
        self.heads = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])

    def train_step(self, optimizers: list[Any], head: int) -> None:
        self.heads[head](self.trunk(torch.rand(4, 3))).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def two_heads(number: int, make: Any) -> tuple[TwoHeads, Any, TrainState]:
    seed(number)
    model = TwoHeads()
    optimizer = make(model.parameters())
    return model, optimizer, TrainState(model, optimizer)


def equal_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


OPTIMIZERS = {
    "AdamW": lambda p: AdamW(p, 0.1),
    "AMSGrad": lambda p: Adam(p, 0.1, amsgrad=True),
    "SGD": lambda p: SGD(p, 0.1),
    "SGD with momentum": lambda p: SGD(p, 0.1, momentum=0.9),
    "RMSprop": lambda p: RMSprop(p, 0.1, momentum=0.5),
    "Adagrad": lambda p: Adagrad(p, 0.1),
    "Adadelta": lambda p: Adadelta(p, 0.1),
    "RAdam": lambda p: RAdam(p, 0.1),
    "a rate that is a tensor": lambda p: AdamW(p, torch.tensor(0.1)),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_saving_at_any_step_changes_nothing_and_loses_nothing(make: Any, steps: int, tmp_path: Path) -> None:
    """Before the first step too, and with a head that no step has trained yet."""
    runs = [two_heads(1, make) for _ in range(2)]
    for model, optimizer, state in runs:
        seed(1)
        for _ in range(steps):
            model.train_step([optimizer], 0)
        if state is runs[1][2]:
            before = {k: dict(v) for k, v in optimizer.state.items()}
            save(state, tmp_path / "step-0")
            assert {k: dict(v) for k, v in optimizer.state.items()} == before
    again = two_heads(2, make)
    load(again[2], tmp_path / "step-0")
    for model, optimizer, _ in [*runs, again]:
        seed(3)
        for head in (1, 0, 1):
            model.train_step([optimizer], head)
    assert equal_weights(runs[0][0], runs[1][0]), "a save changed what was trained after it"
    assert equal_weights(again[0], runs[0][0]), "a resume lost something"


def test_no_hook_of_an_optimizer_runs_when_it_is_saved(tmp_path: Path) -> None:
    """A hook may average weights or count steps."""
    model, optimizer, state = two_heads(1, lambda p: AdamW(p, 0.1))
    lr_scheduler.StepLR(optimizer, 1)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    save(state, tmp_path / "step-0")
    model.train_step([optimizer], 0)
    save(state, tmp_path / "step-1")
    assert calls == [1]


def test_several_optimizers_are_restored_each(tmp_path: Path) -> None:
    """Of different kinds, with groups of their own; any iterable of them will do."""

    def begin(number: int) -> tuple[TwoHeads, list[Any], TrainState]:
        seed(number)
        model = TwoHeads()
        trunk = AdamW([{"params": [model.trunk.weight], "lr": 0.1 * number}, {"params": [model.trunk.bias]}])
        heads = SGD(model.heads.parameters(), 0.2 * number, momentum=0.9)
        return model, [trunk, heads], TrainState(model, (o for o in (trunk, heads)))

    model, optimizers, state = begin(1)
    model.train_step(optimizers, 0)
    save(state, tmp_path / "step-1")
    keys = {key for key in stored(tmp_path / "step-1") if not key.startswith("train.")}
    weights, moments = get_state_dict(model, optimizers)
    # torch itself forgets the head that had no gradient yet
    assert keys - {*flatten_state_dict({"model": weights, "optim": moments})[0]} == {
        "optim.state.heads.1.bias.momentum_buffer",
        "optim.state.heads.1.weight.momentum_buffer",
    }
    assert {"optim.param_groups.2.momentum", "optim.state.trunk.bias.exp_avg"} <= keys
    other, others, again = begin(2)
    load(again, tmp_path / "step-1")
    for m, o in ((model, optimizers), (other, others)):
        seed(5)
        for head in (0, 1, 0):
            m.train_step(o, head)
    assert equal_weights(model, other)
    assert [o.param_groups[0]["lr"] for o in others] == [0.1, 0.2]


def test_frozen_parameters_have_no_optimizer_state_and_are_restored(tmp_path: Path) -> None:
    """Whether the optimizer was given them or not."""

    def begin(number: int) -> tuple[TwoHeads, Any, TrainState]:
        seed(number)
        model = TwoHeads()
        model.trunk.requires_grad_(False)
        optimizer = AdamW([*model.trunk.parameters(), *model.heads[0].parameters()], 0.1)
        return model, optimizer, TrainState(model, optimizer)

    model, optimizer, state = begin(1)
    model.train_step([optimizer], 0)
    save(state, tmp_path / "step-1")
    assert not any(key.startswith("optim.state.trunk") for key in stored(tmp_path / "step-1"))
    other, _, again = begin(2)
    load(again, tmp_path / "step-1")
    assert equal_weights(model, other)


# What the state descends from ---------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with steps 100 and 120; the latter carries from the former."""
    training = Training(1)
    for step in (100, 120):
        training.step()
        training.save(tmp_path / "run" / f"step-{step}")
    forget()
    return tmp_path / "run"


def resume_in_a_new_process(source: Path, target: Path) -> list[int]:
    command = [sys.executable, "-m", WORKER, str(source), str(target)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert b"TailorWarning" not in done.stderr
    return json.loads(done.stdout)


def test_the_first_save_of_a_new_process_is_selective(run: Path) -> None:
    """The token of the checkpoint says where it comes from."""
    assert resume_in_a_new_process(run / "step-120", run / "step-140") == [120, 140]


def test_the_first_save_is_selective_where_the_run_was_moved(run: Path, tmp_path: Path) -> None:
    """Copied to another place under another name, the old one removed."""
    shutil.copytree(run, tmp_path / "elsewhere" / "copy")
    shutil.rmtree(run)
    moved = tmp_path / "elsewhere" / "copy"
    assert resume_in_a_new_process(moved / "step-120", moved / "step-140") == [120, 140]


def test_a_single_checkpoint_may_be_moved_and_renamed(run: Path, tmp_path: Path) -> None:
    """Where it was loaded from counts, not where it was saved to."""
    shutil.copytree(run / "step-120", tmp_path / "new" / "step-7")
    shutil.rmtree(run)
    training = Training(2)
    training.load(tmp_path / "new" / "step-7")
    training.save(tmp_path / "new" / "step-8")
    assert inspect(tmp_path / "new" / "step-8").parent == "step-7"
    assert origin_steps(tmp_path / "new" / "step-8") == [8, 120]


def test_a_link_that_leads_elsewhere_later_is_followed_when_it_is_loaded(run: Path) -> None:
    """As `latest` does at every save."""
    (run / "latest").symlink_to("step-100")
    training = Training(2)
    training.load(run / "latest")
    (run / "latest").unlink()
    (run / "latest").symlink_to("step-120")
    training.save(run / "step-140")
    assert origin_steps(run / "step-140") == [100, 140]


def test_a_new_train_state_for_every_save_and_load_knows_the_past_of_its_model(tmp_path: Path) -> None:
    """The scripts of torch's documentation make a new one in every call."""
    model, optimizer = some_model()
    model = nn.Sequential(nn.Linear(2, 2), model)
    optimizer = AdamW(model.parameters())
    for step in (100, 120):
        save(TrainState(model, optimizer), tmp_path / f"step-{step}")
    assert origin_steps(tmp_path / "step-120") == [100, 120]
    load(TrainState(model, optimizer), tmp_path / "step-100")
    save(TrainState(model, optimizer), tmp_path / "step-140")
    assert origin_steps(tmp_path / "step-140") == [100, 140]


def test_another_models_load_changes_nothing_for_this_one(run: Path, tmp_path: Path) -> None:
    """A generator and a discriminator are resumed one after the other."""
    one, two = Training(2), Training(3)
    one.load(run / "step-120")
    two.load(run / "step-100")
    one.save(run / "step-140")
    two.save(tmp_path / "other" / "step-140")
    assert origin_steps(run / "step-140") == [120, 140]
    assert origin_steps(tmp_path / "other" / "step-140") == [100, 140]


@pytest.mark.parametrize("part", ["elsewhere", "here", "weights alone", "after another's"])
def test_after_a_load_that_it_took_no_part_in_everything_is_written_once(part: str, run: Path, tmp_path: Path) -> None:
    """It may have changed the training state, and nobody can tell."""
    training = Training(2)
    training.load(run / "step-120")
    if part == "elsewhere":
        shutil.copytree(run, tmp_path / "other")
        load({"model": Net().state_dict()}, tmp_path / "other" / "step-100")
    elif part == "here":
        load({"model": Net().state_dict()}, run / "step-100")
    elif part == "weights alone":
        load({"model": training.state["model"]}, run / "step-100")
    else:
        load({"model": Net().state_dict()}, run / "step-100")
        Training(3).load(run / "step-120")
    said = warned(lambda: training.save(run / "step-140"))
    assert len(said) == 1
    assert "DCP has loaded something other than this TrainState" in said[0]
    assert origin_steps(run / "step-140") == [140]
    assert warned(lambda: training.save(run / "step-160")) == []
    assert origin_steps(run / "step-160") == [140, 160]


def test_after_forget_everything_is_written_once(run: Path) -> None:
    """The user knows that the state descends from nothing any more."""
    training = Training(2)
    training.load(run / "step-120")
    forget()
    with pytest.warns(TailorWarning, match=r"forget\(\) was called"):
        training.save(run / "step-140")
    assert origin_steps(run / "step-140") == [140]


def test_checkpoints_of_the_run_itself_are_carried_from_first(run: Path, tmp_path: Path) -> None:
    """A copy of the best one elsewhere is an ancestor too, yet the run shall not depend on it."""
    training = Training(2)
    training.load(run / "step-120")
    training.save(tmp_path / "best" / "step-130")
    assert inspect(tmp_path / "best" / "step-130").parent == "step-120"
    training.save(run / "step-140", carry="reference")
    assert inspect(run / "step-140").parent == "step-120"
    shutil.rmtree(run)
    training.save(tmp_path / "best" / "step-150")
    assert inspect(tmp_path / "best" / "step-150").parent == "step-130"


def test_a_failed_load_leaves_no_ancestors(run: Path) -> None:
    """Some tensors may have been overwritten already."""
    training = Training(2)
    training.load(run / "step-120")
    for file in (run / "step-100").glob("*.distcp"):
        os.truncate(file, 2000)
    with pytest.raises(BaseException, match="CheckpointException"):
        training.load(run / "step-100")
    with pytest.warns(TailorWarning, match="is written as a whole"):
        training.save(run / "step-140")
    assert origin_steps(run / "step-140") == [140]


def test_a_token_is_believed_only_in_the_save_that_it_was_made_for(run: Path) -> None:
    """A merged checkpoint has the token of one of its sources, and descends from none of them alone."""
    shutil.copytree(run / "step-120", run / "step-130")
    metadata = pickle.loads((run / "step-130" / ".metadata").read_bytes())
    metadata.tailor["save_id"] = "f" * 32
    (run / "step-130" / ".metadata").write_bytes(pickle.dumps(metadata))
    training = Training(2)
    training.load(run / "step-130")
    shutil.rmtree(run / "step-130")
    with pytest.warns(TailorWarning, match="None of the checkpoints"):
        training.save(run / "step-140")
    assert origin_steps(run / "step-140") == [140]


def test_a_checkpoint_without_a_token_is_an_ancestor_all_the_same(tmp_path: Path) -> None:
    """A script that used plain dicts so far changes to TrainState and goes on selectively."""
    first = Training(1)
    first.step()
    weights, moments = get_state_dict(first.model, first.optimizer)
    save({"model": weights, "optim": moments}, tmp_path / "step-100")
    model = Net()
    state = TrainState(model, AdamW(model.parameters()))
    with pytest.warns(TailorWarning, match="no random number generators"):
        load(state, tmp_path / "step-100")
    save(state, tmp_path / "step-120")
    assert origin_steps(tmp_path / "step-120") == [100, 120]


def test_ranks_that_save_each_for_itself_carry_from_their_own(fleet: Fleet, tmp_path: Path) -> None:
    """Nothing of another rank's folder is theirs."""
    assert fleet.call(f"{WORKER}:save_alone", str(tmp_path), ranks=2) == [["step-10"], ["step-20"]]


def test_a_load_that_a_single_rank_made_counts_for_all(fleet: Fleet, tmp_path: Path) -> None:
    """Its part of the training state may have changed."""
    assert fleet.call(f"{WORKER}:load_alone", str(tmp_path), ranks=2) == [[140], [140]]


def test_a_state_dict_that_was_taken_outside_a_save_goes_by_what_the_process_saw(run: Path) -> None:
    """The state cannot know then which folder it is saved to."""
    training = Training(2)
    training.load(run / "step-100")
    for step in (140, 160, 180):
        save({name: part.state_dict() for name, part in training.state.items()}, run / f"step-{step}")
    assert origin_steps(run / "step-140") == [100, 140]
    assert origin_steps(run / "step-160") == [140, 160]
    assert origin_steps(run / "step-180") == [160, 180]


def test_where_dcp_cannot_be_heard_everything_is_written_and_restored(run: Path) -> None:
    """Its logger is how a load is noticed, and a user may have switched logging off."""
    training, again = Training(2), Training(3)
    training.load(run / "step-120")
    logging.disable(logging.CRITICAL)
    try:
        with pytest.warns(TailorWarning, match="Logging is switched off"):
            training.save(run / "step-140")
        expected = training.steps(2)
        again.load(run / "step-140")
        assert again.steps(2) == expected
        with pytest.warns(TailorWarning, match="Logging is switched off"):
            again.save(run / "step-160")
    finally:
        logging.disable(logging.NOTSET)
    assert [origin_steps(run / f"step-{step}") for step in (140, 160)] == [[140], [160]]


def test_a_save_that_failed_is_no_ancestor(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one carries from what was committed before it."""
    training = Training(2)
    training.load(run / "step-120")
    with monkeypatch.context() as patch:
        patch.setattr(dcp.FileSystemWriter, "finish", lambda *_: 1 / 0)
        with pytest.raises(BaseException, match="CheckpointException"):
            training.save(run / "step-140")
    training.save(run / "step-160")
    assert origin_steps(run / "step-160") == [120, 160]


def test_an_asynchronous_save_is_an_ancestor_once_it_is_committed(tmp_path: Path) -> None:
    """The token is made when the state is staged."""
    training = Training(1)
    for step in (100, 120, 140):
        training.step()
        dcp.async_save(
            training.state, checkpoint_id=tmp_path / f"step-{step}", planner=LayerwisePlanner("parity")
        ).result()
    assert [origin_steps(tmp_path / f"step-{s}") for s in (100, 120, 140)] == [[100], [100, 120], [120, 140]]


def test_random_numbers_do_not_depend_on_whether_a_state_was_saved(tmp_path: Path) -> None:
    """Ids of saves are not drawn from the generators of the training."""
    training = Training(1)
    seed(1)
    expected = [draws(), draws()]
    seed(1)
    training.save(tmp_path / "step-1")
    assert [draws(), draws()] == expected
