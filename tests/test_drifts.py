"""Drift in real saves: by any number of ranks, over restarts, against the exact value, and within its bound."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh

from tailor_dcp import LayerwisePlanner, drifts
from tailor_dcp.base import open_base
from tailor_dcp.policies import Policy, SaveRequest
from tailor_dcp.policies.base import Measure
from tailor_dcp.units import Unit
from tests.support.fleet import Fleet
from tests.support.world import _spread

SHAPES = {f"layers.{i}.w": ((96, 1024), spread) for i, spread in enumerate(["shard", "replicate", "plain"])}
PACES = {"layers.0.w": 0.1, "layers.1.w": 0.01, "layers.2.w": 0.0}


@dataclass(frozen=True)
class Listening(Policy):
    """Writes chosen layers and keeps what it was told, and the rate."""

    layers: tuple[str, ...] = ()
    mode: Measure = "sketch"

    @property
    def needs_drift(self) -> Measure:
        return self.mode

    def select(self, request: SaveRequest) -> Iterable[Unit]:
        HEARD.append({info.layer: info.drift for info in request.units})
        RATES.append(request.rate)
        return [info.unit for info in request.units if info.layer in self.layers]


HEARD: list[dict[str, float | None]] = []
RATES: list[float | None] = []


def tensors(step: int) -> dict[str, torch.Tensor]:
    """Weights that go for a walk, each at its own pace; those of a step are the same wherever they are made."""
    made = {}
    for fqn, (shape, _) in SHAPES.items():
        draw = torch.Generator().manual_seed(len(fqn) + ord(fqn[7]))
        made[fqn] = torch.randn(shape, generator=draw)
        for _ in range(step):
            made[fqn] += PACES[fqn] * torch.randn(shape, generator=draw)
    return made


def exact(fqn: str, since: int, step: int) -> float:
    before, now = tensors(since)[fqn].double(), tensors(step)[fqn].double()
    return ((now - before).norm() / before.norm()).item()


def save(group: Any, run: str, step: int, layers: tuple[str, ...], mode: Measure = "sketch") -> dict[str, float | None]:
    """Save a step and return what the policy was told; only the coordinator is told anything."""
    mesh = DeviceMesh.from_group(group, "cpu")
    state = {"model": {fqn: _spread(whole, SHAPES[fqn][1], mesh) for fqn, whole in tensors(step).items()}}
    HEARD.clear()
    planner = LayerwisePlanner(Listening(layers, mode))
    dcp.save(state, checkpoint_id=f"{run}/step-{step}", planner=planner, process_group=group)
    return HEARD[-1] if HEARD else {}


def load(group: Any, path: str) -> None:
    mesh = DeviceMesh.from_group(group, "cpu")
    state = {"model": {fqn: _spread(torch.zeros(shape), how, mesh) for fqn, (shape, how) in SHAPES.items()}}
    dcp.load(state, checkpoint_id=path, process_group=group)


def test_the_estimate_is_the_same_at_any_world_size_and_after_a_restart(fleet: Fleet, tmp_path: Path) -> None:
    """And is near the exact change since each unit's own last save, not since the last save."""
    fleet.call("tests.support.world:forget")
    told = {}
    for ranks in (1, 2, 3):
        run = str(tmp_path / f"run-{ranks}")
        fleet.call("tests.test_drifts:save", run, 0, (), ranks=ranks)
        fleet.call("tests.test_drifts:save", run, 1, ("layers.0",), ranks=ranks)
        if ranks == 3:  # the fleet's other ranks take over: what they know is what the checkpoint tells
            fleet.call("tests.support.world:forget")
            fleet.call("tests.test_drifts:load", f"{run}/step-1", ranks=2)
            told[ranks] = fleet.call("tests.test_drifts:save", run, 2, (), ranks=2)[0]
        else:
            told[ranks] = fleet.call("tests.test_drifts:save", run, 2, (), ranks=ranks)[0]
    assert told[1] == told[2] == told[3]
    for fqn, since in (("layers.0.w", 1), ("layers.1.w", 0), ("layers.2.w", 0)):
        # 24 samples: a norm's standard deviation is 1 / sqrt(2 * 24), and this five of it.
        assert told[1][fqn.removesuffix(".w")] == pytest.approx(exact(fqn, since, 2), rel=0.7, abs=1e-12), fqn


