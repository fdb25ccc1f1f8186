"""Writing ZeRO-3 checkpoints: every parameter is cut in equal parts, one a rank."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tailor_dcp.catalog import Catalog
from tailor_dcp.tensors import cast

from .options import Options
from .torch_holes import Holes
from .zero_classes import ZeroStage
from .zero_layout import Flat, cut_each, sub_groups
from .zero_plan import ZeroPlan
from .zero_target import (
    flat_of,
    frozen_shapes,
    hyperparameters,
    scaler_of,
    shapes_of,
    state_of,
    weights_of,
    write_zero,
)


def write(catalog: Catalog, place: Path, final: Path, options: Options) -> Sequence[str]:
    """Write a folder that a ZeRO-3 engine's ``load_checkpoint`` takes; see ``zero_target.write_zero``."""
    return write_zero(catalog, place, options, 3, _Stage3())


class _Stage3:
    def streams(self, plan: ZeroPlan) -> list[tuple[int, Flat]]:
        return [
            (number, cut_each(counts, plan.world))
            for number, group in enumerate(plan.groups)
            for counts in sub_groups(plan.counts(group.names), plan.world, plan.sub_group_size)
        ]

    def model_file(self, rank: int) -> str | None:
        return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"

    def model(self, plan: ZeroPlan, flats: Sequence[Flat], rank: int, holes: Holes) -> dict[str, Any]:
        absent = torch.empty(0, dtype=plan.dtype)  # parameters are elsewhere, but their names are asked for
        names = plan.catalog.weights
        return {
            "module": OrderedDict((n, holes.make(plan.weight(n)) if n in plan.buffers else absent) for n in names),
            "param_shapes": shapes_of(plan, flats),
            "frozen_param_shapes": frozen_shapes(plan),
            "frozen_param_fragments": OrderedDict((n, _fragment(plan, n, rank, holes)) for n in plan.frozen),
        }

    def optim(self, plan: ZeroPlan, flats: Sequence[tuple[int, Flat]], rank: int, holes: Holes) -> dict[str, Any]:
        numbers = [[n for n, (of, _) in enumerate(flats) if of == group] for group in range(len(plan.groups))]
        states = {n: state_of(plan, flat, plan.groups[group], rank, holes) for n, (group, flat) in enumerate(flats)}
        return {
            "zero_stage": ZeroStage(3),
            **scaler_of(plan),
            "partition_count": plan.world,
            "optimizer_state_dict": {
                "state": {number: state for number, state in states.items() if state},
                "param_groups": hyperparameters(plan.groups, numbers),
            },
            "fp32_flat_groups": [weights_of(plan, flat, rank, flat.length, holes) for _, flat in flats],
        }


def _fragment(plan: ZeroPlan, name: str, rank: int, holes: Holes) -> torch.Tensor:
    """Return the hole for a rank's part of a parameter that is not trained."""
    weight = cast(plan.weight(name), plan.dtype)
    flat = cut_each([(name, weight.count)], plan.world)
    return holes.make(flat_of(flat, rank, flat.length, lambda _: weight, weight.dtype))
