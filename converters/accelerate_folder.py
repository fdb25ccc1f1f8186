"""The folder that ``Accelerator.save_state`` writes around FSDP's sharded state: two DCP folders and some files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tailor_dcp.location import METADATA

from .catalog import Catalog
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


def train_of(folder: Path, options: Options) -> dict[str, Any]:
    """Return what the folder holds of the training itself: its learning-rate scheduler."""
    path = folder / _SCHEDULER
    return {"scheduler": in_memory(TorchFile(path, options.allow).tree)} if path.is_file() else {}


def files_of(folder: Path) -> dict[str, Path]:
    """Return the files that are carried along as they are; none of them is opened."""
    return {path.name: path for pattern in _ALONG for path in sorted(folder.glob(pattern)) if path.is_file()}


def write_scheduler(catalog: Catalog, folder: Path) -> None:
    """Write the scheduler as ``Accelerator.load_state`` reads it."""
    if "scheduler" in catalog.train:
        torch.save(whole_scheduler(catalog.train["scheduler"]), folder / _SCHEDULER)