def test_exact_mode_is_exact_on_any_number_of_ranks(fleet: Fleet, tmp_path: Path) -> None:
    """Since each unit's own last save; a process that has no copies falls back on the sketch."""
    fleet.call("tests.support.world:forget")
    run = str(tmp_path / "run")
    fleet.call("tests.test_drifts:save", run, 0, (), "exact", ranks=2)
    fleet.call("tests.test_drifts:save", run, 1, ("layers.0",), "exact", ranks=2)
    told = fleet.call("tests.test_drifts:save", run, 2, (), "exact", ranks=2)[0]
    for fqn, since in (("layers.0.w", 1), ("layers.1.w", 0), ("layers.2.w", 0)):
        assert told[fqn.removesuffix(".w")] == pytest.approx(exact(fqn, since, 2), rel=1e-5), fqn
    fleet.call("tests.test_drifts:forget_copies", ranks=2)
    estimate = fleet.call("tests.test_drifts:save", run, 3, (), "exact", ranks=2)[0]
    assert estimate["layers.0"] is not None
    assert estimate["layers.0"] != pytest.approx(exact("layers.0.w", 1, 3), rel=1e-5)


def forget_copies(group: Any) -> None:
    drifts.forget()


# In one process ------------------------------------------------------------------------------


def one(path: Path, model: dict[str, torch.Tensor], policy: Any) -> dict[str, int]:
    dcp.save({"model": model}, checkpoint_id=path, planner=LayerwisePlanner(policy))
    record = open_base(path).record
    assert record is not None
    return {unit.layer: held.origin.step for unit, held in record.units.items()}


@pytest.mark.parametrize("options", ["", ",exact=true"])
def test_what_moved_is_written_and_the_rest_until_its_bound(tmp_path: Path, options: str) -> None:
    """One layer moves far in every step, one slowly, so that it is far only after three, one not at all."""
    history = []
    for step in range(8):
        model = {f"layers.{i}.w": torch.ones(64, 64) * (1 + pace * step) for i, pace in enumerate([0.1, 0.011, 0.0])}
        history.append(one(tmp_path / f"step-{step}", model, f"drift:threshold=0.03,max_stale=4{options}"))
    assert [h["layers.0"] for h in history] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [h["layers.1"] for h in history] == [0, 0, 0, 3, 3, 3, 6, 6]
    assert [h["layers.2"] for h in history] == [0, 0, 0, 0, 0, 5, 5, 5]


def test_narrow_storage_is_no_drift(tmp_path: Path) -> None:
    """It is the training state's values that are compared, not what is left of them on disk."""
    model = {"layers.0.w": torch.full((64, 64), 1.001)}
    policy = "drift:threshold=1e-06,max_stale=9,weights=bf16"
    assert [one(tmp_path / f"step-{step}", model, policy)["layers.0"] for step in range(3)] == [0, 0, 0]


def test_what_another_policy_wrote_is_unknown_and_written_once(tmp_path: Path) -> None:
    model = {"layers.0.w": torch.ones(64, 64)}
    policies = ["full", "drift", "drift"]
    found = [one(tmp_path / f"step-{step}", model, policy)["layers.0"] for step, policy in enumerate(policies)]
    assert found == [0, 1, 1]


def test_tied_weights_move_together(tmp_path: Path) -> None:
    tied, bias = torch.ones(64, 64), torch.zeros(64)
    for step, expected in enumerate([0, 0, 2]):
        bias = bias + 100 * (step == 2)
        model = {"embed.weight": tied, "head.weight": tied, "head.bias": bias}
        assert set(one(tmp_path / f"step-{step}", model, "drift:threshold=0.1").values()) == {expected}


def test_an_asynchronous_save_that_decides_before_it_stages(tmp_path: Path) -> None:
    model = {f"layers.{i}.w": torch.ones(64, 64) for i in range(2)}
    for step, expected in enumerate([[0, 0], [0, 1], [0, 1]]):
        model["layers.1.w"].mul_(1 + (step == 1))
        path = tmp_path / f"step-{step}"
        planner = LayerwisePlanner("drift")
        stager = planner.stager(path)
        dcp.async_save({"model": model}, checkpoint_id=path, planner=planner, async_stager=stager).result()
        record = open_base(path).record
        assert record is not None
        assert [held.origin.step for held in record.units.values()] == expected


def test_the_rate_is_that_of_the_save_before(tmp_path: Path) -> None:
    """Bytes that it wrote itself, over the time from its planning to its commit."""
    RATES.clear()
    for step in range(2):
        one(tmp_path / f"step-{step}", {"layers.0.w": torch.ones(256, 256)}, Listening(("layers.0",)))
    record = open_base(tmp_path / "step-0").record
    assert record is not None
    assert record.seconds is not None
    assert RATES[-1] == pytest.approx(4 * 256 * 256 / record.seconds)
