"""Reading DeepSpeed universal checkpoints, those of its own ``ds_to_universal.py`` and ours, without DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tailor_dcp.catalog import STEP, Catalog
from tailor_dcp.errors import ConversionError, DamagedSourceError
from tailor_dcp.tensors import Given, Readable

from .options import Options
from .torch_file import TorchFile
from .trainer_folder import is_trainer_folder, trainer_train
from .universal_target import FOLDER, GROUPS, LATEST, MARK, MODEL, PARAM, WEIGHT, is_name
from .views import reshaped
from .zero_contents import ModelFile, OptimFile, ZeroContents, opened
from .zero_files import MODEL3, MODEL12, ZeroFolder
from .zero_source import frozen_of, groups_of, train_of

_EXPERT = "is_expert_param"


def recognise(path: Path) -> bool:
    """Tell a universal checkpoint, or the folder around one, by names."""
    try:
        return (path / LATEST).is_file() or (path / FOLDER / GROUPS).is_file()
    except OSError:
        return False


def open_source(path: Path, options: Options) -> Catalog:
    """Open a universal checkpoint; no tensor is read.

    Args:
        path: its folder, or the folder around it.
        options: ``tag`` tells which of several, ``allow`` admits classes in the client's state.

    Raises:
        ConversionError: there is none, or it is of tensor parallelism or experts, which are not read.
        DamagedSourceError: a file is missing or damaged.
    """
    folder = _folder(path, options.tag)
    contents, common = _contents(folder, options)
    told = replace(contents, optim=[common.told] * contents.world)
    if told.stage < 3 and contents.zero_config.get("round_robin_gradients") is True and MARK not in common.zero:
        raise ConversionError(
            f"{folder} is of a run with round_robin_gradients, for which ds_to_universal.py puts weights and moments "
            f"under other parameters' names; convert the ZeRO checkpoint that it was made of."
        )
    first = contents.model[0]
    weights: dict[str, Readable] = {}
    state: dict[str, dict[str, Readable]] = {}
    for number, shapes in enumerate(first.shapes):
        for fqn, size in shapes.items():
            held = _parameter(folder / FOLDER, fqn, size, options)
            weights[fqn] = held.pop(WEIGHT)
            step = common.step(number)
            if held and STEP not in held and step is not None:
                held[STEP] = Given(step)
            state |= {fqn: held} if held else {}
    frozen = frozen_of(contents)
    weights |= frozen
    weights |= {name: first.stored(name) for name in first.buffers}
    weights |= {alias: weights[name] for alias, name in first.shared.items() if name in weights}
    train = train_of(contents)
    train["zero"] |= _stage(told)
    files: Mapping[str, Path] = {}
    if is_trainer_folder(folder.parent):
        trainer, files = trainer_train(folder.parent, options)
        train |= trainer
    return Catalog(
        source=path,
        format="universal",
        weights={name: weights[name] for name in [*(n for n in first.module if n in weights), *weights]},
        state=state,
        groups=tuple(groups_of(told)),
        train=train,
        buffers=frozenset(first.buffers),
        frozen=frozenset(frozen),
        files=files,
    )


def _stage(contents: ZeroContents) -> dict[str, Any]:
    """Return what the training's own stage is, and what is told of that stage alone."""
    size = contents.zero_config.get("sub_group_size")
    sub_groups = {"sub_group_size": int(size)} if contents.stage == 3 and isinstance(size, int | float) else {}
    return {"stage": contents.stage, **sub_groups}


def _folder(path: Path, tag: str | None) -> Path:
    if tag is None and (path / FOLDER).is_dir():
        return path
    latest = path / LATEST
    if tag is None and not latest.is_file():
        raise ConversionError(f"{path} has neither {FOLDER}/{GROUPS} nor {LATEST}; give one that has, or --tag.")
    name = tag or latest.read_text(errors="replace").strip()
    if not is_name(name) or not (path / name / FOLDER).is_dir():
        raise ConversionError(f"{path} has no universal checkpoint {name!r}; give another with --tag.")
    return path / name


