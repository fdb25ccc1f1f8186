"""ZeRO checkpoints without DeepSpeed: made up, written by the converter, and then damaged on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tailor_dcp.catalog import Catalog
from tailor_dcp.converters import zero1_target, zero2_target, zero3_target
from tailor_dcp.converters.options import Options
from tailor_dcp.converters.zero_classes import STAND_INS, pickle_by_name
from tailor_dcp.tensors import Given

TARGETS = {1: zero1_target, 2: zero2_target, 3: zero3_target}


def catalog(moments: bool = True, **changes: Any) -> Catalog:
    """Return a small model with two param groups, a frozen parameter, a tie and a buffer, after five steps."""
    draw = torch.Generator().manual_seed(1)
    shapes = {"a.weight": (7, 5), "a.bias": (7,), "b.weight": (3, 2, 5), "one": (1,), "big": (64, 70)}
    weights = {name: Given(torch.randn(shape, generator=draw)) for name, shape in shapes.items()}
    tied = {"b.tied": weights["b.weight"]}
    fixed = {"frozen": Given(torch.randn(11, generator=draw)), "table": Given(torch.arange(4))}
    states = {
        name: {
            "step": Given(torch.tensor(5.0)),
            "exp_avg": Given(torch.randn(shape, generator=draw)),
            "exp_avg_sq": Given(torch.rand(shape, generator=draw)),
        }
        for name, shape in shapes.items()
    }
    group = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    made = Catalog(
        source=Path("made up"),
        format="dcp",
        weights={**weights, **tied, **fixed},
        state=states if moments else {},
        groups=(
            {**group, "params": ["a.weight", "b.weight", "big"]},
            {**group, "weight_decay": 0.0, "params": ["a.bias", "one"]},
        )
        if moments
        else (),
        train={"step": 5, "scheduler": {"last_epoch": 5}, "note": "hello"} if moments else {},
        buffers=frozenset({"table"}),
        frozen=frozenset({"frozen"}),
    )
    return replace(made, **changes)


def sample(folder: Path, stage: int = 3, world: int = 2, **options: Any) -> Path:
    """Write a checkpoint and return the folder of its files."""
    TARGETS[stage].write(catalog(), folder, folder, Options(world_size=world, **options))
    return folder / "global_step5"


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a file holds."""
    with torch.serialization.safe_globals([(cls, name) for name, cls in STAND_INS.items()]):
        tree = torch.load(path, weights_only=True)
    change(tree)
    torch.save(tree, path, pickle_module=pickle_by_name(STAND_INS))
