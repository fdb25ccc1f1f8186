"""The folder that ``Accelerator.save_state`` writes around FSDP's sharded state: two DCP folders and some files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tailor_dcp.catalog import Catalog
from tailor_dcp.errors import ConversionError
from tailor_dcp.location import METADATA

from .hf_files import confined
from .options import Options
from .schedulers import whole_scheduler
from .torch_file import TorchFile, in_memory

_SCHEDULER = "scheduler.bin"
_ALONG = ("random_states_*.pkl", "sampler*.bin", "dl_state_dict*.bin", "scaler.pt", "custom_checkpoint_*.pkl")


def parts(folder: Path) -> list[Path]:
    """Return the DCP checkpoints in an Accelerate folder, models before optimizers; none if it is no such folder."""
    models = sorted(path.parent for path in folder.glob(f"pytorch_model_fsdp_*/{METADATA}"))
    optimizers = sorted(path.parent for path in folder.glob(f"optimizer_*/{METADATA}"))
    return [*models, *optimizers] if models else []


def check_single(folder: Path) -> None:
    """Refuse a folder of several models, whose parameters can have the same names.

    Raises:
        ConversionError: it is one.
    """
    for what in ("pytorch_model_fsdp", "optimizer"):
        found = sorted(path.parent.name for path in folder.glob(f"{what}_*/{METADATA}"))
        if len(found) > 1:
            raise ConversionError(
                f"{folder} holds several trainings ({' and '.join(found)}); convert each model's folder by itself."
            )


def train_of(folder: Path, options: Options) -> dict[str, Any]:
    """Return what the folder holds of the training itself: its learning-rate scheduler."""
    path = folder / _SCHEDULER
    if path.is_file():
        confined(path)
    return {"scheduler": in_memory(TorchFile(path, options.allow).tree)} if path.is_file() else {}


def files_of(folder: Path) -> dict[str, Path]:
    """Return the files that are carried along as they are; none of them is opened."""
    found = {path.name: path for pattern in _ALONG for path in sorted(folder.glob(pattern)) if path.is_file()}
    return {name: confined(path) for name, path in found.items()}


def write_scheduler(catalog: Catalog, folder: Path) -> None:
    """Write the scheduler as ``Accelerator.load_state`` reads it."""
    if "scheduler" in catalog.train:
        torch.save(whole_scheduler(catalog.train["scheduler"]), folder / _SCHEDULER)
