"""The files of a DeepSpeed checkpoint: which there are, where they are, and which of them are not read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tailor_dcp.errors import ConversionError, DamagedSourceError

from .hf_files import confined

LATEST = "latest"
_LONGEST = 256  # bytes of a name; a file system refuses longer ones by an error of its own
OPTIM = re.compile(r"(?P<prefix>bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_?optim_states\.pt")
MODEL3 = re.compile(r"zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_model_states\.pt")
MODEL12 = re.compile(r"mp_rank_(?P<mp>\d+)_model_states\.pt")
_STEP = re.compile(r"global_step\d+")
_TRAINER = re.compile(r"checkpoint-(\d+)")
_UNREAD = (
    (re.compile(r"(layer_\d+_)?expert_\d+_mp_rank_\d+_\w+\.pt|expp_rank_\d+_mp_rank_\d+_\w+\.pt"),
     "expert files (MoE)", "convert it with DeepSpeed's ds_to_universal.py"),
    (re.compile(r"layer_\d+-model_\d+-model_states\.pt"),
     "files of pipeline stages", "convert it with DeepSpeed's ds_to_universal.py"),
)  # fmt: skip
_UNIVERSAL = "zero"


@dataclass(frozen=True)
class ZeroFolder:
    """A checkpoint's files.

    Attributes:
        folder: where they are.
        root: the folder around it, which ``latest`` is in, and the Trainer's files.
        tag: the checkpoint's name.
        optim: the optimizer's file of each rank.
        model: the model's file of each rank (ZeRO-3), or the only one, as that of rank 0 (ZeRO-1 and 2).
        partitioned: whether the model is in parts, too (ZeRO-3).
    """

    folder: Path
    root: Path
    tag: str
    optim: Mapping[int, Path]
    model: Mapping[int, Path]
    partitioned: bool


def recognise(path: Path) -> bool:
    """Tell a DeepSpeed checkpoint, or the folder around one, from its files' names."""
    try:
        return path.is_dir() and (_is_checkpoint(path) or any(_tags(path)) or _latest(path) is not None)
    except (OSError, ConversionError):
        return False


def find(path: Path, tag: str | None = None) -> ZeroFolder:
    """Return the files of a checkpoint.

    Args:
        path: its folder, or the one around it.
        tag: its name in the folder around it. By default, in the Trainer's ``checkpoint-N``, the one of step N, or of
            N-1 as some versions count; elsewhere what ``latest`` names, or the only one.

    Raises:
        ConversionError: there is none, it cannot be told which of several, or it is of a kind that is not read.
        DamagedSourceError: a file is missing.
    """
    if tag is None and _is_checkpoint(path):
        return _files(path, path.parent)
    root = path.parent if _is_checkpoint(path) else path
    name = tag or _of_step(root) or _latest(root) or _only(root)
    folder = root / name
    if not is_name(name) or not folder.is_dir():
        raise ConversionError(
            f"{root} has no checkpoint {name!r}{_named(root, tag)}; it has {', '.join(_tags(root)) or 'none'}: "
            f"give one with --tag."
        )
    return _files(confined(folder, root), root)


def is_name(tag: str) -> bool:
    """Tell whether a tag is the name of a folder, and no way out of the one around it."""
    return tag not in ("", "..") and Path(tag).name == tag and len(tag.encode()) < _LONGEST


def _named(root: Path, tag: str | None) -> str:
    return "" if tag else f", which {root / LATEST} names"


def _of_step(root: Path) -> str | None:
    """Return the checkpoint that the Trainer's name of a folder means; ``latest`` may be another folder's copy."""
    trainer = _TRAINER.fullmatch(root.absolute().name)
    step = int(trainer[1]) if trainer else 0
    names = (f"global_step{step}", f"global_step{step - 1}") if trainer else ()
    return next((name for name in names if (root / name).is_dir() and _is_checkpoint(root / name)), None)


def _only(root: Path) -> str:
    tags = _tags(root)
    if len(tags) != 1:
        raise ConversionError(
            f"{root} has no file {LATEST!r} that says which of its checkpoints is meant ({', '.join(tags) or 'none'}); "
            f"give one with --tag."
        )
    return tags[0]


def _tags(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.is_symlink() and _is_checkpoint(p))


def _latest(root: Path) -> str | None:
    file = root / LATEST
    if not file.is_file() or file.stat().st_size > 4096:
        return None
    name = file.read_bytes().decode(errors="replace").strip()
    # Other tools write a file of that name, too.
    known = _STEP.fullmatch(name) or (
        Path(name).name == name and (root / name).is_dir() and _is_checkpoint(root / name)
    )
    return name if known else None


def _is_checkpoint(folder: Path) -> bool:
    if (folder / _UNIVERSAL).is_dir():
        return False
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    patterns = (OPTIM, MODEL3, MODEL12, *(pattern for pattern, _, _ in _UNREAD))
    return any(pattern.fullmatch(name) for name in names for pattern in patterns)


def _files(folder: Path, root: Path) -> ZeroFolder:
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    for pattern, what, instead in _UNREAD:
        if any(pattern.fullmatch(name) for name in names):
            raise ConversionError(f"{folder} has {what}, which are not read; {instead}.")
    _check_tensor_parallel(folder, names)
    optim = _by_rank(folder, names, OPTIM)
    model = _by_rank(folder, names, MODEL3)
    partitioned = bool(model)
    if not model:
        model = dict(enumerate(folder / name for name in names if MODEL12.fullmatch(name)))
    if not optim and not partitioned:
        raise ConversionError(
            f"{folder} has no optimizer states of ZeRO, so it was saved without ZeRO (stage 0); convert the file "
            f"mp_rank_00_model_states.pt itself, with --from torch."
        )
    ranks = max([*optim, *(model if partitioned else ())], default=0) + 1
    _check_complete(folder, "zero_pp_rank_{}_mp_rank_00_optim_states.pt", optim, ranks)
    _check_complete(
        folder,
        "zero_pp_rank_{}_mp_rank_00_model_states.pt" if partitioned else "mp_rank_00_model_states.pt",
        model,
        ranks if partitioned else 1,
    )
    return ZeroFolder(folder, root, folder.name, optim, model, partitioned)


def _check_tensor_parallel(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        match = next((m for pattern in (OPTIM, MODEL3, MODEL12) if (m := pattern.fullmatch(name))), None)
        if match and int(match["mp"]):
            raise ConversionError(
                f"{folder} has {name}, a part of parameters that tensor parallelism cut, which is not read; convert it "
                f"with DeepSpeed's ds_to_universal.py."
            )


def _by_rank(folder: Path, names: Iterable[str], pattern: re.Pattern[str]) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if not match:
            continue
        rank = int(match["rank"])
        if rank in found:
            raise DamagedSourceError(
                f"{folder} has two files of rank {rank}, {found[rank].name} and {name}: two checkpoints were saved "
                f"into it; remove the files of one."
            )
        found[rank] = confined(folder / name)
    return dict(sorted(found.items()))


def _check_complete(folder: Path, name: str, files: Mapping[int, Path], ranks: int) -> None:
    missing = next((rank for rank in range(ranks) if rank not in files), None)
    if missing is not None:
        raise DamagedSourceError(
            f"{folder} lacks {name.format(missing)} of its {ranks} ranks; copy the whole folder anew."
        )
