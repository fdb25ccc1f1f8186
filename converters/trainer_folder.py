"""The folder that the Hugging Face Trainer writes around a checkpoint, whatever wrote the checkpoint itself."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tailor_dcp import rank_state
from tailor_dcp.catalog import Catalog
from tailor_dcp.companions import give_files
from tailor_dcp.errors import ConversionError, DamagedSourceError

from .hf_files import carried, confined, read_json
from .options import Options
from .schedulers import whole_scheduler
from .torch_file import TorchFile, in_memory

STATE = "trainer_state.json"
"""The file by which such a folder is known; its text is ``train.trainer_state``."""
_SCHEDULER = "scheduler.pt"
_RNG = re.compile(r"rng_state(?:_(\d+))?\.pth")
_OPAQUE = ("training_args.bin", "scaler.pt")
"""Files that are carried along as they are: the first holds objects that are never unpickled here."""
_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")
"""DeepSpeed's, which it puts beside every checkpoint."""
_GENERATORS = frozenset({"python", "numpy", "cpu", "cuda"})


def is_trainer_folder(folder: Path) -> bool:
    """Tell whether a folder is one of the Trainer's checkpoints."""
    return (folder / STATE).is_file()


def trainer_train(folder: Path, options: Options) -> tuple[dict[str, Any], dict[str, Path]]:
    """Read what the Trainer keeps beside weights and optimizer.

    Args:
        folder: its folder, ``checkpoint-N``.
        options: ``allow`` admits classes in the scheduler's state.

    Returns:
        What goes under ``train.``, and the files that are carried along. Generators that ``TrainState`` has no place
        for, such as those of several devices of one process, are among these.

    Raises:
        ConversionError: a file holds a class that is not admitted.
        DamagedSourceError: a file is damaged.
    """
    state = read_json(confined(folder / STATE))
    train: dict[str, Any] = {"trainer_state": json.dumps(state), "step": int(state.get("global_step") or 0)}
    if (folder / _SCHEDULER).is_file():
        train["scheduler"] = in_memory(TorchFile(confined(folder / _SCHEDULER), options.allow).tree)
    files = {name: path for name, path in carried(folder).items() if name not in _SCRIPTS}
    files |= {name: confined(folder / name) for name in _OPAQUE if (folder / name).is_file()}
    states = _rng_files(folder)
    packed = _packed([TorchFile(file, options.allow).tree for file in states])
    if packed is not None:
        train["rng"] = packed
    else:
        files |= {file.name: file for file in states}
    return train, files


def _rng_files(folder: Path) -> list[Path]:
    """Return the files of all ranks in the order of the ranks."""
    found = {int(match[1] or 0): p for p in folder.iterdir() if (match := _RNG.fullmatch(p.name)) and p.is_file()}
    if sorted(found) != list(range(len(found))):
        missing = min(set(range(len(found))) - set(found))
        raise DamagedSourceError(f"{folder} has no generator states of rank {missing}; copy rng_state_{missing}.pth.")
    return [confined(found[rank]) for rank in sorted(found)]


def _packed(states: Sequence[Any]) -> bytes | None:
    """Return all ranks' generators as ``TrainState`` has them; None if there is more than it has a place for."""
    try:
        return rank_state.pack([_from_trainer(state) for state in states]) if states else None
    except (LookupError, TypeError, ValueError):
        return None


def _from_trainer(state: Mapping[str, Any]) -> dict[str, Any]:
    if set(state) - _GENERATORS:
        raise LookupError(f"generators of {sorted(set(state) - _GENERATORS)}")
    kind, keys, position, has_gauss, gauss = state["numpy"]
    made: dict[str, Any] = {
        "python": state["python"],
        "numpy": {
            "bit_generator": kind,
            "state": {"key": np.asarray(keys), "pos": int(position)},
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "torch": state["cpu"].clone(),
    }
    cuda = state.get("cuda")
    cuda = cuda[0] if isinstance(cuda, list) and len(cuda) == 1 else cuda
    if cuda is not None and not isinstance(cuda, torch.Tensor):
        raise LookupError("generators of several devices of one process")
    return made if cuda is None else {**made, "cuda": cuda.clone()}


def _to_trainer(state: Mapping[str, Any]) -> dict[str, Any]:
    numpy = state["numpy"]
    keys = (numpy["bit_generator"], numpy["state"]["key"], numpy["state"]["pos"], numpy["has_gauss"], numpy["gauss"])
    made = {"python": _as_tuples(state["python"]), "numpy": keys, "cpu": state["torch"]}
    return {**made, "cuda": state["cuda"]} if "cuda" in state else made


def _as_tuples(state: Sequence[Any]) -> tuple[Any, ...]:
    version, internal, gauss = state
    return version, tuple(internal), gauss


def write_trainer_files(catalog: Catalog, folder: Path) -> None:
    """Give back what ``trainer_train`` has read, where a catalog has it; call it on one rank.

    Args:
        catalog: what is converted.
        folder: the Trainer's folder that is being written.

    Raises:
        ConversionError: a file cannot be written.
    """
    give_files(catalog.files, folder)
    state = catalog.train.get("trainer_state")
    if state is None:
        return
    try:
        text = json.loads(state) if isinstance(state, str) else state
        (folder / STATE).write_text(json.dumps(text, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if "scheduler" in catalog.train:
            torch.save(whole_scheduler(catalog.train["scheduler"]), folder / _SCHEDULER)
        rng = catalog.train.get("rng")
        states = rank_state.unpack(rng, "train.rng") if isinstance(rng, bytes) and rng else []
        for rank, held in enumerate(states):
            name = "rng_state.pth" if len(states) == 1 else f"rng_state_{rank}.pth"
            torch.save(_to_trainer(held), folder / name)
    except OSError as error:
        raise ConversionError(f"{folder} cannot be written: {error.strerror}.") from error
