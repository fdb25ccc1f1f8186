"""What a DeepSpeed engine counts: ``train.step`` and ``train.zero.<name>``."""

from __future__ import annotations

from typing import Any

from tailor_dcp.integrations.zero_model import clean, persistent_buffers

_COUNTERS = ("global_samples", "skipped_steps", "micro_steps")
# Of a loss scaler that adapts; others have nothing but the scale.
_SCALER = ("cur_iter", "last_overflow_iter", "cur_hysteresis")

NAMES = frozenset({"step", "zero"})
"""Names under ``train.`` that are an engine's."""


class EngineCounters:
    """The engine's own numbers, as one thing with a state."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def state_dict(self) -> dict[str, Any]:
        """Return what is saved."""
        engine = self._engine
        scaler = engine.optimizer.loss_scaler
        zero: dict[str, Any] = {name: int(getattr(engine, name)) for name in _COUNTERS}
        zero |= {"loss_scale": float(scaler.cur_scale)}
        zero |= {name: int(getattr(scaler, name)) for name in _SCALER if scaler.dynamic and hasattr(scaler, name)}
        return {"step": int(engine.global_steps), "zero": {**zero, **_described(engine)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what there is of it."""
        engine = self._engine
        if "step" in state_dict:
            engine.global_steps = int(state_dict["step"])
        zero = state_dict.get("zero", {})
        for name in [name for name in _COUNTERS if name in zero]:
            setattr(engine, name, int(zero[name]))
        # Gradients are not saved, so accumulating them begins anew; a step may take other numbers of batches now.
        engine.micro_steps -= engine.micro_steps % engine.gradient_accumulation_steps()
        scaler = engine.optimizer.loss_scaler
        if scaler.dynamic and "loss_scale" in zero:
            scaler.cur_scale = float(zero["loss_scale"])
            for name in [name for name in _SCALER if name in zero and hasattr(scaler, name)]:
                setattr(scaler, name, int(zero[name]))


def _described(engine: Any) -> dict[str, Any]:
    """Return what converters to DeepSpeed's own files cannot tell from tensors; no load takes it over."""
    module = engine.module
    return {
        "stage": int(engine.zero_optimization_stage()),
        "world_size": int(engine.dp_world_size),
        "dtype": "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32",
        "buffers": [clean(name) for name, _ in persistent_buffers(module)],
        "frozen": [clean(name) for name, parameter in module.named_parameters() if not parameter.requires_grad],
    }
