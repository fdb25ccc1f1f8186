"""What DeepSpeed's files hold, the same for all stages, and whether all ranks' files belong together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from tailor_dcp import rank_state
from tailor_dcp.errors import DamagedSourceError
from tailor_dcp.tensors import Readable

from .options import Options
from .torch_file import TorchFile
from .zero_classes import STAND_INS
from .zero_files import ZeroFolder
from .zero_layout import Counts, Flat, cut_each, cut_whole
from .zero_partial import is_partial, numbers_of
from .zero_refusals import check_config, check_model, check_optimizer

T = TypeVar("T")
Shapes = Mapping[str, torch.Size]


def opened(path: Path, options: Options) -> TorchFile:
    """Open one of the files; DeepSpeed need not be there.

    Raises:
        ConversionError: it holds a class that is not admitted.
        DamagedSourceError: it is damaged, or holds no table.
    """
    file = TorchFile(path, options.allow, STAND_INS)
    if not isinstance(file.tree, Mapping):
        raise DamagedSourceError(f"{path} holds a {type(file.tree).__name__}, not what DeepSpeed saves; copy it anew.")
    return file


def entry(tree: Mapping[str, Any], name: str, kind: type[T], path: Path) -> T:
    """Return an entry of a file.

    Raises:
        DamagedSourceError: there is none, or it is something else than DeepSpeed puts there.
    """
    value = tree.get(name)
    if not isinstance(value, kind):
        raise DamagedSourceError(
            f"{path} has no {name!r} as DeepSpeed writes it ({type(value).__name__}); copy it anew."
        )
    return value


def count_in(tree: Mapping[str, Any], name: str, path: Path) -> int:
    """Return a number in a file, 0 if it is not there.

    Raises:
        DamagedSourceError: there is something else in its place.
    """
    return entry(tree, name, int, path) if tree.get(name) is not None else 0


class OptimFile:
    """A rank's file of flat weights and optimizer states."""

    def __init__(self, path: Path, options: Options) -> None:
        self.path = path
        self._file = opened(path, options)
        self.zero: Mapping[str, Any] = entry(self._file.tree, "optimizer_state_dict", Mapping, path)  # type: ignore[type-abstract]
        self.config: Mapping[str, Any] = config_of(self._file.tree)
        check_config(path, self.config)
        check_optimizer(path, self.zero)

    @cached_property
    def stage(self) -> int:
        """The stage of ZeRO."""
        stage = getattr(self.zero.get("zero_stage"), "value", self.zero.get("zero_stage"))
        if stage is None and "single_partition_of_fp32_groups" in self.zero:
            return 1  # DeepSpeed's BF16_Optimizer: its flat buffers are those of ZeRO-1
        if not isinstance(stage, int) or stage not in (1, 2, 3):
            raise DamagedSourceError(f"{self.path} does not tell its stage of ZeRO; copy it anew.")
        return int(stage)

    @cached_property
    def worlds(self) -> Sequence[int]:
        """How many ranks each flat stream was cut for; one number for all in ZeRO-3."""
        count = self.zero.get("partition_count")
        worlds = count if isinstance(count, list | tuple) else [count]
        if not all(isinstance(world, int) for world in worlds):
            raise DamagedSourceError(f"{self.path} has no partition_count; copy it anew.")
        return list(worlds)

    @cached_property
    def _optimizer(self) -> Mapping[str, Any]:
        name = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        return entry(self.zero, name, Mapping, self.path)  # type: ignore[type-abstract]

    @cached_property
    def weights(self) -> dict[int, Readable]:
        """This rank's part of each flat stream, by the stream's number; a partial checkpoint has some of them."""
        name = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        flats = entry(self.zero, name, Sequence, self.path)  # type: ignore[type-abstract]
        if not all(isinstance(flat, torch.Tensor) for flat in flats):
            raise DamagedSourceError(f"{self.path} has something else than tensors in {name!r}; copy it anew.")
        numbers = numbers_of(self.path, self.groups, len(flats)) if self.stage == 3 else range(len(flats))
        return {number: self._file.stored(flat) for number, flat in zip(numbers, flats, strict=True)}

    @property
    def states(self) -> Mapping[Any, Any]:
        """The optimizer's states by stream."""
        return entry(self._optimizer, "state", Mapping, self.path)  # type: ignore[type-abstract]

    @cache  # noqa: B019 - it lives as long as the file's map anyway
    def state(self, number: int) -> tuple[dict[str, Readable], dict[str, Any]]:
        """Return the optimizer's state of a stream: what has a value for each element, and what has a single one."""
        held = self.states.get(number, {})
        if not isinstance(held, Mapping):
            raise DamagedSourceError(f"{self.path} has no optimizer state as DeepSpeed writes it; copy it anew.")
        spread = {k: self._file.stored(v) for k, v in held.items() if isinstance(v, torch.Tensor) and v.dim()}
        return spread, {kind: value for kind, value in held.items() if kind not in spread}

    @cached_property
    def groups(self) -> list[Mapping[str, Any]]:
        """The param groups, whose ``params`` are numbers of streams."""
        groups = entry(self._optimizer, "param_groups", list, self.path)
        for group in groups:
            if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
                raise DamagedSourceError(f"{self.path} has param groups without params; copy it anew.")
        return groups

    @property
    def hyperparameters(self) -> list[dict[str, Any]]:
        """Everything of the param groups but the parameters."""
        return [{name: value for name, value in group.items() if name != "params"} for group in self.groups]


