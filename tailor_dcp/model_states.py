"""Training states that nobody has in memory: from a model's configuration, or from a checkpoint of any format."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from tailor_dcp.base import open_base
from tailor_dcp.coordination import RankInfo, gather
from tailor_dcp.errors import TailorError
from tailor_dcp.formats import formats
from tailor_dcp.inspection import unit_records
from tailor_dcp.layers import LayerMap
from tailor_dcp.location import METADATA
from tailor_dcp.merging.sources import open_source
from tailor_dcp.metadata.compose import Shape, paths_of
from tailor_dcp.names import listed, matches
from tailor_dcp.selection import State
from tailor_dcp.units import WEIGHT, Unit

OPTIMIZERS: Mapping[str, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adam": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    "momentum": ("momentum_buffer",),
    "sgd": (),
}
"""What an optimizer keeps for each parameter, of its shape; all but ``sgd`` also count steps where torch's do."""

_COUNTED = re.compile("layer|expert|block|depth|stage")
_MOST_LAYERS = 10_000
_COUNTS = frozenset({"adamw", "adam"})
_MODEL, _STATE = "model.", "optim.state."

Ties = tuple[tuple[str, ...], ...]


class NoModelError(TailorError, ValueError):
    """What should be a model is none that can be understood."""


def state_of(
    model: str | os.PathLike[str],
    optimizer: str = "adamw",
    dtype: torch.dtype = torch.float32,
    frozen: Iterable[str] = (),
    allow: tuple[str, ...] = (),
) -> State:
    """Return the training state of a model that is not in memory.

    Args:
        model: a ``config.json`` of Hugging Face or its folder, or a checkpoint of any format. A checkpoint that has an
            optimizer's state is taken as it is.
        optimizer: one of ``OPTIMIZERS``, where the model has none.
        dtype: of the weights and of the optimizer's state in training, where the model has none.
        frozen: globs of layers and parameters that do not change and have no optimizer's state.
        allow: classes, as ``module.Class``, that may be unpickled.

    Raises:
        NoModelError: there is no model, or none that can be understood.
        TailorError: the checkpoint is damaged.
    """
    if optimizer not in OPTIMIZERS:
        raise NoModelError(f"The optimizer {optimizer!r} is unknown; use {listed(list(OPTIMIZERS))}.")
    path, globs = Path(model), tuple(frozen)
    if (path / METADATA).is_file():
        state = _of_checkpoint(path)
        if any(unit.kind != WEIGHT for unit in state.units):
            return _resting(state, globs)
        weights = {key: shape.size for key, shape in state.shapes.items() if shape.size is not None}
        ties: Ties = state.ties
    elif path.name == "config.json" or not _is_checkpoint(path, allow):
        weights, ties = _of_config(path)
    else:
        catalog = open_source(os.fspath(model), allow, as_catalog=True).catalog
        assert catalog is not None
        weights = {_MODEL + fqn: tensor.size for fqn, tensor in catalog.weights.items()}
        ties = tuple((_MODEL + leader, _MODEL + other) for other, leader in catalog.ties.items())
    return _resting(_with_optimizer(weights, ties, optimizer, dtype, globs), globs)


def is_resting(key: str, layer: str, frozen: Iterable[str]) -> bool:
    """Tell whether a key's parameter, or its layer, is meant by one of the globs."""
    return any(matches(layer, glob) or matches(key.removeprefix(_MODEL), glob) for glob in frozen)


def _of_checkpoint(path: Path) -> State:
    base = open_base(path)
    stored = base.metadata.state_dict_metadata
    paths = paths_of(base.metadata)
    shapes = {key: base.source_shape(key) for key in stored}
    state = gather([RankInfo(paths, shapes, base.record.ties if base.record else ())], LayerMap(), None)
    owners = {key: unit for unit, held in unit_records(base).items() for key in held.keys}
    units: dict[Unit, list[str]] = {}
    for key in stored:  # the order of the training's state dict, by which policies take turns; a record has another
        if key in owners:
            units.setdefault(owners[key], []).append(key)
    return State(shapes, {unit: tuple(keys) for unit, keys in units.items()}, state.ties, state.trained)


