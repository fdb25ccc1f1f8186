"""Writing DeepSpeed universal checkpoints: a file for each parameter and state, for any stage and number of ranks.

An engine loads them with ``checkpoint: {load_universal: true}`` in its configuration.

Two things are unlike what DeepSpeed's own converter writes. There are the model's files of both kinds, so that engines
of ZeRO-3 and of ZeRO-1 and 2 find theirs. And a ZeRO-3 engine, which gives all param groups the hyper-parameters of
the first, is told only those that are the same in all: the others stay as its optimizer was made.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tailor_dcp.catalog import STEP, Catalog
from tailor_dcp.errors import ConversionError
from tailor_dcp.tensors import Readable, Zeros, cast

from . import ranks
from .filling import Stretch, fill
from .options import Options, Progress
from .schedulers import whole_scheduler
from .torch_holes import Holes, patch_checksums
from .trainer_folder import write_trainer_files
from .zero_classes import STAND_INS, ZeroStage
from .zero_layout import dealt
from .zero_plan import ZeroPlan, plan_of
from .zero_target import frozen_shapes, model_tree, scaler_of, version_of

FOLDER = "zero"
LATEST = "latest_universal"
GROUPS = "optimizer_state.pt"
WEIGHT = "fp32"
PARAM = "param"
MODEL = "mp_rank_00_model_states.pt"
MODEL3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"
MARK = "tailor_dcp"
"""An entry that only our files have."""
_ADAM = {"exp_avg", "exp_avg_sq"}
_VERSION = 0.4
"""Of the format, as DeepSpeed counts."""
_AT_ONCE = 256
"""Files that are filled together: a process may not have many more open."""


def write(catalog: Catalog, place: Path, final: Path, options: Options) -> Sequence[str]:
    """Write a folder with a universal checkpoint and ``latest_universal``; call it on all ranks.

    Args:
        catalog: what to write.
        place: the folder to make.
        final: the name that it will have.
        options: the tag, the ranks that the engine's configuration tells of.

    Raises:
        ConversionError: it cannot be written as asked, the disk is full, or the like.
        DamagedSourceError: a source cannot be read.
    """
    stage = catalog.train.get("zero", {}).get("stage") if isinstance(catalog.train.get("zero"), Mapping) else None
    plan = plan_of(catalog, options, stage if stage in (1, 2, 3) else 3)
    tag = options.tag or f"global_step{plan.step}_universal"
    if not is_name(tag):
        raise ConversionError(f"--tag {tag} is no name of a folder; give one such as global_step{plan.step}_universal.")
    _check_names(plan)
    steps = [max((_step(plan, name) for name in group.names), default=0.0) for group in plan.groups]
    _fill(_files(plan, place / tag, steps), options)
    ranks.together(lambda: _finish(catalog, place, tag) if ranks.rank() == 0 else None)
    return (*plan.notes, *_notes(plan, steps))


def is_name(text: str) -> bool:
    """Tell whether a text names something within a folder, and does not lead out of it."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # half of a character
        return False
    return text not in ("", ".", "..") and not {"/", "\0"}.intersection(text)


def _check_names(plan: ZeroPlan) -> None:
    for group in plan.groups:
        for name in group.names:
            if not is_name(name):
                raise ConversionError(f"{name!r} is no name for a folder, which a universal checkpoint has for each.")


def _finish(catalog: Catalog, place: Path, tag: str) -> None:
    (place / LATEST).write_text(tag)
    write_trainer_files(catalog, place)


def _fill(files: Iterator[tuple[Path, Any, Holes]], options: Options) -> None:
    """Make the files, and fill them some at a time."""
    waiting: list[Stretch] = []
    for count, (path, tree, holes) in enumerate(files, 1):
        ranks.together(lambda path=path: path.parent.mkdir(parents=True, exist_ok=True))  # type: ignore[misc]
        waiting += holes.save(tree, path, STAND_INS, options.allow)
        if count % _AT_ONCE == 0:
            _fill_some(waiting, options.progress)
            waiting = []
    _fill_some(waiting, options.progress)


def _fill_some(stretches: Sequence[Stretch], progress: Progress) -> None:
    by_file: dict[Path, dict[int, int]] = {}
    for stretch, crc in fill(stretches, progress):
        by_file.setdefault(stretch.file, {})[stretch.offset] = crc
    if ranks.rank() == 0:
        for path, crcs in by_file.items():
            patch_checksums(path, crcs)


def _files(plan: ZeroPlan, folder: Path, steps: Sequence[float]) -> Iterator[tuple[Path, Any, Holes]]:
    for name, whole in ((MODEL, True), (MODEL3, False)):
        holes = Holes()
        yield folder / name, _model(plan, holes, whole), holes
    yield folder / FOLDER / GROUPS, _optimizer(plan, steps), Holes()
    for group, step in zip(plan.groups, steps, strict=True):
        for name in group.names:
            of = folder / FOLDER / name
            for kind, tensor in _states(plan, name):
                holes = Holes()
                yield of / f"{kind}.pt", {"cat_dim": 0, PARAM: holes.make(tensor)}, holes
            if STEP in plan.singles:
                yield of / f"{STEP}.pt", int(step) if group.plain_steps else torch.tensor(step), Holes()


