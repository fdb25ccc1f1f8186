"""Writing ZeRO checkpoints: what the stages have in common. The files are made with holes, which are then filled."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from tailor_dcp.catalog import STEP, Catalog
from tailor_dcp.errors import ConversionError
from tailor_dcp.tensors import Readable, Zeros, cast

from . import ranks
from .filling import Stretch, fill
from .options import Options
from .schedulers import whole_scheduler
from .streams import Part, stream
from .torch_holes import Holes, patch_checksums
from .trainer_folder import write_trainer_files
from .zero_classes import STAND_INS, DynamicLossScaler, LossScaler
from .zero_files import LATEST, is_name
from .zero_layout import Flat
from .zero_plan import Group, ZeroPlan, plan_of
from .zero_source import CARRIER, TAKEN

VERSION = "0.19.8"
"""The version of DeepSpeed whose files these are like, where the source tells none."""
_MASTER = torch.float32
_SCALER = {
    "cur_iter": 0, "last_overflow_iter": -1, "scale_factor": 2.0, "scale_window": 1000, "min_scale": 1,
    "delayed_shift": 1, "cur_hysteresis": 1, "consecutive_hysteresis": False, "raise_error_at_min_scale": True,
}  # fmt: skip
"""What DeepSpeed's adapting loss scaler starts with."""


class Stage(Protocol):
    """What differs between the stages."""

    def streams(self, plan: ZeroPlan) -> list[tuple[int, Flat]]:
        """Return the flat streams, each with the number of its param group."""
        ...

    def model(self, plan: ZeroPlan, flats: Sequence[Flat], rank: int, holes: Holes) -> dict[str, Any]:
        """Return what differs in the model's file of a rank."""
        ...

    def optim(self, plan: ZeroPlan, flats: Sequence[tuple[int, Flat]], rank: int, holes: Holes) -> dict[str, Any]:
        """Return what the optimizer's file of a rank holds of ZeRO."""
        ...

    def model_file(self, rank: int) -> str | None:
        """Return the name of the model's file of a rank; None if it has none."""
        ...


def write_zero(catalog: Catalog, place: Path, options: Options, number: int, stage: Stage) -> Sequence[str]:
    """Write a folder with a checkpoint and ``latest``; call it on all ranks.

    Args:
        catalog: what to write.
        place: the folder to make.
        options: ranks, dtype, the size of sub-groups, the tag.
        number: the stage's number.
        stage: the stage.

    Returns:
        What the user should know.

    Raises:
        ConversionError: it cannot be written as asked, the disk is full, or the like.
        DamagedSourceError: a source cannot be read.
    """
    plan = plan_of(catalog, options, number)
    tag = options.tag or f"global_step{plan.step}"
    folder = place / tag
    if not is_name(tag):
        raise ConversionError(f"--tag {tag} is no name of a folder; give one such as global_step{plan.step}.")
    ranks.together(lambda: folder.mkdir(parents=True) if ranks.rank() == 0 else None)
    uneven: list[str] = []
    flats = stage.streams(plan)
    stretches: list[Stretch] = []
    for path, tree, holes in _files(plan, folder, stage, flats):
        stretches += holes.save(tree, path, STAND_INS, options.allow)
    for group, flat in flats:
        uneven += uneven_steps(plan, flat, plan.groups[group])
    checked = fill(stretches, options.progress)
    ranks.together(lambda: _finish(catalog, place, tag, checked) if ranks.rank() == 0 else None)
    return (*plan.notes, *_about(plan, len(flats)), *uneven[:1])


def _finish(catalog: Catalog, place: Path, tag: str, checked: Sequence[tuple[Stretch, int]]) -> None:
    by_file: dict[Path, dict[int, int]] = {}
    for stretch, crc in checked:
        by_file.setdefault(stretch.file, {})[stretch.offset] = crc
    for path, crcs in by_file.items():
        patch_checksums(path, crcs)
    (place / LATEST).write_text(tag)
    write_trainer_files(catalog, place)


