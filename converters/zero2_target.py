"""Writing ZeRO-2 checkpoints, and ZeRO-1's: a param group is one flat stream, of which each rank has an equal part."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tailor_dcp.catalog import Catalog
from tailor_dcp.tensors import Readable, cast

from .options import Options
from .torch_holes import Holes
from .zero_classes import Fragment, ZeroStage
from .zero_layout import Flat, cut_whole, dealt, gaps_of
from .zero_plan import ZeroPlan
from .zero_target import (
    frozen_shapes,
    hyperparameters,
    scaler_of,
    shapes_of,
    state_of,
    version_of,
    weights_of,
    write_zero,
)


def write(catalog: Catalog, place: Path, final: Path, options: Options) -> Sequence[str]:
    """Write a folder that a ZeRO-2 engine's ``load_checkpoint`` takes; see ``zero_target.write_zero``."""
    return write_zero(catalog, place, options, 2, Stage12(2))


class Stage12:
    """ZeRO-1 and 2.

    Args:
        stage: which.
    """

    def __init__(self, stage: int) -> None:
        self._stage = stage

    def streams(self, plan: ZeroPlan) -> list[tuple[int, Flat]]:
        """Return a stream for each group; its order and gaps are the configuration's."""
        return [
            (number, cut_whole(counts, plan.world, self._gaps(plan, counts)))
            for number, group in enumerate(plan.groups)
            for counts in [plan.counts(self._order(plan, group.names))]
        ]

    def _order(self, plan: ZeroPlan, names: Sequence[str]) -> Sequence[str]:
        return dealt(names, plan.world) if plan.zero_config.get("round_robin_gradients") is True else names

    def _gaps(self, plan: ZeroPlan, counts: Sequence[tuple[str, int]]) -> list[int]:
        aligned = plan.zero_config.get("parameter_alignment") is True
        return gaps_of(counts, plan.dtype.itemsize) if aligned else [0] * len(counts)

    def model_file(self, rank: int) -> str | None:
        """Return the name of the one file, which rank 0 writes."""
        return None if rank else "mp_rank_00_model_states.pt"

    def model(self, plan: ZeroPlan, flats: Sequence[Flat], rank: int, holes: Holes) -> dict[str, Any]:
        """Return the whole module, in the dtype that it computes in."""
        made: dict[int, Readable] = {}  # tied names have one tensor here, too

        def narrow(name: str) -> Readable:
            weight = plan.weight(name)
            return weight if name in plan.buffers else made.setdefault(id(weight), cast(weight, plan.dtype))

        own: dict[str, Any] = {
            "module": OrderedDict((name, holes.make(narrow(name))) for name in plan.catalog.weights),
            "param_shapes": shapes_of(plan, flats),
        }
        if self._stage == 2:
            own["frozen_param_shapes"] = frozen_shapes(plan)
            own["frozen_param_fragments"] = OrderedDict((n, holes.make(narrow(n))) for n in plan.frozen)
        return own

    def optim(self, plan: ZeroPlan, flats: Sequence[tuple[int, Flat]], rank: int, holes: Holes) -> dict[str, Any]:
        """Return the rank's parts: master weights without the padding at the end, states with it."""
        states = {n: state_of(plan, flat, plan.groups[n], rank, holes) for n, flat in flats}
        names = [[*flat.held] for _, flat in flats]
        return {
            **scaler_of(plan),
            **_clipping(plan),
            "base_optimizer_state": {
                "state": {number: state for number, state in states.items() if state},
                "param_groups": hyperparameters(plan.groups, [[number] for number, _ in flats]),
            },
            "single_partition_of_fp32_groups": [
                weights_of(plan, flat, rank, flat.filled[rank], holes) for _, flat in flats
            ],
            "zero_stage": ZeroStage(self._stage),
            "group_paddings": [flat.length - flat.filled[rank] for _, flat in flats],
            "param_alignment_paddings": [self._gaps(plan, plan.counts(held)) for held in names],
            "partition_count": [plan.world] * len(flats),
            "ds_version": version_of(plan),
            "param_slice_mappings": [
                OrderedDict((name, Fragment(held.length, held.offset)) for name, held in flat.of_rank(rank))
                for _, flat in flats
            ],
        }


def _clipping(plan: ZeroPlan) -> dict[str, float]:
    """Return the bound of the gradients' norm as the source had it; without it, the engine's own counts."""
    told = plan.config.get("gradient_clipping", plan.zero.get("clip_grad"))
    return {"clip_grad": float(told)} if isinstance(told, int | float) else {}
