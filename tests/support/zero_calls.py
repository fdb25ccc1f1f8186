"""What workers with DeepSpeed are told to call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from tests.support.zero import Setup, ZeroTraining, make_engine

if "RANK" in os.environ:  # not in the tests' own process, which imports this for what comes back
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])  # as torchrun would; DeepSpeed asks for it

MOMENTS = ("exp_avg", "exp_avg_sq")


class Resumed(NamedTuple):
    """A rank's losses after a save, those of a training that loaded it, what that warned of, its learning rates."""

    expected: list[float]
    losses: list[float]
    warned: list[str]
    rates: tuple[list[float], list[float]]


def resume(group: Any, setup: Setup, path: str, into: Setup | None = None, before: int = 3) -> Resumed:
    """Train, save, train on; load into a training that began otherwise, and train that on."""
    first = ZeroTraining(setup, 1)
    first.steps(before)
    dcp.save(first.state, checkpoint_id=path)
    expected = first.steps(3)
    again = ZeroTraining(into or setup, 2)
    warned = again.load(path)
    losses = again.steps(3)
    return Resumed(expected, losses, warned, (rates(first), rates(again)))


def rates(training: ZeroTraining) -> list[float]:
    """Return the learning rate of each group."""
    return [group["lr"] for group in training.engine.optimizer.param_groups]


class Reference(NamedTuple):
    """What DeepSpeed itself says that an engine holds: weights, moments by parameter and kind, weight decays."""

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    dtypes: dict[str, torch.dtype]
    decays: list[float]


def reference(group: Any, setup: Setup, path: str, theirs: str) -> Reference:
    """Train three steps and save; return what DeepSpeed's own tools find in the engine and in its own checkpoint."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    training = ZeroTraining(setup, 1)
    training.steps(3)
    dcp.save(training.state, checkpoint_id=path)
    engine = training.engine
    engine.save_checkpoint(theirs)
    dist.barrier()
    moments = _live_moments(engine) if setup.stage == 3 else _stored_moments(theirs)
    weights = {k: v.clone() for k, v in get_fp32_state_dict_from_zero_checkpoint(theirs).items()}
    named = [*engine.module.named_parameters(), *engine.module.named_buffers()]
    dtypes = {name: torch.float32 if getattr(v, "requires_grad", False) else v.dtype for name, v in named}
    return Reference(weights, moments, dtypes, [g["weight_decay"] for g in engine.optimizer.param_groups])


def _live_moments(engine: Any) -> dict[str, dict[str, Tensor]]:
    from deepspeed.utils import safe_get_full_optimizer_state

    return {
        name: {kind: safe_get_full_optimizer_state(p, kind).cpu() for kind in MOMENTS}
        for name, p in engine.module.named_parameters()
        if p.requires_grad
    }


def _stored_moments(folder: str) -> dict[str, dict[str, Tensor]]:
    """Put the ranks' parts of DeepSpeed's own ZeRO-1 or 2 checkpoint together, by the order that it names.

    The live engine cannot be asked: with two groups DeepSpeed finds no moments in the second.
    """
    tag = Path(folder, Path(folder, "latest").read_text())
    shapes = torch.load(tag / "mp_rank_00_model_states.pt", weights_only=False)["param_shapes"]
    files = sorted(tag.glob("*zero_pp_rank_*_optim_states.pt"))
    ranks = [torch.load(file, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"] for file in files]
    found: dict[str, dict[str, Tensor]] = {}
    for number, group in enumerate(shapes):
        for kind in MOMENTS:
            flat, at = torch.cat([rank["state"][number][kind] for rank in ranks]), 0
            for name, shape in group.items():
                found.setdefault(name, {})[kind] = flat[at : at + shape.numel()].view(shape)
                at += shape.numel()
    return found


def train_and_save(group: Any, setup: Setup, path: str, steps: int = 3) -> list[float]:
    """Train, save and return the losses of the next two steps."""
    training = ZeroTraining(setup, 1)
    training.steps(steps)
    dcp.save(training.state, checkpoint_id=path)
    return training.steps(2)


def load_and_save(group: Any, setup: Setup, source: str, target: str | None, at: int | None = None) -> Any:
    """Load into a training that began otherwise and save it all again; return warnings and the next losses.

    Args:
        group: the workers.
        setup: the engine.
        source: what to load.
        target: where to save; None for nowhere.
        at: the step at which batches go on, where the checkpoint does not tell.
    """
    training = ZeroTraining(setup, 2)
    if at is not None:
        training.extra = None  # which is another script's checkpoint, that has none of ours
    warned = training.load(source)
    if target is not None:
        dcp.save(training.state, checkpoint_id=target)
    if at is not None:
        training.engine.global_steps = at
    return warned, training.steps(2), training.extra, training.engine.global_steps


def keep_training(group: Any, setup: Setup, run: str, saves: int, policy: str = "parity") -> list[float]:
    """Save by a policy after each step, and everything beside it with stock DCP; return the losses."""
    from tailor_dcp import LayerwisePlanner

    training = ZeroTraining(setup, 1)
    losses = []
    for step in range(1, saves + 1):
        losses.append(training.step())
        dcp.save(training.state, checkpoint_id=f"{run}/full/at{step}")
        dcp.save(training.state, checkpoint_id=f"{run}/step-{step}", planner=LayerwisePlanner(policy))
    return losses


def go_on(group: Any, setup: Setup, run: str, step: int, policy: str = "parity") -> list[str]:
    """Resume from a checkpoint and save the next step by the policy; return what the load warned of."""
    from tailor_dcp import LayerwisePlanner

    training = ZeroTraining(setup, 2)
    warned = training.load(f"{run}/step-{step}")
    dcp.save(training.state, checkpoint_id=f"{run}/full/resumed")
    training.step()
    dcp.save(training.state, checkpoint_id=f"{run}/full/at{step + 1}")
    dcp.save(training.state, checkpoint_id=f"{run}/step-{step + 1}", planner=LayerwisePlanner(policy))
    return warned


def some_layers(group: Any, setup: Setup, path: str, layers: str, target: str) -> list[float]:
    """Load some layers only into a training that has made a step, and save everything; return its learning rates."""
    from tailor_dcp import LayerwiseLoadPlanner

    training = ZeroTraining(setup, 2)
    training.step()
    before = [*rates(training), float(training.engine.global_steps)]
    dcp.save(training.state, checkpoint_id=f"{target}-before")
    dcp.load(training.state, checkpoint_id=path, planner=LayerwiseLoadPlanner(path, layers=layers))
    dcp.save(training.state, checkpoint_id=target)
    assert before == [*rates(training), float(training.engine.global_steps)]
    return before


def save_asynchronously(group: Any, setup: Setup, run: str, staging: str) -> list[int]:
    """Save in the background while training goes on, twice; return how many values were not copied each time."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    from tailor_dcp import LayerwisePlanner, LayerwiseWriter

    training = ZeroTraining(setup, 1)
    skipped = []
    for step in (1, 2):
        training.step()
        path = f"{run}/step-{step}"
        dcp.save(training.state, checkpoint_id=f"{run}/full/at{step}")
        planner = LayerwisePlanner("parity") if staging != "stock" else None
        options: dict[str, Any] = {"checkpoint_id": path}
        if staging == "planner":
            assert planner is not None
            options["async_stager"] = Counting(planner.stager(path, group))
        elif staging == "default":
            options["async_stager"] = DefaultStager(StagingOptions(False, False, False, False))
        elif staging == "writer":
            options = {"storage_writer": LayerwiseWriter(path)}
        done: Any = dcp.async_save(training.state, planner=planner, process_group=group, **options)
        training.steps(2)  # nothing of this may be seen in the checkpoint
        getattr(done, "upload_completion", done).result()
        skipped.append(getattr(options.get("async_stager"), "skipped", 0))
    return skipped


