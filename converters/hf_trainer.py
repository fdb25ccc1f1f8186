"""Checkpoints that the Hugging Face Trainer writes without DeepSpeed: the optimizer gets the parameters' names.

``optimizer.pt`` numbers parameters in the order in which the Trainer gave them to the optimizer: those with weight
decay first, then the others, each in the model's own order. That order is worked out with the Trainer's own rule, and
held against the groups' sizes and the tensors' shapes; where they disagree nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tailor_dcp.catalog import Catalog
from tailor_dcp.errors import ConversionError, DamagedSourceError
from tailor_dcp.tensors import Given, Readable

from . import trainer_folder
from .hf_model import HfModel
from .options import Options
from .torch_file import TorchFile

_OPTIMIZER = "optimizer.pt"
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")
"""States that have their parameter's shape."""


def with_training(catalog: Catalog, folder: Path, model: HfModel | None, options: Options) -> Catalog:
    """Return a model's catalog with what its folder holds of its training; itself if that is nothing.

    Args:
        catalog: the weights.
        folder: the Trainer's ``checkpoint-N``.
        model: what transformers knows of the model.
        options: ``weights_only`` leaves the training out unread; ``allow`` admits classes.

    Raises:
        ConversionError: the optimizer's parameters cannot be told from each other.
        DamagedSourceError: a file is damaged.
    """
    if options.weights_only or not (folder / trainer_folder.STATE).is_file():
        return catalog
    train, files = trainer_folder.trainer_train(folder, options)
    catalog = replace(catalog, train=train, files={**catalog.files, **files})
    path = folder / _OPTIMIZER
    if not path.is_file():
        return catalog
    file = TorchFile(path, options.allow)
    groups, states = _parts(file)
    names = _names(path, groups, model)
    _check_shapes(path, names, states, catalog.weights)
    return replace(
        catalog,
        state={names[n]: {k: _readable(file, v) for k, v in held.items()} for n, held in states.items()},
        groups=tuple(_named(group, names) for group in groups),
    )


def _parts(file: TorchFile) -> tuple[Sequence[Mapping[str, Any]], Mapping[int, Mapping[str, Any]]]:
    tree = file.tree
    groups = tree.get("param_groups") if isinstance(tree, Mapping) else None
    states = tree.get("state") if isinstance(tree, Mapping) else None
    sound = (
        isinstance(groups, list)
        and all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups)
        and isinstance(states, Mapping)
        and all(isinstance(held, Mapping) for held in states.values())
    )
    if not sound:
        raise DamagedSourceError(f"{file.path} is not what an optimizer's state_dict() is; copy it anew.")
    assert groups is not None and states is not None
    numbers = [n for group in groups for n in group["params"]]
    if len(set(numbers)) != len(numbers) or not set(states) <= set(numbers):
        raise DamagedSourceError(f"{file.path} has states that belong to none of its param groups; copy it anew.")
    return groups, states


def _names(path: Path, groups: Sequence[Mapping[str, Any]], model: HfModel | None) -> dict[int, str]:
    """Return the parameters' names by their numbers."""
    given = [name for group in groups for name in group.get("param_names", ())]
    numbers = [number for group in groups for number in group["params"]]
    if len(given) == len(numbers):
        return dict(zip(numbers, given, strict=True))
    if model is None:
        raise ConversionError(
            f"{path} numbers the parameters, and only the model's class could name them, which transformers does not "
            f"tell here; convert with --weights-only."
        )
    sizes = [len(group["params"]) for group in groups]
    undecayed = model.undecayed
    orders = [
        [name for name in model.parameters if name not in undecayed],
        [name for name in model.parameters if name in undecayed],
    ]
    # Given its own optimizer, the Trainer leaves the order to that, and usually it has all parameters in one group.
    expected = orders if len(groups) == len(orders) else [list(model.parameters)]
    if sizes != [len(order) for order in expected] or (len(groups) == 2 and groups[1].get("weight_decay", 0.0) != 0.0):
        raise ConversionError(
            f"{path} has param groups of {' and '.join(map(str, sizes))} parameters, where the Trainer makes groups of "
            f"{' and '.join(str(len(order)) for order in orders)} for {model.name}, so that they cannot be named "
            f"safely; convert with --weights-only."
        )
    return dict(zip(numbers, (name for order in expected for name in order), strict=True))


def _check_shapes(
    path: Path, names: Mapping[int, str], states: Mapping[int, Mapping[str, Any]], weights: Mapping[str, Readable]
) -> None:
    for number, held in states.items():
        weight = weights.get(names[number])
        wrong = weight is None or any(
            isinstance(value, torch.Tensor) and value.shape != weight.size for k, value in held.items() if k in _MOMENTS
        )
        if wrong:
            raise ConversionError(
                f"{path}: the state of parameter {number} does not fit {names[number]}, whose turn it is in the order "
                f"of the Trainer; convert with --weights-only."
            )


def _readable(file: TorchFile, value: Any) -> Readable:
    return file.stored(value) if isinstance(value, torch.Tensor) else Given(torch.tensor(float(value)))


def _named(group: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    kept = {name: value for name, value in group.items() if name != "param_names"}
    return {**kept, "params": [names[number] for number in group["params"]]}