def _is_checkpoint(path: Path, allow: tuple[str, ...]) -> bool:
    try:
        return open_source(os.fspath(path), allow, as_catalog=True).catalog is not None
    except TailorError:
        if formats().recognised(path) is not None and not (path / "config.json").is_file():
            raise
        return False  # a configuration without its weights


def _of_config(path: Path) -> tuple[dict[str, torch.Size], Ties]:
    """Build the model without memory and return the shapes of what it saves."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise NoModelError(f"{path} is neither a checkpoint nor a model's config.json; name one that is.")
    try:
        import transformers  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise NoModelError(f"{file} needs transformers: pip install 'tailor-dcp[hf]'.") from error
    try:
        # Nothing is fetched, and no code that comes with a configuration is run.
        config = transformers.AutoConfig.from_pretrained(file.parent, local_files_only=True, trust_remote_code=False)
        _check_counts(config.to_dict())
        with torch.device("meta"):
            model = _class_of(config, transformers)(config)
    except Exception as error:  # each of some hundred classes checks, or does not check, its own settings
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NoModelError(f"{file} describes no model that transformers can build: {first}") from error
    state = model.state_dict(keep_vars=True)
    same: dict[int, list[str]] = {}
    for name, tensor in state.items():
        same.setdefault(id(tensor), []).append(_MODEL + name)
    ties = tuple(tuple(names) for names in same.values() if len(names) > 1)
    return {_MODEL + name: tensor.shape for name, tensor in state.items()}, ties


def _check_counts(settings: Mapping[str, Any]) -> None:
    """Refuse what would be built for ever: each layer and each expert is an object, even without its memory."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            _check_counts(value)
        elif isinstance(value, int) and value > _MOST_LAYERS and _COUNTED.search(name):
            raise ValueError(f"{name} is {value}, more than {_MOST_LAYERS}")


def _class_of(config: object, transformers: object) -> type[torch.nn.Module]:
    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
    found = next((kind for kind in named if isinstance(kind, type) and issubclass(kind, torch.nn.Module)), None)
    if found is not None:
        return found
    automatic = transformers.AutoModelForCausalLM._model_mapping  # type: ignore[attr-defined]
    kind: type[torch.nn.Module] = automatic[type(config)]
    return kind


def _with_optimizer(
    weights: Mapping[str, torch.Size], ties: Ties, optimizer: str, dtype: torch.dtype, frozen: tuple[str, ...]
) -> State:
    layers = LayerMap()
    shapes: dict[str, Shape] = {key: Shape(size, dtype) for key, size in weights.items()}
    paths: dict[str, tuple[str | int, ...]] = {
        key: ("model", key.removeprefix(_MODEL)) if key.startswith(_MODEL) else (key,) for key in weights
    }
    # An optimizer knows a tied parameter by the name that comes first in the model.
    twins = {key for tie in ties for key in [key for key in weights if key in tie][1:]}
    for key, size in weights.items():
        fqn = key.removeprefix(_MODEL)
        if key in twins or is_resting(key, layers.layer(fqn), frozen):
            continue
        for kind in OPTIMIZERS[optimizer]:
            shapes[f"{_STATE}{fqn}.{kind}"] = Shape(size, dtype)
            paths[f"{_STATE}{fqn}.{kind}"] = ("optim", "state", fqn, kind)
        if optimizer in _COUNTS:
            shapes[f"{_STATE}{fqn}.step"] = Shape(torch.Size(()), torch.float32)
            paths[f"{_STATE}{fqn}.step"] = ("optim", "state", fqn, "step")
    return gather([RankInfo(paths, shapes, ties)], layers, None)


def _resting(state: State, frozen: tuple[str, ...]) -> State:
    """Mark what does not change."""
    changed: dict[Unit, bool | None] = {
        unit: not all(is_resting(key, unit.layer, frozen) for key in keys) for unit, keys in state.units.items()
    }
    return State(state.shapes, state.units, state.ties, state.trained, state.fingerprints, changed)
