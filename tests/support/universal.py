"""DeepSpeed's own side of universal checkpoints, for the workers of ``zero_engines``."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from typing import Any

from tests.support import zero_engines


class _Universal(zero_engines.Setup):
    """An engine that loads universal checkpoints."""

    def config(self) -> dict[str, Any]:
        return {**super().config(), "checkpoint": {"load_universal": True}}


def load_and_train(group: Any, setup: dict[str, Any], folder: str, further: int = 2) -> dict[str, Any]:
    """Load a universal checkpoint into an engine of other weights, and go on."""
    made = _Universal(**setup)
    engine = zero_engines._engine(made, seed=2)
    before = [dict(g) for g in engine.optimizer.optimizer.param_groups]
    path, _ = engine.load_checkpoint(folder)
    if path is None:
        raise AssertionError(f"{folder} was not loaded")
    loaded = zero_engines.state_of(engine)
    losses = zero_engines._train(engine, made, further)
    made_with = [{k: v for k, v in g.items() if k != "params"} for g in before]
    return {"saved": loaded, "losses": losses, "after": zero_engines.state_of(engine), "made_with": made_with}


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
