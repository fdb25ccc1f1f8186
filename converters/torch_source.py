"""Reading torch.save files: a model's state dict, alone or beside an optimizer's, in the usual nestings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from tailor_dcp.layers import LayerMap
from tailor_dcp.layers import Path as KeyPath
from tailor_dcp.units import WEIGHT

from .catalog import Catalog
from .errors import ConversionError
from .key_layouts import groups_of, is_group, train_of, with_lists
from .numbered_state import named
from .options import Options
from .tensors import Given, Readable
from .torch_file import TorchFile, in_memory, is_torch_file


def recognise(path: Path) -> bool:
    """Tell a torch.save file from its first bytes."""
    return path.is_file() and is_torch_file(path)


def open_source(path: Path, options: Options) -> Catalog:
    """Open a torch.save file that holds a state dict.

    Args:
        path: the file.
        options: ``allow`` admits classes.

    Raises:
        ConversionError: it holds no dict, no tensor, or a class that is not admitted.
        DamagedSourceError: it is damaged.
    """
    file = TorchFile(path, options.allow)
    if not isinstance(file.tree, Mapping):
        raise ConversionError(f"{path} holds a {type(file.tree).__name__}, not a dict; save a state dict instead.")
    tree = dict(file.tree)
    if all(isinstance(value, torch.Tensor) for value in tree.values()):
        tree = {"model": tree}  # nothing but tensors is a model
    flat, paths = flatten_state_dict(tree if options.weights_only else named(tree, path))
    entries = LayerMap().classify(paths, {key for key, value in flat.items() if isinstance(value, torch.Tensor)})
    known: dict[tuple[int, torch.Size, tuple[int, ...]], Readable] = {}

    def readable(value: Any) -> Readable:
        if not isinstance(value, torch.Tensor):
            return Given(torch.tensor(float(value)))
        where = (value.data_ptr(), value.shape, value.stride())
        made = file.stored(value)
        return known.setdefault(where, made) if value.numel() > 1 else made

    weights: dict[str, Readable] = {}
    state: dict[str, dict[str, Readable]] = {}
    for key, entry in entries.items():
        if entry.unit.kind == WEIGHT:
            weights[entry.fqn] = readable(flat[key])
        else:
            state.setdefault(entry.fqn, {})[entry.unit.kind] = readable(flat[key])
    if not weights and not state:
        raise ConversionError(f"{path} holds no tensor that is a model's or an optimizer's; save a state dict instead.")
    rest = list(_rest(flat, paths, entries))
    train = train_of((where, value) for where, value in rest if not is_group(where))
    return Catalog(
        source=path,
        format="torch",
        weights=weights,
        state=state,
        groups=tuple(with_lists(group) for group in groups_of((w, v) for w, v in rest if is_group(w))),
        train={name: with_lists(value) for name, value in train.items() if name != "token"},
    )


def _rest(
    flat: Mapping[str, Any], paths: Mapping[str, KeyPath], entries: Mapping[str, object]
) -> Iterator[tuple[KeyPath, Any]]:
    return ((paths[key], in_memory(value)) for key, value in flat.items() if key not in entries)
