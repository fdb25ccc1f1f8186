"""Real DeepSpeed engines on the CPU, in the workers of a fleet: made, trained, saved, loaded and looked into."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import signal
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from tests.support import zero_nets
from tests.support.zero_fleet import ZeroFleet

faulthandler.register(signal.SIGUSR1)  # to see where a worker waits: kill -USR1 it
_fleets: dict[int, ZeroFleet] = {}


def fleet(world: int) -> ZeroFleet:
    """Return the fleet of a world size, started when it is first asked for; DeepSpeed takes the whole world."""
    if world not in _fleets or not _fleets[world].alive:
        _fleets[world] = ZeroFleet(world)
    return _fleets[world]


def close_fleets() -> None:
    """Stop all workers."""
    while _fleets:
        workers = _fleets.popitem()[1]
        if workers.alive:
            workers.close()


@dataclass(frozen=True)
class Setup:
    """How an engine is made."""

    stage: int = 3
    world: int = 2
    dtype: str = "bf16"
    groups: int = 1
    family: str = "llama"
    sub_group_size: int = 10**9
    round_robin: bool = False
    optimizer: str = "AdamW"
    options: tuple[tuple[str, Any], ...] = ()
    accumulate: str | None = None

    def call(self, function: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a function of this module in all workers of the setup's fleet."""
        return fleet(self.world).call(f"{__name__}:{function}", asdict(self), *args, **kwargs)

    def config(self) -> dict[str, Any]:
        """Return DeepSpeed's configuration."""
        zero: dict[str, Any] = {"stage": self.stage, "sub_group_size": self.sub_group_size}
        zero |= {"stage3_param_persistence_threshold": 30}
        if self.round_robin:
            zero["round_robin_gradients"] = True
        zero |= dict(self.options)
        return {
            "train_batch_size": self.world * 2,
            "train_micro_batch_size_per_gpu": 2,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": zero,
            "data_types": {"grad_accum_dtype": self.accumulate or self.dtype},
            **({} if self.dtype == "fp32" else {self.dtype: {"enabled": True}}),
        }


def _optimizer(setup: Setup, groups: list[dict[str, Any]]) -> Any:
    if setup.optimizer == "CPUAdam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=1e-2)
    if setup.optimizer == "momentum":
        return torch.optim.SGD(groups, lr=1e-2, momentum=0.9)
    return getattr(torch.optim, setup.optimizer)(groups, lr=1e-2)


def _engine(setup: Setup, seed: int) -> Any:
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    model = zero_nets.make_net(setup.family, seed)
    optimizer = _optimizer(setup, zero_nets.param_groups(model, setup.groups))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=setup.config(), dist_init_required=False
    )
    return engine


