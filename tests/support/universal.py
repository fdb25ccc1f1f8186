"""DeepSpeed's own side of universal checkpoints, for the workers of ``zero_engines``."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from typing import Any

import torch
import torch.distributed as dist

from tests.support import zero_engines


class _Universal(zero_engines.Setup):
    """An engine that loads universal checkpoints."""

    def config(self) -> dict[str, Any]:
        return {**super().config(), "checkpoint": {"load_universal": True}}


def load_and_train(group: Any, setup: dict[str, Any], folder: str, further: int = 2) -> dict[str, Any]:
    """Load a universal checkpoint into an engine of other weights, and go on."""
    made = _Universal(**setup)
    engine = zero_engines._engine(made, seed=2)
    path, _ = engine.load_checkpoint(folder)
    if path is None:
        raise AssertionError(f"{folder} was not loaded")
    loaded = zero_engines.state_of(engine) | _moments(engine)
    losses = zero_engines._train(engine, made, further)
    return {"saved": loaded, "losses": losses, "after": zero_engines.state_of(engine)}


def _moments(engine: Any) -> dict[str, Any]:
    """Return the moments of ZeRO-1 and 2, whose buffers have no padding after universal loading."""
    if int(engine.zero_optimization_stage()) == 3:
        return {}
    zero = engine.optimizer
    found: dict[str, Any] = {}
    for kind in ("exp_avg", "exp_avg_sq"):
        found[kind] = {}
        for number, flat in enumerate(zero.single_partition_of_fp32_groups):
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, zero.optimizer.state[flat][kind].detach())
            whole = torch.cat([torch.nn.functional.pad(part, (0, flat.numel() - part.numel())) for part in parts])
            places = zip(zero.round_robin_bit16_groups[number], zero.round_robin_bit16_offsets[number], strict=True)
            for p, at in places:
                found[kind][engine.param_names[p]] = whole[at : at + p.numel()].reshape(p.shape).float().numpy().copy()
    return found


def to_universal(group: Any, setup: dict[str, Any], source: str, target: str) -> None:
    """Run DeepSpeed's converter."""
    if int(os.environ["RANK"]):
        return
    from deepspeed.checkpoint import ds_to_universal

    told = argparse.Namespace(
        input_folder=source, output_folder=target, num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(told)


def convert_together(group: Any, source: str, target: str, to: str) -> list[str]:
    """Convert with all workers as the ranks that share the work, from whatever it is; return what was said."""
    from tailor_dcp.converters.convert import convert

    return list(convert(source, target, to).notes)