def _files(
    plan: ZeroPlan, folder: Path, stage: Stage, flats: Sequence[tuple[int, Flat]]
) -> Iterator[tuple[Path, dict[str, Any], Holes]]:
    prefix = "bf16_" if plan.dtype == torch.bfloat16 else ""
    common = {"ds_config": dict(plan.config), "ds_version": version_of(plan)}
    for rank in range(plan.world):
        name = stage.model_file(rank)
        if name is not None:
            holes = Holes()
            yield folder / name, model_tree(plan, stage.model(plan, [f for _, f in flats], rank, holes)), holes
        holes = Holes()
        tree = {"optimizer_state_dict": stage.optim(plan, flats, rank, holes), **common}
        yield folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", tree, holes


def _about(plan: ZeroPlan, streams: int) -> tuple[str, ...]:
    said = f"It is for an engine of ZeRO-{plan.stage} at {plan.world} rank{'s' if plan.world > 1 else ''}"
    if plan.stage == 3 and streams > len(plan.groups):
        said += f" with sub_group_size {plan.sub_group_size}"
    return (f"{said}; resume with engine.load_checkpoint.",)


def version_of(plan: ZeroPlan) -> str:
    """Return the version of DeepSpeed that the files tell of."""
    told = plan.zero.get("ds_version")
    return told if isinstance(told, str) and told else VERSION


# The model's file ---------------------------------------------------------------------------------------


