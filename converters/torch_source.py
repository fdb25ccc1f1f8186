"""Reading torch.save files: a model's state dict, alone or beside an optimizer's, in the usual nestings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from tailor_dcp.catalog import Catalog
from tailor_dcp.errors import ConversionError
from tailor_dcp.tensors import Readable

from .numbered_state import named
from .options import Options
from .sorting import sort
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
    tensors = {key for key, value in flat.items() if isinstance(value, torch.Tensor)}
    known: dict[tuple[int, torch.Size, tuple[int, ...]], Readable] = {}

    def readable(key: str) -> Readable:
        value = flat[key]
        made = file.stored(value)
        # Tied weights are the same memory; so may be two numbers that are no weights.
        return known.setdefault((value.data_ptr(), value.shape, value.stride()), made) if value.numel() > 1 else made

    catalog = sort(path, "torch", paths, tensors, readable, lambda key: in_memory(flat[key]))
    if not catalog.weights and not catalog.state:
        raise ConversionError(f"{path} holds no tensor that is a model's or an optimizer's; save a state dict instead.")
    return catalog