def _train(engine: Any, setup: Setup, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = zero_nets.loss_of(engine, setup.family, zero_nets.batch(engine.global_steps, engine.global_rank))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def train_and_save(
    group: Any, setup: dict[str, Any], folder: str, steps: int = 2, further: int = 2, **save: Any
) -> dict[str, Any]:
    """Train, save, and go on; return the state at the save, the losses afterwards and the state then."""
    made = Setup(**setup)
    engine = _engine(made, seed=1)
    _train(engine, made, steps)
    engine.save_checkpoint(folder, **save)
    at_save = state_of(engine)
    return {"saved": at_save, "losses": _train(engine, made, further), "after": state_of(engine)}


def load_and_train(group: Any, setup: dict[str, Any], folder: str, further: int = 2, **load: Any) -> dict[str, Any]:
    """Load into an engine of other weights and go on."""
    made = Setup(**setup)
    engine = _engine(made, seed=2)
    path, client = engine.load_checkpoint(folder, **load)
    if path is None:
        raise AssertionError(f"{folder} was not loaded")
    loaded = state_of(engine)
    return {"saved": loaded, "losses": _train(engine, made, further), "after": state_of(engine), "client": client}


def load_and_save(group: Any, setup: dict[str, Any], folder: str, target: str) -> None:
    """Load a checkpoint and save it again with nothing trained in between."""
    engine = _engine(Setup(**setup), seed=2)
    engine.load_checkpoint(folder)
    engine.save_checkpoint(target)


def save_state(group: Any, setup: dict[str, Any], folder: str, steps: int = 2, further: int = 2) -> dict[str, Any]:
    """Train and save through EngineState; go on."""
    import torch.distributed.checkpoint as dcp

    from tailor_dcp import EngineState

    made = Setup(**setup)
    engine = _engine(made, seed=1)
    _train(engine, made, steps)
    dcp.save(EngineState(engine), checkpoint_id=folder)
    return {"saved": state_of(engine), "losses": _train(engine, made, further)}


def load_state(group: Any, setup: dict[str, Any], folder: str, further: int = 2) -> dict[str, Any]:
    """Load through EngineState into an engine of other weights, and go on; return what was warned of, too."""
    import torch.distributed.checkpoint as dcp

    from tailor_dcp import EngineState

    made = Setup(**setup)
    engine = _engine(made, seed=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dcp.load(EngineState(engine), checkpoint_id=folder)
    warned = [str(w.message) for w in caught if w.category.__name__ == "TailorWarning"]
    return {"saved": state_of(engine), "losses": _train(engine, made, further), "warned": warned}


def convert_together(group: Any, setup: dict[str, Any], source: str, target: str, to: str) -> list[str]:
    """Convert with all workers as the ranks that share the work; return what was said."""
    from tailor_dcp.converters.convert import convert

    return list(convert(source, target, to, "zero").notes)


def consolidated(group: Any, setup: dict[str, Any], folder: str) -> dict[str, np.ndarray]:
    """Return what DeepSpeed's own zero_to_fp32 makes of a checkpoint."""
    if int(os.environ["RANK"]):
        return {}
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return {n: _numpy(t) for n, t in get_fp32_state_dict_from_zero_checkpoint(folder).items()}


def classes_in(group: Any, setup: dict[str, Any], path: str) -> dict[str, str]:
    """Return the classes that plain torch.load finds in a file where DeepSpeed is installed."""
    zero = torch.load(path, weights_only=False)["optimizer_state_dict"]
    found = {name: zero[name] for name in ("zero_stage", "loss_scaler") if name in zero}
    for mapping in zero.get("param_slice_mappings", [])[:1]:
        found |= {"fragment": next(iter(mapping.values()))}
    return {name: f"{type(v).__module__}.{type(v).__qualname__} {vars(v)}" for name, v in found.items()}


def state_of(engine: Any) -> dict[str, Any]:
    """Return what the engine has, gathered: weights, moments, steps, groups, counters."""
    gather = _gather3 if int(engine.zero_optimization_stage()) == 3 else _gather12
    if type(engine.optimizer).__name__ == "BF16_Optimizer":
        gather = _gather_bf16
    kinds = [k for k, v in _some_state(engine).items() if isinstance(v, torch.Tensor) and v.dim()]
    state: dict[str, Any] = {"weights": gather(engine, None), "steps": _steps(engine)}
    state |= {kind: gather(engine, kind) for kind in kinds}
    state["buffers"] = {n: _numpy(b) for n, b in engine.module.named_buffers()}
    state["groups"] = [{k: v for k, v in g.items() if k != "params"} for g in engine.optimizer.optimizer.param_groups]
    state["counters"] = [engine.global_steps, engine.global_samples, engine.skipped_steps]
    state["scheduler"] = engine.lr_scheduler.state_dict()
    return state


def _gather3(engine: Any, kind: str | None) -> dict[str, np.ndarray]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    get = safe_get_full_optimizer_state
    return {name: _numpy(get(p, kind) if kind else safe_get_full_fp32_param(p)) for name, p in trained}


def _gather12(engine: Any, kind: str | None) -> dict[str, np.ndarray]:
    """Gather from the flat buffers; DeepSpeed's own functions may wait for ever where a rank has nothing of one."""
    import torch.distributed as dist

    zero = engine.optimizer
    found = {}
    for number, flat in enumerate(zero.single_partition_of_fp32_groups):
        mine = (zero.optimizer.state[flat][kind] if kind else flat).detach()
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine)
        whole = torch.cat(parts)
        for p, at in zip(zero.round_robin_bit16_groups[number], zero.round_robin_bit16_offsets[number], strict=True):
            found[engine.param_names[p]] = _numpy(whole[at : at + p.numel()].reshape(p.shape))
    return found


def _gather_bf16(engine: Any, kind: str | None) -> dict[str, np.ndarray]:
    import torch.distributed as dist

    zero, found = engine.optimizer, {}
    for flat, group in zip(zero.fp32_groups_flat_partition, zero.bf16_groups, strict=True):
        mine = (zero.optimizer.state[flat][kind] if kind else flat).detach()
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine)
        whole, at = torch.cat(parts), 0
        for p in group:
            found[engine.param_names[p]] = _numpy(whole[at : at + p.numel()].reshape(p.shape))
            at += p.numel()
    return found


def _some_state(engine: Any) -> dict[str, Any]:
    return next(iter(engine.optimizer.optimizer.state.values()), {})


def _steps(engine: Any) -> list[float]:
    return [float(state["step"]) for state in engine.optimizer.optimizer.state.values() if "step" in state]


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return tensor.float().numpy().copy() if tensor.is_floating_point() else tensor.numpy().copy()