class _Globals(OptimFile):
    """``optimizer_state.pt``: what is not of one parameter, in the shape of a rank's file of ZeRO."""

    def __init__(self, path: Path, options: Options, stage: int) -> None:
        self.path = path
        self._file = opened(path, options)
        self.zero = self._file.tree
        self.config = {}
        self.stage = stage

    @property
    def told(self) -> _Globals:
        """The same with the stage that the training had, whatever its files are laid out like."""
        stage = getattr(self.zero.get("zero_stage"), "value", None)
        made = copy(self)
        made.stage = stage if stage in (1, 2, 3) else self.stage
        return made

    @cached_property
    def _optimizer(self) -> Mapping[str, Any]:
        return self.zero  # the param groups, each with its own hyper-parameters, are at the top

    def step(self, number: int) -> torch.Tensor | None:
        """Return how many steps the parameters of a stream have made, which ZeRO-3 tells here alone."""
        optimizer = self.zero.get("optimizer_state_dict")
        states = optimizer.get("state") if isinstance(optimizer, Mapping) else None
        held = states.get(number, states.get(0)) if isinstance(states, Mapping) else None
        return _scalar(held[STEP], self.path) if isinstance(held, Mapping) and STEP in held else None


def _contents(folder: Path, options: Options) -> tuple[ZeroContents, _Globals]:
    """Return the files beside the parameters', as if they were a ZeRO checkpoint's."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    matches = [match for name in names if (match := MODEL12.fullmatch(name) or MODEL3.fullmatch(name))]
    if any(int(match["mp"]) for match in matches):
        raise ConversionError(f"{folder} is of tensor parallelism (mp_rank_01), which is not read.")
    of_ranks = {int(m["rank"]): folder / m[0] for m in matches if m.re is MODEL3}
    whole = folder / MODEL in [folder / match[0] for match in matches]
    paths = [folder / MODEL] if whole else [of_ranks[rank] for rank in sorted(of_ranks)]
    if not paths:
        raise DamagedSourceError(f"{folder} has no file {MODEL}, which tells the parameters' shapes; copy it anew.")
    model = [ModelFile(path, options) for path in paths]
    world = model[0].tree.get("dp_world_size")
    world = world if isinstance(world, int) and world > 0 else 1
    if not whole and sorted(of_ranks) != list(range(world)):
        missing = min(set(range(world)) - set(of_ranks), default=world)
        raise DamagedSourceError(
            f"{folder} lacks zero_pp_rank_{missing}_mp_rank_00_model_states.pt of its {world} ranks; copy it anew."
        )
    # A model that is in one file for all ranks is laid out as ZeRO-1 and 2 do it, whatever the stage was.
    common = _Globals(folder / FOLDER / GROUPS, options, 2 if whole else 3)
    place = ZeroFolder(folder, folder.parent, folder.name, {}, dict(enumerate(paths)), not whole)
    return ZeroContents(place, [common] * world, model, {}), common


@dataclass(frozen=True)
class _File:
    """A file of one parameter, opened."""

    path: Path
    file: TorchFile

    @property
    def tensor(self) -> torch.Tensor:
        """What it holds: ZeRO-3's a tensor, the others' a table with one."""
        tree = self.file.tree
        if isinstance(tree, Mapping) and tree.get(_EXPERT):
            raise ConversionError(f"{self.path} is of experts that are shared out over ranks, which is not read.")
        value = tree.get(PARAM) if isinstance(tree, Mapping) else tree
        if not isinstance(value, torch.Tensor):
            raise DamagedSourceError(f"{self.path} holds no tensor; copy it anew.")
        return value


def _parameter(folder: Path, fqn: str, size: torch.Size, options: Options) -> dict[str, Readable]:
    """Return a parameter's weight and its states by kind."""
    if not is_name(fqn):
        raise DamagedSourceError(f"{folder.parent} names a parameter {fqn!r}, outside of its folder; copy it anew.")
    files = sorted((folder / fqn).glob("*.pt"))
    if folder / fqn / f"{WEIGHT}.pt" not in files:
        raise DamagedSourceError(f"{folder / fqn} has no {WEIGHT}.pt; copy it anew.")
    found: dict[str, Readable] = {}
    for path in files:
        file = TorchFile(path, options.allow)
        if path.stem == STEP:
            found[STEP] = Given(_scalar(file.tree, path))
            continue
        tensor = _File(path, file).tensor
        if tensor.numel() != math.prod(size):
            raise DamagedSourceError(
                f"{path} holds {tensor.numel()} elements, and {fqn} has {math.prod(size)}; copy it anew."
            )
        found[path.stem] = reshaped(file.stored(tensor), size)
    return found


def _scalar(value: Any, path: Path) -> torch.Tensor:
    """Return a step as torch's optimizers have it."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.detach().clone().reshape(())
    if isinstance(value, int | float):
        return torch.tensor(float(value))
    raise DamagedSourceError(f"{path} holds no number of steps; copy it anew.")
