"""Runs as LLMTailor and StreamCheck have them: real ZeRO-3 engines with a param group for each layer, and saves of
some units only, which are cut out of DeepSpeed's own full ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.zero_engines import fleet, state_of
from tests.support.zero_nets import VOCABULARY, batch, loss_of
from tests.support.zero_samples import edit

LAYERS = 4
MOMENTS = ("exp_avg", "exp_avg_sq")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_WORLD = 2
_engines: dict[str, Any] = {}  # of a worker, which keeps them from call to call


def call(function: str, *args: Any) -> list[Any]:
    """Call a function of this module in two workers."""
    return fleet(_WORLD).call(f"{__name__}:{function}", *args)


def unit_of(fqn: str, tied: bool = False) -> int:
    """Return the number that StreamCheck gives to a parameter's unit."""
    layer = _LAYER.match(fqn)
    if layer:
        return int(layer[1]) + 1
    return 0 if "norm" in fqn else LAYERS + 1 if tied or fqn == "lm_head.weight" else LAYERS + 2


# Engines, in the workers --------------------------------------------------------------------------------


def make_net(seed: int, tied: bool) -> Any:
    """Return a small Llama."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        num_hidden_layers=LAYERS, hidden_size=12, intermediate_size=18, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, max_position_embeddings=16, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def groups_of(model: torch.nn.Module, per_layer: bool) -> list[dict[str, Any]]:
    """Return LLMTailor's param groups, one for each layer and decay, or the two of most trainings."""
    sorts: dict[bool, dict[Any, list[Any]]] = {False: defaultdict(list), True: defaultdict(list)}
    for name, parameter in model.named_parameters():
        layer = _LAYER.match(name)
        key = ((1, int(layer[1])) if layer else (0, name)) if per_layer else (0, "all")
        sorts["norm" not in name and "bias" not in name][key].append(parameter)
    return [
        {"params": held[key], "weight_decay": 0.1 if decay else 0.0}
        for decay, held in sorts.items()
        for key in sorted(held)
    ]


def _engine(seed: int, tied: bool, per_layer: bool, dtype: str) -> Any:
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    model = make_net(seed, tied)
    optimizer = torch.optim.AdamW(groups_of(model, per_layer), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    config = {
        "train_batch_size": 2 * _WORLD,
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 30},
        "data_types": {"grad_accum_dtype": dtype},
        **({dtype: {"enabled": True}} if dtype != "fp32" else {}),
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config, dist_init_required=False
    )
    return engine