class ModelFile:
    """A file with the model's names and shapes, and what is not trained."""

    def __init__(self, path: Path, options: Options) -> None:
        self.path = path
        self._file = opened(path, options)
        self.tree: Mapping[str, Any] = self._file.tree
        self.config: Mapping[str, Any] = config_of(self.tree)
        check_model(path, self.tree)
        check_config(path, self.config)
        self.module: Mapping[str, Any] = entry(self.tree, "module", Mapping, path)  # type: ignore[type-abstract]
        self.shapes: list[Shapes] = [
            self._sizes(shapes, "param_shapes") for shapes in entry(self.tree, "param_shapes", list, path)
        ]

    @cached_property
    def frozen(self) -> Shapes | None:
        """The shapes of parameters that are not trained; None where they were left out or lie in the module."""
        shapes = self.tree.get("frozen_param_shapes")
        return None if shapes is None else self._sizes(shapes, "frozen_param_shapes")

    @cached_property
    def buffers(self) -> list[str]:
        """The names of persistent buffers."""
        names = entry(self.tree, "buffer_names", list, self.path)
        return [name for name in names if isinstance(name, str) and name in self.module]

    @cached_property
    def shared(self) -> dict[str, str]:
        """The other names of tied parameters, and the one that each is stored under."""
        shared = self.tree.get("shared_params")
        shared = {} if shared is None else entry(self.tree, "shared_params", Mapping, self.path)  # type: ignore[type-abstract]
        if not all(isinstance(name, str) for pair in shared.items() for name in pair):
            raise DamagedSourceError(f"{self.path} has something else than names in 'shared_params'; copy it anew.")
        return dict(shared)

    def fragment(self, name: str) -> Readable:
        """Return this file's part of a parameter that is not trained."""
        fragments = entry(self.tree, "frozen_param_fragments", Mapping, self.path)  # type: ignore[type-abstract]
        return self._file.stored(entry(fragments, name, torch.Tensor, self.path))

    def stored(self, name: str) -> Readable:
        """Return a tensor of the module."""
        return self._file.stored(entry(self.module, name, torch.Tensor, self.path))

    def _sizes(self, shapes: Any, name: str) -> Shapes:
        if not isinstance(shapes, Mapping):
            raise DamagedSourceError(f"{self.path} has no {name!r} as DeepSpeed writes it; copy it anew.")
        for size in shapes.values():
            if not isinstance(size, list | tuple) or not all(isinstance(n, int) and 0 <= n < 1 << 48 for n in size):
                raise DamagedSourceError(f"{self.path} has something else than sizes in {name!r}; copy it anew.")
        return {str(fqn): torch.Size(size) for fqn, size in shapes.items()}


