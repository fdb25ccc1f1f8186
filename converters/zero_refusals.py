"""Kinds of DeepSpeed checkpoints whose files hold something else than they seem to: told by name, and not read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailor_dcp.errors import ConversionError

_UNIVERSAL = "convert it with DeepSpeed's ds_to_universal.py"
_GATHER = "have it saved with stage3_gather_16bit_weights_on_model_save, or go on without that option for a save"
_QUANTIZED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse what a configuration says that its files do not hold as usual.

    Args:
        path: where the configuration was found.
        config: DeepSpeed's.

    Raises:
        ConversionError: naming what it is.
    """
    zero = config.get("zero_optimization")
    why = _storage(zero if isinstance(zero, Mapping) else {})
    if why:
        raise ConversionError(f"{path} was saved with {why}, which is not read; {_GATHER}.")


def _storage(zero: Mapping[str, Any]) -> str | None:
    for option in ("offload_optimizer", "offload_param"):
        device = zero.get(option)
        if isinstance(device, Mapping) and device.get("device") == "nvme":
            return f"{option} to NVMe, whose states lie in files elsewhere"
    if _number(zero.get("mics_shard_size")) > 0:
        return "MiCS (mics_shard_size), which keeps several copies of the shards"
    if _number(zero.get("zero_hpz_partition_size")) > 1:
        return "hpZ of ZeRO++ (zero_hpz_partition_size), which keeps a second copy of the weights"
    for option in _QUANTIZED:
        if zero.get(option) is True:
            return f"ZeRO++ ({option})"
    if zero.get("zenflow"):
        return "ZenFlow, which delays updates"
    return None


def check_model(path: Path, tree: Mapping[str, Any]) -> None:
    """Refuse a model's file that holds a part of the model only.

    Args:
        path: the file.
        tree: what is in it.

    Raises:
        ConversionError: naming what it is.
    """
    dimensions = tree.get("checkpoint_parallel_dimensions")
    dimensions = dimensions if isinstance(dimensions, Mapping) else {}
    if max(_number(tree.get("mp_world_size")), _number(dimensions.get("tp_degree"))) > 1:
        raise ConversionError(f"{path} is of a run with tensor parallelism, whose parts are not read; {_UNIVERSAL}.")
    if _number(dimensions.get("pp_degree")) > 1:
        raise ConversionError(f"{path} is of a run with pipeline stages, which are not read; {_UNIVERSAL}.")
    experts = tree.get("num_experts")
    if tree.get("ds_autoep_layers") or (isinstance(experts, list) and experts and max(map(_number, experts)) > 0):
        raise ConversionError(f"{path} is of a model whose experts are in other files (MoE), not read; {_UNIVERSAL}.")


def check_optimizer(path: Path, state: Mapping[str, Any]) -> None:
    """Refuse an optimizer's file in a form that is not read.

    Args:
        path: the file.
        state: ZeRO's part of it.

    Raises:
        ConversionError: naming the form.
    """
    if isinstance(state.get("base_optimizer_state"), list):
        raise ConversionError(f"{path} was saved with elastic_checkpoint, which is not read; {_UNIVERSAL}.")
    if "ds_zero_partition_groups" in state:
        raise ConversionError(
            f"{path} is of a model whose experts are spread over ranks (MoE), not read; {_UNIVERSAL}."
        )


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0