class Counting:
    """A stager that counts what another one does not copy."""

    def __init__(self, stager: Any) -> None:
        self._stager = stager
        self.skipped = 0

    def stage(self, state_dict: dict[str, Any]) -> Any:
        """Stage and count."""
        staged = self._stager.stage(state_dict)
        self.skipped = sum(value.is_meta for value in staged["model"].values())
        return staged

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stager, name)


def never_stepped(group: Any, setup: Setup, path: str) -> tuple[list[float], list[float], int]:
    """Save an engine that has made no step; return its losses then, a loaded one's, and the states that it has got."""
    fresh = ZeroTraining(setup, 1)
    dcp.save(fresh.state, checkpoint_id=path)
    states = sum(bool(state) for state in fresh.engine.optimizer.optimizer.state.values())
    again = ZeroTraining(setup, 2)
    again.load(path)
    return fresh.steps(3), again.steps(3), states


def refused(group: Any, kind: str) -> str:
    """Build an engine that is not known and return what EngineState says of it."""
    from deepspeed.utils import groups

    from tailor_dcp import EngineState, TailorError

    before = dict(vars(groups))
    try:
        extra = {"zero": 0} if kind == "taken name" else None
        EngineState(_unknown_engine(kind), extra=extra)["model"].state_dict()
    except TailorError as error:
        return str(error)
    finally:
        # DeepSpeed keeps one set of groups a process; the next engine is another kind.
        vars(groups).clear()
        vars(groups).update(before)
    return ""


def refused_config(group: Any, zero: dict[str, Any]) -> str:
    """Return what is said of a configuration that cannot be run here."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from tailor_dcp.integrations.zero_engine import unknown_storage

    return " | ".join(unknown_storage(DeepSpeedZeroConfig(**zero)) or ())


def _unknown_engine(kind: str) -> Any:
    import deepspeed

    if kind == "module":
        return torch.nn.Linear(2, 2)
    if kind == "taken name":
        return make_engine(Setup(1), 1)
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True}
    if kind == "pipeline":
        from deepspeed.pipe import PipelineModule

        model: Any = PipelineModule([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)], num_stages=1)
        config["zero_optimization"] = {"stage": 1}
    elif kind == "experts":
        from deepspeed.moe.layer import MoE

        model = MoE(4, torch.nn.Linear(4, 4), num_experts=2)
        config["zero_optimization"] = {"stage": 2}
    elif kind == "tensor parallel":
        from tests.support.zero import llama

        model = llama(False)
        config |= {"zero_optimization": {"stage": 1}, "tensor_parallel": {"autotp_size": 2}}
    elif kind == "no zero":
        model = torch.nn.Linear(2, 2)
    elif kind == "bf16 optimizer":
        model = torch.nn.Linear(2, 2)
        config |= {
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
        }
    elif kind == "offloaded states":
        engine = make_engine(Setup(2), 1)
        engine.offload_states()
        return engine
    else:
        raise AssertionError(kind)
    groups: Any = model.parameters()
    if kind == "experts":
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        groups = split_params_into_different_moe_groups_for_optimizer({"params": list(groups), "name": "all"})
    optimizer = torch.optim.AdamW(groups)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def save_again(group: Any, setup: Setup, source: str, target: str, policy: str) -> None:
    """Load, and save without training in between."""
    from tailor_dcp import LayerwisePlanner

    training = ZeroTraining(setup, 2)
    training.load(source)
    dcp.save(training.state, checkpoint_id=target, planner=LayerwisePlanner(policy))