def _train(engine: Any, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = loss_of(engine, "llama", batch(engine.global_steps, engine.global_rank))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def _parameters(engine: Any) -> Iterable[tuple[str, Any]]:
    return ((engine.param_names[p], p) for p in engine.module.parameters())


def _held(engine: Any, name: str, parameter: Any) -> dict[str, torch.Tensor]:
    """Return a parameter's weight, moments and step, gathered."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    held = {kind: safe_get_full_optimizer_state(parameter, kind).clone() for kind in MOMENTS}
    return {"weight": safe_get_full_fp32_param(parameter).clone(), "step": _state(engine, name)["step"].clone(), **held}


def _state(engine: Any, name: str) -> dict[str, Any]:
    """Return the optimizer's state of the flat stream that a parameter is in."""
    zero = engine.optimizer
    number = next(i for i, g in enumerate(zero.fp16_groups) if any(engine.param_names[p] == name for p in g))
    return zero.optimizer.state[zero.fp32_partitioned_groups_flat[number]]


def train_run(group: Any, run: str, saves: list[int], tied: bool, per_layer: bool, dtype: str) -> list[float]:
    """Train, and save at some steps into folders as the Trainer makes them."""
    engine = _engines[run] = _engine(1, tied, per_layer, dtype)
    losses: list[float] = []
    for step in saves:
        losses += _train(engine, step - engine.global_steps)
        folder = Path(run, f"checkpoint-{step}")
        engine.save_checkpoint(str(folder))
        weights = {name: _held(engine, name, p)["weight"] for name, p in _parameters(engine)}
        if engine.global_rank == 0:
            save_file({n: w.to(torch.bfloat16) for n, w in weights.items()}, folder / "model.safetensors")
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
            engine.module.config.save_pretrained(folder)
    return losses


def by_hand(group: Any, run: str, chosen: Mapping[str, str], newest: str, out: str) -> None:
    """Put an engine together: all of the newest full checkpoint, and some parameters of others; save it.

    Args:
        group: the workers.
        run: whose engine to use.
        chosen: the full checkpoint of each parameter.
        newest: that which the rest comes from.
        out: where DeepSpeed saves what came of it.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    engine, held = _engines[run], {}
    for folder in sorted({*chosen.values()}):  # all ranks in one order
        engine.load_checkpoint(folder)
        held |= {name: _held(engine, name, p) for name, p in _parameters(engine) if chosen[name] == folder}
    engine.load_checkpoint(newest)
    for name, parameter in _parameters(engine):
        safe_set_full_fp32_param(parameter, held[name]["weight"])
        for kind in MOMENTS:
            safe_set_full_optimizer_state(parameter, held[name][kind], kind)
    for number, stream in enumerate(engine.optimizer.fp16_groups):  # which has one step for all of its parameters
        flat = engine.optimizer.fp32_partitioned_groups_flat[number]
        newest_step = max(held[engine.param_names[p]]["step"] for p in stream)
        engine.optimizer.optimizer.state[flat]["step"].copy_(newest_step)
    engine.save_checkpoint(out)


def resume(group: Any, run: str, folder: str, tied: bool, per_layer: bool, dtype: str, steps: int) -> dict[str, Any]:
    """Load into an engine of other weights and go on; return what was loaded, the losses, and the state then."""
    name = f"{run} again"
    engine = _engines[name] = _engines.get(name) or _engine(2, tied, per_layer, dtype)
    path, _ = engine.load_checkpoint(folder)
    assert path is not None, f"{folder} was not loaded"
    loaded = state_of(engine)
    return {"loaded": loaded, "losses": _train(engine, steps), "after": state_of(engine)}


def forget(group: Any) -> None:
    """Let the engines go."""
    _engines.clear()


# Partial checkpoints -------------------------------------------------------------------------------------


def cut(full: Path, out: Path, units: Collection[int], tied: bool = False) -> Path:
    """Make of a full checkpoint the one that StreamCheck would have saved of some units.

    Args:
        full: the Trainer's folder.
        out: the folder to make.
        units: the numbers of the units: 0 is the norm, then come the layers, the head and the embeddings.
        tied: whether the model's embeddings are one tensor.
    """
    shutil.copytree(full, out)
    kept = {name for name in load_file(out / "model.safetensors") if unit_of(name, tied) in units}
    weights = load_file(out / "model.safetensors")
    save_file({name: weights[name] for name in kept}, out / "model.safetensors")
    for model in out.glob("global_step*/*_model_states.pt"):
        shapes: list[Any] = []
        edit(model, lambda tree, shapes=shapes: shapes.extend(tree["param_shapes"]))
        numbers = [number for number, group in enumerate(shapes) if unit_of(next(iter(group)), tied) in units]
        for optim in model.parent.glob(f"*{model.name.replace('model_states', 'optim_states')}"):
            edit(optim, lambda tree, numbers=numbers: _cut(tree["optimizer_state_dict"], numbers))
    return out


def _cut(zero: dict[str, Any], numbers: list[int]) -> None:
    optimizer = zero["optimizer_state_dict"]
    optimizer["state"] = {number: optimizer["state"][number] for number in numbers}
    optimizer["param_groups"] = [optimizer["param_groups"][number] for number in numbers]
    zero["fp32_flat_groups"] = [zero["fp32_flat_groups"][number].clone() for number in numbers]


def write_log(path: Path, lines: Iterable[tuple[int, Iterable[int]]]) -> Path:
    """Write a flag log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"step": step, "flag": sorted(units)}) + "\n" for step, units in lines))
    return path
