"""``unchanged+...`` in real saves: what is bit-identical is carried, by any number of ranks, and nothing is lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tailor_dcp import LayerwisePlanner, TrainState
from tailor_dcp.layers import LayerMap
from tailor_dcp.metadata.record import from_builtins
from tailor_dcp.policies.unchanged import UNTRAINED
from tests.support.fleet import Fleet
from tests.support.runs import due, record
from tests.support.world import _spread, value

POLICY = "unchanged+full"
FROZEN = {f"layers.{i}.w": ((6, 5), spread) for i, spread in enumerate(["shard", "replicate", "plain", "shard"])}
Edits = Sequence[tuple[str, str]]


def tensors(edits: Edits) -> dict[str, torch.Tensor]:
    """Frozen weights, each edited by name: two elements swapped, the sign or the lowest bit of one flipped."""
    made = {fqn: value(fqn, 1, shape) for fqn, (shape, _) in FROZEN.items()}
    for fqn, how in edits:
        flat = made[fqn].view(-1)
        if how == "swap":
            flat[[0, -1]] = flat[[-1, 0]]
        else:
            flat.view(torch.int32)[-1] ^= {"low": 1, "sign": -(2**31)}[how]
    return made


def state(group: Any, edits: Edits) -> dict[str, Any]:
    mesh = DeviceMesh.from_group(group, "cpu")
    return {"model": {fqn: _spread(whole, FROZEN[fqn][1], mesh) for fqn, whole in tensors(edits).items()}}


def save(group: Any, path: str, edits: Edits, policy: str = POLICY, **options: Any) -> None:
    planner = LayerwisePlanner(policy, **options)
    dcp.save(state(group, edits), checkpoint_id=path, planner=planner, process_group=group)


def load(group: Any, path: str) -> None:
    """Load to go on from there; what descends from it is known from now on."""
    dcp.load(state(group, ()), checkpoint_id=path, process_group=group)


def whole(group: Any, path: str) -> dict[str, torch.Tensor]:
    """Load with one rank and return everything."""
    found = {"model": {fqn: torch.zeros(shape) for fqn, (shape, _) in FROZEN.items()}}
    dcp.load(found, checkpoint_id=path, process_group=group, no_dist=True)
    return found["model"]


def origins(path: Path) -> dict[str, int]:
    """Return the step that each layer's weights were written at."""
    made = from_builtins(record(path), "here").units
    return {unit.layer: held.origin.step for unit, held in made.items() if unit.kind == "weight"}


def check(path: Path, edits: Edits, written: dict[int, int]) -> None:
    assert origins(path) == {f"layers.{i}": step for i, step in written.items()}
    for fqn, tensor in whole(None, str(path)).items():
        assert torch.equal(tensor.view(torch.int32), tensors(edits)[fqn].view(torch.int32)), fqn


def test_what_changed_is_written_at_any_world_size(fleet: Fleet, tmp_path: Path) -> None:
    """Swaps, signs, lowest bits; ranks come and go; a new process goes on from what it loads."""
    run = [tmp_path / f"step-{i}" for i in range(7)]

    def call(workers: Fleet, function: str, ranks: int, *args: Any, **options: Any) -> None:
        workers.call(f"tests.test_unchanged:{function}", *args, ranks=ranks, **options)

    fleet.call("tests.support.world:forget")
    call(fleet, "save", 2, str(run[0]), [])
    check(run[0], [], {0: 0, 1: 0, 2: 0, 3: 0})
    call(fleet, "load", 4, str(run[0]))
    edits = [("layers.0.w", "swap")]
    call(fleet, "save", 3, str(run[1]), edits)
    check(run[1], edits, {0: 1, 1: 0, 2: 0, 3: 0})
    edits += [("layers.1.w", "low"), ("layers.2.w", "sign")]
    call(fleet, "load", 4, str(run[1]))
    call(fleet, "save", 4, str(run[2]), edits)
    check(run[2], edits, {0: 1, 1: 2, 2: 2, 3: 0})
    call(fleet, "load", 1, str(run[2]))
    call(fleet, "save", 1, str(run[3]), edits)
    check(run[3], edits, {0: 1, 1: 2, 2: 2, 3: 0})
    # The bits of step 0 again: what counts is what was saved last.
    edits = [("layers.1.w", "low"), ("layers.2.w", "sign"), ("layers.3.w", "swap")]
    restarted = Fleet(2)
    try:
        call(restarted, "load", 2, str(run[3]))
        call(restarted, "save", 2, str(run[4]), edits)
        check(run[4], edits, {0: 4, 1: 2, 2: 2, 3: 4})
        call(restarted, "save", 2, str(run[5]), edits, full_every=5)
        check(run[5], edits, dict.fromkeys(range(4), 5))
        call(restarted, "save", 2, str(run[6]), edits)
        check(run[6], edits, dict.fromkeys(range(4), 5))
    finally:
        restarted.close()


