"""EngineState with real DeepSpeed engines: what is saved, and how training goes on from it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tailor_dcp import EngineState, TailorError, inspect
from tailor_dcp.metadata.record import record_of
from tests.support.fleet import Fleet
from tests.support.zero import Setup

CALLS = "tests.support.zero_calls"
SUB_GROUPS = (("sub_group_size", 40),)
ROUND_ROBIN = (("round_robin_gradients", True),)

pytestmark = pytest.mark.filterwarnings("ignore")


def everything(path: Path | str) -> dict[str, Any]:
    """Load each entry of a checkpoint with stock DCP, in this process, which has no engine."""
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        key: torch.full(entry.size, 77, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for key, entry in entries.items()
    }
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def tensors(path: Path | str) -> dict[str, torch.Tensor]:
    """Load the weights and the optimizer's states."""
    return {k: v for k, v in everything(path).items() if isinstance(v, torch.Tensor) and not k.startswith("train.")}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype, key
        assert torch.equal(value, b[key]), key


# DeepSpeed compiles its kernel for minutes when it is first used in an environment.
COMPILED = pytest.mark.long

# Going on ----------------------------------------------------------------------------------

RESUMES = [
    (Setup(3), None),
    (Setup(2), None),
    (Setup(1), None),
    (Setup(3, "bf16", "tied llama", groups=2), None),
    (Setup(2, "bf16", "tied llama", groups=2), None),
    (Setup(1, "bf16"), None),
    (Setup(3, groups=2, options=SUB_GROUPS), None),
    (Setup(2, groups=2, options=ROUND_ROBIN), None),
    pytest.param(Setup(3, "bf16", optimizer="cpu_adam", offload=True), None, marks=COMPILED),
    pytest.param(Setup(2, "bf16", optimizer="cpu_adam", offload=True), None, marks=COMPILED),
    (Setup(1, offload=True), None),
    (Setup(3, "bf16", offload=True, options=(("offload_param", {"device": "cpu"}),)), None),
    (Setup(2), Setup(3)),
    (Setup(3, groups=2, options=SUB_GROUPS), Setup(1, groups=2)),
    (Setup(1, "bf16", "tied llama"), Setup(3, "bf16", "tied llama", options=SUB_GROUPS)),
]


@pytest.mark.parametrize(("setup", "into"), RESUMES, ids=str)
def test_training_goes_on_with_the_same_bits(tmp_path: Path, zero_fleet: Fleet, setup: Setup, into: Setup) -> None:
    for resumed in zero_fleet.call(f"{CALLS}:resume", setup, str(tmp_path / "step-3"), into):
        assert resumed.losses == resumed.expected
        assert resumed.warned == []
        assert resumed.rates[0] == resumed.rates[1]


def test_accumulated_batches_go_on_with_the_same_bits(tmp_path: Path, zero_fleet: Fleet) -> None:
    """Two batches a step, saved after three steps."""
    for resumed in zero_fleet.call(f"{CALLS}:resume", Setup(2, accumulate=2), str(tmp_path / "a"), before=6):
        assert resumed.losses == resumed.expected
    # Into an engine that takes another number of batches: it begins with a whole step, whatever was counted.
    for _, _, _, steps in zero_fleet.call(f"{CALLS}:load_and_save", Setup(2, accumulate=4), str(tmp_path / "a"), None):
        assert steps == 3


@pytest.mark.parametrize(
    "setup",
    [
        Setup(3, groups=2, options=SUB_GROUPS),
        Setup(2, groups=2),
        pytest.param(Setup(3, optimizer="cpu_adam"), marks=COMPILED),
    ],
    ids=str,
)
def test_an_engine_that_never_stepped_is_saved_as_it_is(tmp_path: Path, zero_fleet: Fleet, setup: Setup) -> None:
    path = tmp_path / "never"
    for expected, losses, states in zero_fleet.call(f"{CALLS}:never_stepped", setup, str(path)):
        assert losses == expected
        assert states == 0
    found = tensors(path)
    assert not found["optim.state.cube.exp_avg"].any()
    assert found["optim.state.cube.step"] == 0


# What is in a checkpoint -------------------------------------------------------------------