def model_tree(plan: ZeroPlan, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model's file holds, in DeepSpeed's order; ``own`` is what the stage and the rank add."""
    zero = plan.zero
    tree: dict[str, Any] = {
        "module": None,
        "buffer_names": list(plan.buffers),
        "optimizer": None,
        "param_shapes": None,
        "frozen_param_shapes": None,
        "shared_params": dict(plan.shared),
        "frozen_param_fragments": None,
        "lr_scheduler": whole_scheduler(plan.catalog.train.get("scheduler")),
        "data_sampler": zero.get("data_sampler"),
        "random_ltd": zero.get("random_ltd"),
        "skipped_steps": int(zero.get("skipped_steps", 0)),
        "global_steps": plan.step,
        "global_samples": int(zero.get("global_samples", 0)),
        "dp_world_size": plan.world,
        "mp_world_size": 1,
        "ds_config": dict(plan.config),
        "ds_version": version_of(plan),
    }
    return {**tree, **own, **_client(plan)}


def _client(plan: ZeroPlan) -> dict[str, Any]:
    """Return the client's state: its own entries, and one for what DeepSpeed has no place for."""
    train = plan.catalog.train
    client = {name: value for name, value in train.items() if name not in TAKEN}
    own = train.get("client")
    client |= dict(own) if isinstance(own, Mapping) else {}
    # The Trainer's folder has files of its own for generators.
    carried = {name: train[name] for name in ("rng", "dataloader") if train.get(name) is not None}
    if "trainer_state" in train:
        carried.pop("rng", None)
    return {**client, CARRIER: carried} if carried else client


def shapes_of(plan: ZeroPlan, flats: Sequence[Flat]) -> list[OrderedDict[str, torch.Size]]:
    """Return the shapes of the parameters of each stream, in its order."""
    return [OrderedDict((name, plan.weight(name).size) for name in flat.held) for flat in flats]


def frozen_shapes(plan: ZeroPlan) -> OrderedDict[str, torch.Size]:
    """Return the shapes of the parameters that are not trained."""
    return OrderedDict((name, plan.weight(name).size) for name in plan.frozen)


# The optimizer's file -----------------------------------------------------------------------------------


def flat_of(
    flat: Flat, rank: int, length: int, of: Callable[[str], Readable | None], dtype: torch.dtype = _MASTER
) -> Readable:
    """Return a rank's part of a stream; zeros where there is padding, and for parameters that have nothing.

    Args:
        flat: the stream.
        rank: the rank.
        length: how much of its part is wanted.
        of: returns what the stream has of a parameter.
        dtype: the stream's dtype.
    """
    parts, at = [], 0
    for name, (_, offset, start, elements) in flat.of_rank(rank):
        parts.append(_nothing(offset - at, dtype))
        tensor = of(name)
        parts.append(Part(cast(tensor, dtype), start, elements) if tensor is not None else _nothing(elements, dtype))
        at = offset + elements
    return stream([length], dtype, [*parts, _nothing(length - at, dtype)])


def _nothing(elements: int, dtype: torch.dtype) -> Part:
    return Part(Zeros(torch.Size([elements]), dtype), 0, elements)


def weights_of(plan: ZeroPlan, flat: Flat, rank: int, length: int, holes: Holes) -> torch.Tensor:
    """Return the hole for a rank's part of the master weights."""
    return holes.make(flat_of(flat, rank, length, plan.weight))


def state_of(plan: ZeroPlan, flat: Flat, group: Group, rank: int, holes: Holes) -> dict[str, Any]:
    """Return the optimizer's state of a rank's part of a stream."""
    state = {kind: _single(plan, flat, group, kind) for kind in plan.singles}
    for kind in plan.kinds:
        state[kind] = holes.make(flat_of(flat, rank, flat.length, lambda name, kind=kind: _held(plan, name, kind)))  # type: ignore[misc]
    return state


def _held(plan: ZeroPlan, name: str, kind: str) -> Readable | None:
    return plan.catalog.state.get(name, {}).get(kind)


def _single(plan: ZeroPlan, flat: Flat, group: Group, kind: str) -> Any:
    """Return a value of a whole stream: that of the parameter with the most steps."""
    newest = max(flat.held, key=lambda name: _step(plan, name))
    held = _held(plan, newest, kind)
    value = held.whole() if held is not None else torch.tensor(0.0)
    return int(value.item()) if kind == STEP and group.plain_steps else value.reshape(()).to(_MASTER)


def _step(plan: ZeroPlan, name: str) -> float:
    held = _held(plan, name, STEP)
    return float(held.whole().item()) if held is not None else 0.0


def uneven_steps(plan: ZeroPlan, flat: Flat, group: Group) -> list[str]:
    """Say where parameters of one stream were stepped differently often, which ZeRO cannot keep."""
    steps = {name: _step(plan, name) for name in flat.held}
    oldest, newest = min(steps, key=lambda n: steps[n]), max(steps, key=lambda n: steps[n])
    if steps[oldest] == steps[newest]:
        return []
    return [
        f"ZeRO counts steps for whole buffers, but {oldest} is at step {steps[oldest]:.0f} and {newest} at step "
        f"{steps[newest]:.0f} in the same one; the newest counts for all."
    ]


def hyperparameters(groups: Sequence[Group], numbers: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Return the param groups as an optimizer's state has them, their parameters being numbers of streams."""
    return [{**group.values, "params": list(n)} for group, n in zip(groups, numbers, strict=True)]


def scaler_of(plan: ZeroPlan) -> dict[str, Any]:
    """Return the entries about the loss scale, which only fp16 has use for."""
    zero = plan.zero
    if plan.dtype != torch.float16:
        return {"loss_scaler": LossScaler(cur_scale=1.0, dynamic=False), "dynamic_loss_scale": False, "overflow": False}
    section = plan.config.get("fp16") or {}
    power = section.get("initial_scale_power", 16)
    scale = float(zero.get("loss_scale", 0)) or float(section.get("loss_scale") or 0) or 2.0**power
    if section.get("loss_scale") and "cur_iter" not in zero:
        return {
            "loss_scaler": LossScaler(cur_scale=scale, dynamic=False),
            "dynamic_loss_scale": False,
            "overflow": False,
        }
    values = {name: zero.get(name, value) for name, value in _SCALER.items()}
    scaler = DynamicLossScaler(cur_scale=scale, dynamic=True, dtype=torch.float16, **values)
    return {"loss_scaler": scaler, "dynamic_loss_scale": True, "overflow": False}