def save_torn(group: Any, path: str, torn: bool) -> None:
    """Save a plain tensor that every rank has; of a torn one each has another copy."""
    rank = group.rank()
    model = {"layers.0.w": torch.full((3,), float(rank if torn else 7)), "layers.1.w": torch.ones(3)}
    dcp.save({"model": model}, checkpoint_id=path, planner=LayerwisePlanner(POLICY), process_group=group)


def test_a_tensor_that_ranks_hold_different_copies_of_is_written(fleet: Fleet, tmp_path: Path) -> None:
    """Nobody knows which copy gets written, so nobody can say that it is as it was."""
    fleet.call("tests.support.world:forget")
    for step, torn in enumerate([False, False, True, True]):
        fleet.call("tests.test_unchanged:save_torn", str(tmp_path / f"step-{step}"), torn, ranks=2)
    assert [origins(tmp_path / f"step-{step}")["layers.0"] for step in range(4)] == [0, 0, 2, 3]
    assert origins(tmp_path / "step-3")["layers.1"] == 0


# In one process ------------------------------------------------------------------------------


def one(path: Path, model: dict[str, Any], policy: Any = POLICY, moments: Any = None, **options: Any) -> dict[str, int]:
    """Save in this process and return the step that each unit comes from."""
    whole_state: dict[str, Any] = {"model": model}
    if moments is not None:
        whole_state["optim"] = {"state": moments, "param_groups": [{"lr": 0.1, "params": list(moments)}]}
    dcp.save(whole_state, checkpoint_id=path, planner=LayerwisePlanner(policy, **options))
    made = from_builtins(record(path), "here").units
    return {str(unit): held.origin.step for unit, held in made.items()}


def test_saves_without_fingerprints_in_between_are_no_trap(tmp_path: Path) -> None:
    """What another policy wrote has no fingerprint: it is written once more, then known."""
    model = {f"layers.{i}.w": torch.ones(4) for i in range(2)}
    policies = [POLICY, POLICY, due("layers.0"), POLICY, POLICY]
    steps = [one(tmp_path / f"step-{i}", model, policy) for i, policy in enumerate(policies)]
    assert steps[1] == {"layers.0/weight": 0, "layers.1/weight": 0}
    assert steps[2] == {"layers.0/weight": 2, "layers.1/weight": 0}
    assert steps[3] == {"layers.0/weight": 3, "layers.1/weight": 0}
    assert steps[4] == steps[3]