CONTENTS = [
    Setup(3, "bf16", "tied llama", groups=2),
    Setup(3, "fp32", "odd", options=SUB_GROUPS),
    Setup(2, "bf16", "odd", groups=2, options=ROUND_ROBIN),
    Setup(1, "fp32", "tied llama"),
    pytest.param(Setup(2, "fp32", "odd", optimizer="cpu_adam", offload=True), marks=COMPILED),
]


@pytest.mark.parametrize("setup", CONTENTS, ids=str)
def test_what_is_saved_is_what_deepspeed_says(tmp_path: Path, zero_fleet: Fleet, setup: Setup) -> None:
    """Weights as zero_to_fp32 has them of DeepSpeed's own checkpoint, moments as the live engine tells them."""
    path = tmp_path / "step-3"
    told = zero_fleet.call(f"{CALLS}:reference", setup, str(path), str(tmp_path / "theirs"))[0]
    found = everything(path)
    weights = {key.removeprefix("model."): value for key, value in found.items() if key.startswith("model.")}
    assert weights.keys() == told.weights.keys()
    for name, value in told.weights.items():
        assert torch.equal(weights[name].to(value.dtype), value), name
    for name, dtype in told.dtypes.items():
        if name in weights:
            assert weights[name].dtype == dtype, name
    states = {f"optim.state.{name}.{kind}": v for name, kinds in told.moments.items() for kind, v in kinds.items()}
    for key, value in states.items():
        assert torch.equal(found[key], value), key
    steps = {f"optim.state.{name}.step" for name in told.moments}
    assert {key for key in found if key.startswith("optim.state.")} == states.keys() | steps
    assert all(found[key].dtype == torch.float32 and found[key].shape == () and found[key] == 3 for key in steps)
    groups = range(setup.groups)
    assert [found[f"optim.param_groups.{i}.weight_decay"] for i in groups] == told.decays
    assert sorted(name for i in groups for name in found[f"optim.param_groups.{i}.params"]) == sorted(told.moments)
    assert found["train.step"] == 3
    assert found["train.zero.global_samples"] == 12
    assert found["train.scheduler.last_epoch"] == 3