def _states(plan: ZeroPlan, name: str) -> Iterator[tuple[str, Readable]]:
    weight = plan.weight(name)
    yield WEIGHT, cast(weight, torch.float32)
    held = plan.catalog.state.get(name, {})
    for kind in plan.kinds:
        yield kind, cast(held[kind], torch.float32) if kind in held else Zeros(weight.size, torch.float32)


def _model(plan: ZeroPlan, holes: Holes, whole: bool) -> dict[str, Any]:
    """Return what a model's file holds: names, and in one of the two files buffers and what is not trained."""
    absent = torch.empty(0, dtype=plan.dtype)
    kept = {*plan.buffers, *plan.frozen} if whole else set()
    frozen = frozen_shapes(plan) if whole else OrderedDict()
    module = OrderedDict((n, holes.make(plan.weight(n)) if n in kept else absent) for n in plan.catalog.weights)
    return model_tree(
        plan,
        {
            "module": module,
            "param_shapes": [
                OrderedDict((n, plan.weight(n).size) for n in _ordered(plan, g.names)) for g in plan.groups
            ],
            "frozen_param_shapes": frozen,
            "frozen_param_fragments": OrderedDict((n, module[n]) for n in frozen),
            "lr_scheduler": whole_scheduler(plan.catalog.train.get("scheduler")),
            "universal_checkpoint_info": {"universal_checkpoint_version": _VERSION},
        },
    )


def _ordered(plan: ZeroPlan, names: Sequence[str]) -> Sequence[str]:
    """Return a group's parameters in the order that DeepSpeed's files tell them in."""
    robin = plan.stage < 3 and plan.zero_config.get("round_robin_gradients") is True
    return dealt(names, plan.world) if robin else names


def _optimizer(plan: ZeroPlan, steps: Sequence[float]) -> dict[str, Any]:
    """Return what is the same for all parameters, and the param groups, as each stage's engine looks for them."""
    groups = [{**group.values, "params": [number]} for number, group in enumerate(plan.groups)]
    step = max(steps, default=0.0)
    plain = any(group.plain_steps for group in plan.groups)
    return {
        MARK: True,
        "zero_stage": ZeroStage(plan.stage),
        **scaler_of(plan),
        # Left out where the source does not tell it, so that the engine keeps its own.
        **({"clip_grad": float(plan.zero["clip_grad"])} if "clip_grad" in plan.zero else {}),
        "ds_version": version_of(plan),
        "partition_count": plan.world,
        "param_groups": groups,
        "optimizer_state_dict": {
            "state": {0: {STEP: int(step) if plain else torch.tensor(step)}},
            "param_groups": [{**_common(groups), "params": []}],
        },
    }


def _common(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the hyper-parameters that all param groups have alike."""
    first, *others = groups
    return {
        name: value for name, value in first.items() if all(name in o and str(o[name]) == str(value) for o in others)
    }


def _step(plan: ZeroPlan, name: str) -> float:
    held = plan.catalog.state.get(name, {}).get(STEP)
    return float(held.whole().item()) if held is not None else 0.0


def _notes(plan: ZeroPlan, steps: Sequence[float]) -> Iterator[str]:
    yield "Load it with engine.load_checkpoint and checkpoint: {load_universal: true} in DeepSpeed's configuration."
    groups = [group.values for group in plan.groups]
    own = sorted(set().union(*groups) - set(_common(groups)))
    if own:
        yield (
            f"The param groups differ in {', '.join(own)}; ZeRO-1 and 2 take them from here, and a ZeRO-3 engine, "
            f"which knows only those of one group, keeps those that its optimizer was made with."
        )
    left = len(plan.frozen) + len(plan.buffers)
    if left:
        yield (
            f"{left} frozen parameters and buffers are in {MODEL}, but DeepSpeed's universal loading does not look at "
            f"them: put them into the model before deepspeed.initialize."
        )
    if plan.stage < 3 and plan.zero_config.get("round_robin_gradients") is True:
        yield "An engine with round_robin_gradients mixes parameters up in universal loading; switch that off."
    if not set(plan.kinds) >= _ADAM:
        yield "Its optimizer is not Adam's, and a ZeRO-3 engine loads no other from a universal checkpoint."
    uneven = [(n, s) for g, s in zip(plan.groups, steps, strict=True) for n in g.names if _step(plan, n) != s]
    if uneven:
        yield (
            f"DeepSpeed counts steps for whole param groups, but {uneven[0][0]} is at step "
            f"{_step(plan, uneven[0][0]):.0f} and others of its group at {uneven[0][1]:.0f}; the newest counts for all."
        )