def test_values_that_were_rounded_are_written_when_the_policy_no_longer_rounds(tmp_path: Path) -> None:
    model = {f"layers.{i}.w": torch.randn(4) for i in range(2)}
    narrow = "unchanged+moments:every=1,weights=bf16"
    assert set(one(tmp_path / "step-0", model, narrow).values()) == {0}
    assert set(one(tmp_path / "step-1", model, narrow).values()) == {0}
    assert set(one(tmp_path / "step-2", model).values()) == {2}
    assert set(one(tmp_path / "step-3", model, narrow).values()) == {2}  # more exact than asked for
    found = {name: torch.zeros(4) for name in model}
    dcp.load({"model": found}, checkpoint_id=tmp_path / "step-3")
    assert all(torch.equal(found[name], model[name]) for name in model)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_moments_that_stay_while_their_step_counts_on_are_written(tmp_path: Path, as_tensor: bool) -> None:
    """An expert without gradient but with zero moments: carrying them would bring an old step back."""
    name = "layers.0.w"
    for step in range(3):
        count = torch.tensor(float(min(step, 1))) if as_tensor else min(step, 1)
        moments = {name: {"exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4), "step": count}}
        found = one(tmp_path / f"step-{step}", {name: torch.ones(4)}, moments=moments)
        assert found["layers.0/weight"] == 0
        # A counter that is no tensor has no fingerprint, so nobody knows whether it went on.
        assert found["layers.0/exp_avg"] == (min(step, 1) if as_tensor else step)
        assert found["layers.0/step"] == found["layers.0/exp_avg"] == found["layers.0/exp_avg_sq"]


def test_a_layer_of_trained_and_frozen_weights_is_split(tmp_path: Path) -> None:
    """Buffers and frozen weights of a layer that is otherwise trained are units of their own."""
    draw = torch.Generator().manual_seed(0)
    frozen = torch.randn(4, generator=draw)
    for step in range(3):
        model = {"layers.0.a": torch.randn(4, generator=draw), "layers.0.b": frozen, "layers.1.c": frozen}
        moments = {"layers.0.a": {"exp_avg": torch.randn(4, generator=draw), "step": torch.tensor(float(step))}}
        found = one(tmp_path / f"step-{step}", model, moments=moments)
        assert found == {
            "layers.0/weight": step,
            f"layers.0{UNTRAINED}/weight": 0,
            "layers.1/weight": 0,
            "layers.0/exp_avg": step,
            "layers.0/step": step,
        }
    assert LayerMap.position(f"layers.0{UNTRAINED}") == LayerMap.position("layers.0")


def test_tied_weights_are_told_together(tmp_path: Path) -> None:
    """The twin's layer has a bias of its own: if that moves, both units are written."""
    tied = torch.ones(4)
    bias = torch.zeros(2)
    for step, expected in enumerate([0, 0, 2]):
        bias = bias + (step == 2)
        model = {"embed.weight": tied, "head.weight": tied, "head.bias": bias}
        assert set(one(tmp_path / f"step-{step}", model).values()) == {expected}


def test_inner_policies_still_decide_about_what_changed(tmp_path: Path) -> None:
    frozen = torch.ones(4)
    history = []
    for step in range(5):
        model = {f"layers.{i}.w": torch.full((4,), float(step)) for i in range(2)} | {"layers.2.w": frozen}
        found = one(tmp_path / f"step-{step}", model, "unchanged+parity")
        history.append([found[f"layers.{i}/weight"] for i in range(3)])
    assert [h[2] for h in history] == [0] * 5
    assert all(max(h[:2]) == step and min(h[:2]) >= step - 1 for step, h in enumerate(history))


def test_an_asynchronous_save_compares_what_was_staged(tmp_path: Path) -> None:
    model = {f"layers.{i}.w": torch.ones(64) for i in range(2)}
    one(tmp_path / "step-0", model)
    saved = dcp.async_save({"model": model}, checkpoint_id=tmp_path / "step-1", planner=LayerwisePlanner(POLICY))
    model["layers.1.w"].add_(1)  # after staging: the next save has to see it
    saved.result()
    assert set(origins(tmp_path / "step-1").values()) == {0}
    assert one(tmp_path / "step-2", model) == {"layers.0/weight": 0, "layers.1/weight": 2}


def test_what_is_unchanged_is_not_even_staged(tmp_path: Path) -> None:
    """Deciding before staging looks at the live tensors; the record keeps what they were."""
    model = {f"layers.{i}.w": torch.ones(64) for i in range(2)}
    for step, expected in enumerate([(0, 0), (0, 1), (0, 1)]):
        model["layers.1.w"].fill_(float(step > 0))
        path = tmp_path / f"step-{step}"
        planner = LayerwisePlanner(POLICY)
        dcp.async_save(
            {"model": model}, checkpoint_id=path, planner=planner, async_stager=planner.stager(path)
        ).result()
        assert tuple(origins(path).values()) == expected
    found = {name: torch.zeros(64) for name in model}
    dcp.load({"model": found}, checkpoint_id=tmp_path / "step-2")
    assert all(torch.equal(found[name], model[name]) for name in model)


# LoRA ----------------------------------------------------------------------------------------


class Tuning:
    """A small Llama that stands still, with adapters that learn."""

    def __init__(self) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1500,
            hidden_size=320,
            intermediate_size=1000,
            num_hidden_layers=2,
            num_attention_heads=4,
            use_cache=False,
        )
        adapters = LoraConfig(r=1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        self.model: nn.Module = get_peft_model(LlamaForCausalLM(config), adapters)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=0.05)
        self.state = TrainState(self.model, self.optimizer)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            ids = torch.randint(0, 1500, (1, 8))
            self.model(input_ids=ids, labels=ids).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, path: Path) -> None:
        dcp.save(self.state, checkpoint_id=path, planner=LayerwisePlanner(POLICY))

    def everything(self) -> dict[str, torch.Tensor]:
        found = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        for i, kinds in self.optimizer.state_dict()["state"].items():
            found |= {f"{i}.{kind}": tensor.clone() for kind, tensor in kinds.items()}
        return found


def written(path: Path, before: Sequence[Path] = ()) -> int:
    """Return the bytes on disk that a checkpoint added, its metadata included."""
    known = {file.stat().st_ino for folder in before for file in folder.rglob("*")}
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file() and f.stat().st_ino not in known)


def test_a_lora_run_saves_its_adapters_alone(tmp_path: Path) -> None:
    """After the first save at most 2 % of the bytes, adapters' moments included; resuming is exact."""
    first, second = tmp_path / "step-1", tmp_path / "step-2"
    tuning = Tuning()
    tuning.train(1)
    tuning.save(first)
    tuning.train(1)
    tuning.save(second)
    share = written(second, [first]) / written(first)
    assert share <= 0.02, share
    tuning.train(2)
    resumed = Tuning()
    with torch.no_grad():
        for p in resumed.model.parameters():
            p.zero_()
    dcp.load(resumed.state, checkpoint_id=second)
    resumed.train(2)
    want, got = tuning.everything(), resumed.everything()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