def config_of(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return DeepSpeed's configuration in a file; empty if there is none."""
    config = tree.get("ds_config")
    return config if isinstance(config, Mapping) else {}


@dataclass(frozen=True)
class ZeroContents:
    """A checkpoint's files, opened, which belong together.

    Attributes:
        folder: where they are.
        optim: the optimizer's files, by rank.
        model: the model's files, by rank; a single one for ZeRO-1 and 2.
        flats: for each flat stream that was saved which elements of which parameter each rank has, by its number.
    """

    folder: ZeroFolder
    optim: Sequence[OptimFile]
    model: Sequence[ModelFile]
    flats: Mapping[int, Flat]

    @property
    def stage(self) -> int:
        """The stage of ZeRO."""
        return self.optim[0].stage

    @property
    def world(self) -> int:
        """How many ranks there were."""
        return len(self.optim)

    @property
    def partial(self) -> bool:
        """Whether it holds some of its run's parameters only."""
        return 0 < len(self.flats) < len(self.model[0].shapes)

    @property
    def config(self) -> Mapping[str, Any]:
        """DeepSpeed's configuration."""
        return self.model[0].config or self.optim[0].config

    @property
    def zero_config(self) -> Mapping[str, Any]:
        """The part of it that is about ZeRO."""
        found = self.config.get("zero_optimization")
        return found if isinstance(found, Mapping) else {}


def read(folder: ZeroFolder, options: Options) -> ZeroContents:
    """Open a checkpoint's files and make sure that they belong together.

    Raises:
        ConversionError: it is of a kind that is not read, or holds a class that is not admitted.
        DamagedSourceError: a file is damaged, or not of the same save as the others.
    """
    model = [ModelFile(path, options) for path in folder.model.values()]
    optim = [OptimFile(path, options) for path in folder.optim.values()]
    _check_worlds(folder, optim, model)
    _check_saves(optim, model)
    flats = _flats(optim[0], model[0], len(optim))
    for rank, file in enumerate(optim):
        _check_lengths(file, flats, rank)
    return ZeroContents(folder, optim, model, flats)


def _check_worlds(folder: ZeroFolder, optim: Sequence[OptimFile], model: Sequence[ModelFile]) -> None:
    for file in optim:
        if (file.stage == 3) != folder.partitioned or file.stage != optim[0].stage:
            raise DamagedSourceError(
                f"{file.path} is of ZeRO-{file.stage}, other than the files beside it; copy all anew."
            )
        for world in file.worlds:
            if world != len(optim):
                raise DamagedSourceError(
                    f"{file.path} is of a run of {world} ranks (partition_count), but {folder.folder} has the files of "
                    f"{len(optim)}; copy the missing ones, or remove those of another save."
                )
    for of_model in model:
        told = count_in(of_model.tree, "dp_world_size", of_model.path)
        if told != len(optim):
            raise DamagedSourceError(
                f"{of_model.path} is of a run of {told} ranks (dp_world_size), but {folder.folder} has the files of "
                f"{len(optim)}; copy the missing ones, or remove those of another save."
            )


def _check_saves(optim: Sequence[OptimFile], model: Sequence[ModelFile]) -> None:
    """Make sure that all files are of one step and tell of the same parameters."""
    first = model[0]
    for other in model[1:]:
        for name in ("global_steps", "global_samples", "skipped_steps"):
            mine, its = count_in(other.tree, name, other.path), count_in(first.tree, name, first.path)
            if mine != its:
                raise DamagedSourceError(
                    f"{other.path} is of another step than {first.path.name} ({name} {mine} and {its}); copy the whole "
                    f"folder anew."
                )
        if _ordered(other.shapes) != _ordered(first.shapes) or other.frozen != first.frozen:
            raise DamagedSourceError(
                f"{other.path} tells of other parameters than {first.path.name} (param_shapes); copy the folder anew."
            )
    for file in optim[1:]:
        _check_same_step(file, optim[0])


def _ordered(shapes: Sequence[Shapes]) -> list[list[tuple[str, torch.Size]]]:
    return [list(group.items()) for group in shapes]


def _check_same_step(file: OptimFile, first: OptimFile) -> None:
    if file.weights.keys() != first.weights.keys():
        raise DamagedSourceError(
            f"{file.path} has {len(file.weights)} flat groups and {first.path.name} has {len(first.weights)}; copy the "
            f"folder anew."
        )
    for number in first.weights:
        (spread, mine), (others, its) = file.state(number), first.state(number)
        if spread.keys() != others.keys() or mine.keys() != its.keys():
            raise DamagedSourceError(
                f"{file.path} has other optimizer states than {first.path.name}; copy the folder anew."
            )
        for kind, value in mine.items():
            if not rank_state.same(value, its[kind]):
                raise DamagedSourceError(
                    f"{file.path} is of another step than {first.path.name} ({kind} {_plain(value)} and "
                    f"{_plain(its[kind])}); copy the whole folder anew."
                )
    if str(file.hyperparameters) != str(first.hyperparameters):
        raise DamagedSourceError(
            f"{file.path} has other param groups than {first.path.name}, of another step; copy the folder anew."
        )


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _flats(optim: OptimFile, model: ModelFile, world: int) -> dict[int, Flat]:
    shapes, numbers = model.shapes, list(optim.weights)
    if len(numbers) != len(shapes) and not (optim.stage == 3 and is_partial(numbers, optim.states, shapes)):
        raise DamagedSourceError(
            f"{model.path} tells of {len(shapes)} groups of parameters and {optim.path.name} has {len(numbers)}; copy "
            f"the folder anew."
        )
    if any(number >= len(shapes) for number in numbers):
        raise DamagedSourceError(f"{optim.path} has param groups of other parameters; copy it anew.")
    counts = [[(fqn, math.prod(size)) for fqn, size in group.items()] for group in shapes]
    if optim.stage == 3:
        return {number: cut_each(counts[number], world) for number in numbers}
    gaps = _gaps(optim, counts)
    return {number: cut_whole(group, world, gaps[number]) for number, group in enumerate(counts)}


def _gaps(optim: OptimFile, counts: Sequence[Counts]) -> list[list[int]]:
    """Return the padding after each parameter of ZeRO-1 and 2; older versions of DeepSpeed know none."""
    told = optim.zero.get("param_alignment_paddings")
    if told is None:
        return [[0] * len(group) for group in counts]
    sound = isinstance(told, list) and len(told) == len(counts) and all(isinstance(gaps, list) for gaps in told)
    for gaps, group in zip(told, counts, strict=True) if sound else ():
        sound = sound and len(gaps) == len(group) and all(isinstance(n, int) and 0 <= n < 16 for n in gaps)
    if not sound:
        raise DamagedSourceError(f"{optim.path} has other paddings than parameters; copy it anew.")
    return list(told)


def _check_lengths(file: OptimFile, flats: Mapping[int, Flat], rank: int) -> None:
    """Make sure that streams are as long as the shapes say: the weights may or may not have the padding at the end."""
    for number, flat in flats.items():
        for kind, stream in {"weights": file.weights[number], **file.state(number)[0]}.items():
            if len(stream.size) != 1 or stream.count not in (flat.length, flat.filled[rank]):
                raise DamagedSourceError(
                    f"{file.path} has {stream.count} elements of flat group {number} ({kind}) where the shapes of its "
                    f"parameters make {flat.length}; copy it anew."
                )