def test_each_rank_writes_its_own_part_in_few_chunks(tmp_path: Path, zero_fleet: Fleet) -> None:
    for setup in (Setup(3), Setup(2)):
        path = tmp_path / f"stage{setup.stage}"
        zero_fleet.call(f"{CALLS}:train_and_save", setup, str(path))
        metadata = dcp.FileSystemReader(path).read_metadata()
        held: dict[str, int] = {"__0": 0, "__1": 0}
        for index, info in metadata.storage_data.items():
            if index.fqn.endswith((".exp_avg", ".exp_avg_sq")):
                held[info.relative_path[:3]] += info.length
        assert min(held.values()) / sum(held.values()) > 0.3
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                assert len(entry.chunks) <= 2 * max(1, 2 * len(entry.size) - 1), key


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize(
    "setup", [Setup(3, "bf16", groups=2, options=SUB_GROUPS), Setup(2, "bf16", "tied llama")], ids=str
)
def test_another_world_size_holds_the_same(
    tmp_path: Path, zero_fleets: Callable[[int], Fleet], setup: Setup, before: int, after: int
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    zero_fleets(before).call(f"{CALLS}:train_and_save", setup, str(first))
    warned, losses, extra, steps = zero_fleets(after).call(f"{CALLS}:load_and_save", setup, str(first), str(second))[0]
    assert_equal(tensors(second), tensors(first))
    assert len(warned) == 1
    assert f"saved by {before} ranks and loaded by {after}" in warned[0]
    assert extra == {"note": 1}
    assert steps == 5
    assert all(torch.isfinite(torch.tensor(losses)))


# Saved layer by layer -----------------------------------------------------------------------

LAYERWISE = [Setup(3, "bf16", "tied llama", groups=2, options=SUB_GROUPS), Setup(2, "fp32", "llama")]


@pytest.mark.parametrize("setup", LAYERWISE, ids=str)
def test_layer_wise_saves_hold_each_unit_as_at_its_origin(tmp_path: Path, zero_fleet: Fleet, setup: Setup) -> None:
    """By the record each key's bytes are of some step; they must be those that a full save had then."""
    zero_fleet.call(f"{CALLS}:keep_training", setup, str(tmp_path), 3)
    warned = zero_fleet.call(f"{CALLS}:go_on", setup, str(tmp_path), 3)
    full = {step: tensors(tmp_path / "full" / f"at{step}") for step in (1, 2, 3, 4)}
    for step in (1, 2, 3, 4):
        found, seen = inspect(tmp_path / f"step-{step}"), tensors(tmp_path / f"step-{step}")
        origins = origins_of(tmp_path / f"step-{step}")
        assert origins.keys() == full[step].keys()
        assert (found.written == found.live) == (step == 1)
        assert set(origins.values()) == ({1} if step == 1 else {step - 1, step})
        for key, origin in origins.items():
            assert torch.equal(seen[key], full[origin or 0][key]), key
    # ZeRO has one step for layers that are now of two steps.
    assert ["the newest counts for all" in text for text in warned[0]] == [True]
    assert warned[1] == []
    resumed, composite = tensors(tmp_path / "full" / "resumed"), tensors(tmp_path / "step-3")
    for key, value in resumed.items():
        kept = torch.equal(value, composite[key])
        # With small buffers some hold only what is of one step.
        newest = key.endswith(".step") and value == 3
        assert kept or newest, key
    if not setup.options:
        assert {float(value) for key, value in resumed.items() if key.endswith(".step")} == {3.0}


def origins_of(path: Path) -> dict[str, int | None]:
    """Return for each key the step that its bytes are of."""
    record = record_of(dcp.FileSystemReader(path).read_metadata(), "the record")
    assert record is not None
    return {key: unit.origin.step for unit in record.units.values() for key in unit.keys}


@pytest.mark.parametrize("stage", [2, 3])
def test_what_does_not_change_is_not_written_again(
    tmp_path: Path, zero_fleets: Callable[[int], Fleet], stage: int
) -> None:
    """Frozen weights are carried, and after a load at another world size everything is."""
    setup, policy = Setup(stage, "bf16", "odd"), "unchanged+full"
    zero_fleets(2).call(f"{CALLS}:keep_training", setup, str(tmp_path), 2, policy)
    origins = origins_of(tmp_path / "step-2")
    assert {key for key, step in origins.items() if step == 1} == {"model.fixed.weight", "model.fixed.bias"}
    zero_fleets(1).call(f"{CALLS}:save_again", setup, str(tmp_path / "step-2"), str(tmp_path / "step-3"), policy)
    assert origins_of(tmp_path / "step-3") == origins
    assert_equal(tensors(tmp_path / "step-3"), tensors(tmp_path / "step-2"))


def test_a_narrower_dtype_is_stored_and_loaded(tmp_path: Path, zero_fleet: Fleet) -> None:
    setup, policy = Setup(3, "fp32", "llama"), "moments:every=1,weights=bf16,moments=bf16"
    zero_fleet.call(f"{CALLS}:keep_training", setup, str(tmp_path), 1, policy)
    zero_fleet.call(f"{CALLS}:save_again", setup, str(tmp_path / "step-1"), str(tmp_path / "again"), "full")
    full, narrow, again = (tensors(tmp_path / name) for name in ("full/at1", "step-1", "again"))
    for key, value in full.items():
        if not key.endswith(".step"):
            assert torch.equal(narrow[key], value.bfloat16()), key
            assert torch.equal(again[key], value.bfloat16().float()), key


def test_some_layers_alone_are_loaded(tmp_path: Path, zero_fleet: Fleet) -> None:
    """All else stays: weights, moments, learning rates, counters."""
    setup, path, target = Setup(3, "bf16", "llama"), tmp_path / "step-3", tmp_path / "after"
    zero_fleet.call(f"{CALLS}:train_and_save", setup, str(path))
    zero_fleet.call(f"{CALLS}:some_layers", setup, str(path), "model.layers.1", str(target))
    source, before, after = tensors(path), tensors(f"{target}-before"), tensors(target)
    for key, value in after.items():
        if key.endswith(".step"):
            assert value == 3  # one buffer, one step
        else:
            assert torch.equal(value, (source if ".layers.1." in key else before)[key]), key


@pytest.mark.parametrize("staging", ["stock", "default", "writer", "planner"])
@pytest.mark.parametrize("setup", [Setup(3, "bf16", "tied llama"), Setup(2, "fp32", "odd")], ids=str)
def test_asynchronous_saves_see_nothing_of_later_steps(
    tmp_path: Path, zero_fleet: Fleet, setup: Setup, staging: str
) -> None:
    skipped = zero_fleet.call(f"{CALLS}:save_asynchronously", setup, str(tmp_path), staging)
    full = {step: tensors(tmp_path / "full" / f"at{step}") for step in (1, 2)}
    assert_equal(tensors(tmp_path / "step-1"), full[1])
    second = tensors(tmp_path / "step-2")
    if staging == "stock":
        assert_equal(second, full[2])
    else:
        found = inspect(tmp_path / "step-2")
        assert found.written < found.live
        for key, value in second.items():
            assert torch.equal(value, full[1][key]) or torch.equal(value, full[2][key]), key
        assert any(not torch.equal(second[key], full[1][key]) for key in second)
    for first, later in skipped:
        assert first == 0
        assert (later > 0) == (staging == "planner")


# Between frameworks -------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("model", ["tied llama", "odd"])
def test_fsdp2_goes_on_and_back(tmp_path: Path, zero_fleet: Fleet, stock_fleet: Fleet, model: str, ranks: int) -> None:
    """The script on the other side knows nothing but torch's documented calls."""
    zero, fsdp = tmp_path / "zero", tmp_path / "fsdp"
    setup = Setup(3, "fp32", model)
    expected = [losses[0] for losses in zero_fleet.call(f"{CALLS}:train_and_save", setup, str(zero))]
    script = "tests.support.fsdp_script:losses"
    losses = stock_fleet.call(script, model, [3, 4, 5], str(zero), str(fsdp), save_at=5, ranks=ranks)
    for rank in range(ranks):
        assert losses[rank][0] == pytest.approx(expected[rank], abs=1e-5)
    back = zero_fleet.call(f"{CALLS}:load_and_save", setup, str(fsdp), None, at=5)
    for rank in range(ranks):
        assert back[rank][1][0] == pytest.approx(losses[rank][2], abs=1e-5)
    assert "does not hold all of train.step and train.zero and train.scheduler" in back[0][0][0]
    assert_same_keys(zero, fsdp)


def assert_same_keys(zero: Path, fsdp: Path) -> None:
    """The layout is torch's own: neither side has a weight or an optimizer's entry that the other lacks."""
    keys = [set(dcp.FileSystemReader(path).read_metadata().state_dict_metadata) for path in (zero, fsdp)]
    assert {key for key in keys[0] if not key.startswith("train.")} == {
        key for key in keys[1] if not key.endswith(".initial_lr")
    } | {key for key in keys[0] if key.endswith(".initial_lr")}


# What is refused ----------------------------------------------------------------------------

REFUSED = {
    "module": "takes the engine that deepspeed.initialize returns, not a Linear",
    "no zero": "does not use ZeRO",
    "bf16 optimizer": "BF16_Optimizer",
    "pipeline": "how a pipeline cuts the model",
    "experts": "experts are spread over ranks",
    "taken name": "extra= holds the name 'zero', which EngineState itself keeps",
    "tensor parallel": "tensor parallelism cuts the parameters",
    "offloaded states": "moved away with engine.offload_states",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_unknown_engines_are_refused(zero_fleet: Fleet, kind: str) -> None:
    for said in zero_fleet.call(f"{CALLS}:refused", kind):
        assert REFUSED[kind] in said
        assert said.endswith(".")
        assert ";" in said


@pytest.mark.parametrize(
    ("zero", "why"),
    [
        ({"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, "states are kept on NVMe"),
        ({"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}, "states are kept on NVMe"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "the optimizer is offloaded in part"),
        ({"stage": 3, "zero_hpz_partition_size": 2}, "ZeRO++ keeps"),
        ({"stage": 3, "zero_quantized_weights": True}, "ZeRO++ keeps"),
        ({"stage": 2, "zenflow": {}}, "ZenFlow delays updates"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, ""),
    ],
    ids=str,
)
def test_unknown_storage_is_refused(zero_fleet: Fleet, zero: dict[str, Any], why: str) -> None:
    said = zero_fleet.call(f"{CALLS}:refused_config", zero)[0]
    assert said.startswith(why)
    assert bool(said) == bool(why)


def test_deepspeed_is_asked_for_only_by_those_who_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; from tailor_dcp import EngineState; assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(
        TailorError, match=r"needs DeepSpeed, which is not installed here; pip install 'tailor-dcp\[zero\]'\."
    ):
        EngineState(object())
