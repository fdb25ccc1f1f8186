"""Which DeepSpeed engines are known, and why others are refused."""

from __future__ import annotations

from typing import Any

from tailor_dcp.errors import TailorError
from tailor_dcp.integrations.zero3 import Zero3Layout
from tailor_dcp.integrations.zero12 import Zero12Layout
from tailor_dcp.integrations.zero_layout import Layout

_INSTEAD = "save it with engine.save_checkpoint"


def check(engine: Any) -> None:
    """Make sure that all of an engine's state is found.

    Raises:
        TailorError: this is no engine, or one that keeps something elsewhere than is looked for.
    """
    _check_class(engine)
    stage = int(engine.zero_optimization_stage())
    if stage == 0:
        raise TailorError(
            "This engine does not use ZeRO (stage 0), so its parameters are whole; save it with "
            "TrainState(engine.module, engine.optimizer), or set zero_optimization.stage to 1, 2 or 3."
        )
    why = _unknown_parallelism(engine) or unknown_storage(engine._config.zero_config)
    if why:
        raise TailorError(f"EngineState does not know how {why[0]}; {why[1] or _INSTEAD}.")
    _check_optimizer(engine.optimizer)


def layout_of(engine: Any) -> Layout:
    """Return where an engine keeps its state, as it is now.

    Raises:
        TailorError: states were moved away with ``engine.offload_states``.
    """
    zero = engine.optimizer
    if getattr(zero, "offloaded_states", None):
        raise TailorError(
            "The engine's states were moved away with engine.offload_states; call engine.reload_states before "
            "saving or loading."
        )
    return Zero3Layout(zero) if int(engine.zero_optimization_stage()) == 3 else Zero12Layout(zero)


def _check_class(engine: Any) -> None:
    try:
        from deepspeed import DeepSpeedEngine, PipelineEngine  # noqa: PLC0415
    except ImportError as error:
        raise TailorError(
            "EngineState needs DeepSpeed, which is not installed here; pip install 'tailor-dcp[zero]'."
        ) from error
    if not isinstance(engine, DeepSpeedEngine):
        raise TailorError(
            f"EngineState takes the engine that deepspeed.initialize returns, not a {type(engine).__name__}; for a "
            f"model and its optimizer there is TrainState."
        )
    if isinstance(engine, PipelineEngine):
        raise TailorError(f"EngineState does not know how a pipeline cuts the model; {_INSTEAD}.")


_Why = tuple[str, str]
"""What is not known, and the way out if there is a better one than DeepSpeed's own checkpoint."""


def _unknown_parallelism(engine: Any) -> _Why | None:
    if engine.has_moe_layers:
        return "experts are spread over ranks (MoE)", ""
    if max(engine.mp_world_size or 1, engine.autotp_size()) > 1:
        return "tensor parallelism cuts the parameters", ""
    return None


def unknown_storage(zero: Any) -> _Why | None:
    """Return what is not known of where an engine keeps its state, None if all of it is.

    Args:
        zero: DeepSpeed's configuration of ZeRO.
    """
    for option in (zero.offload_optimizer, zero.offload_param):
        if option is not None and option.device == "nvme":
            return "states are kept on NVMe", "offload to the CPU instead"
    offload = zero.offload_optimizer
    if offload is not None and (offload.ratio != 1 or offload.super_offload):
        return "the optimizer is offloaded in part", "set offload_optimizer.ratio to 1 and super_offload to false"
    if zero.zero_hpz_partition_size > 1 or zero.zero_quantized_weights or zero.zero_quantized_nontrainable_weights:
        return "ZeRO++ keeps other copies of the weights", "leave zero_hpz_partition_size and zero_quantized_* out"
    if zero.zenflow is not None:
        return "ZenFlow delays updates", "leave zenflow out"
    return None


def _check_optimizer(zero: Any) -> None:
    name = type(zero).__name__
    if name == "BF16_Optimizer":
        raise TailorError(
            "EngineState does not know DeepSpeed's BF16_Optimizer, which is used for ZeRO-1 in bf16 with fp32 "
            "gradients; set zero_optimization.stage to 2, or data_types.grad_accum_dtype to bf16."
        )
    if name == "DeepSpeedZeRoOffload":
        raise TailorError("This engine has no optimizer and trains nothing; there is nothing to resume from it.")
    if name not in ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"):
        raise TailorError(f"EngineState does not know DeepSpeed's {name}; {_INSTEAD}.")
    if getattr(zero, "use_muon", False):
        raise TailorError(f"EngineState does not know how Muon keeps its momentum; {_INSTEAD}.")
