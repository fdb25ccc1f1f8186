"""What lies in a Hugging Face folder: where the weights are, and which files are carried along."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from tailor_dcp.errors import ConversionError, DamagedSourceError
from tailor_dcp.tensors import Readable

from .options import Options
from .safetensors_file import open_safetensors
from .torch_file import TorchFile

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
_INDEX = ".index"
_ENDS = (".safetensors", ".bin")
_MODELS = ("model", "pytorch_model")
ADAPTER = "adapter_model"
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_TEMPLATES = "additional_chat_templates"
_CARRIED = (
    "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.bpe", "*.vocab", "*.py", "*.md",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""Files that hold no weights: configurations, tokenizers, templates, remote code, what a human reads."""
_LEFT = ("*.index.json", "*.index.*.json", "trainer_state.json")
_LARGEST_TEXT = 256 << 20
"""Bytes; the largest tokenizers have some 40 MB, and a larger index has not been seen either."""


@dataclass(frozen=True)
class WeightFiles:
    """The files in which a folder has its weights.

    Attributes:
        files: all of them.
        index: for each tensor the file that an index names; empty without an index.
    """

    files: Sequence[Path]
    index: Mapping[str, Path]


def weight_file(path: Path) -> Path | None:
    """Return the file, or the index of files, that a folder has its weights in; None if there is none.

    As in transformers, safetensors come before ``.bin`` and a single file before an index; a variant such as
    ``model.fp16.safetensors`` is taken if there is nothing else.

    Raises:
        ConversionError: there are several and nothing tells which.
    """
    if path.is_file():
        return path if _is_weights(path.name) else None
    for end, stem in zip(_ENDS, _MODELS, strict=True):
        for name in (f"{stem}{end}", f"{stem}{end}{_INDEX}.json"):
            if (path / name).is_file():
                return path / name
    for end, stem in zip(_ENDS, _MODELS, strict=True):
        variants = [*path.glob(f"{stem}{end}{_INDEX}.*.json"), *path.glob(f"{stem}.*{end}")]
        for candidates in ([p for p in variants if not _SHARD.search(p.name)], path.glob(f"*{end}")):
            found = sorted(p for p in candidates if p.is_file() and _is_weights(p.name))
            if len(found) == 1:
                return found[0]
            if found:
                names = ", ".join(file.name for file in found[:4])
                raise ConversionError(
                    f"{path} has several files of weights and no index that is theirs ({names}, …); give the one to "
                    f"convert, or the index."
                )
    return None


def _is_weights(name: str) -> bool:
    if name.startswith((ADAPTER, "training_args", "optimizer", "scheduler", "rng_state")):
        return False
    return (
        name.endswith(_ENDS[0])
        or (name.endswith(".json") and f"{_INDEX}." in name)
        or (name.startswith(_MODELS[1]) and name.endswith(_ENDS[1]))
    )


def weight_files(path: Path) -> WeightFiles:
    """Return the files that a file of weights, or an index, means.

    Raises:
        ConversionError: the index names a file outside of the folder.
        DamagedSourceError: the index cannot be read, or names a file that is not there.
    """
    if path.suffix != ".json":
        return WeightFiles([confined(path)], {})
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise DamagedSourceError(f"{path} has no weight_map that names a file for each tensor; copy it anew.")
    files: dict[str, Path] = {}
    for tensor, name in names.items():
        if name != Path(name).name or name in ("", ".", "..") or "\\" in name:
            raise ConversionError(f"{path} says that {tensor} is in {name!r}, outside of its folder; mend the index.")
        file = path.with_name(name)
        if name not in files and not _is_file(file):
            raise DamagedSourceError(f"{path} says that {tensor} is in {name}, which is missing; copy that file, too.")
        files[name] = file
    return WeightFiles(
        [confined(file) for file in files.values()], {tensor: files[name] for tensor, name in names.items()}
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is longer than any file's
        return False


def stored_tensors(files: WeightFiles, options: Options) -> dict[str, Readable]:
    """Return the tensors of all files by their names; names of one tensor are given one and the same object.

    Raises:
        ConversionError: two files hold a tensor of one name, or a file something else than tensors.
        DamagedSourceError: a file is damaged, or does not hold what the index says.
    """
    found: dict[str, Readable] = {}
    home: dict[str, Path] = {}
    for file in files.files:
        held = _pickled(file, options) if file.suffix == ".bin" else open_safetensors(file).tensors
        for name, tensor in held.items():
            if files.index and files.index.get(name) != file:
                continue  # as transformers does, which asks the index
            found[name], home[name] = tensor, file
    for name, file in files.index.items():
        if home.get(name) != file:
            raise DamagedSourceError(f"{file} does not hold {name}, which the index says is there; copy it anew.")
    return found


def _pickled(file: Path, options: Options) -> dict[str, Readable]:
    opened = TorchFile(file, options.allow)
    if not isinstance(opened.tree, Mapping):
        raise ConversionError(f"{file} holds a {type(opened.tree).__name__}, not a model's tensors by their names.")
    made: dict[tuple[Any, ...], Readable] = {}
    found: dict[str, Readable] = {}
    for name, tensor in opened.tree.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ConversionError(
                f"{file} holds {name!r}, a {type(tensor).__name__}, where a model's tensors should be."
            )
        same = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        readable = opened.stored(tensor)
        # Tensors without elements all lie at one address, and are not tied for that.
        found[name] = made.setdefault(same, readable) if tensor.numel() else readable
    return found


def carried(folder: Path) -> dict[str, Path]:
    """Return the files of a folder that are carried along and given back: all that are neither weights nor training.

    Raises:
        ConversionError: one of them is a link that leads out of the folder.
    """
    found = {path.name: path for path in _files(folder) if _is_carried(path.name)}
    templates = confined(folder / _TEMPLATES)
    found |= {f"{_TEMPLATES}/{path.name}": path for path in _files(templates) if path.suffix == ".jinja"}
    return {name: confined(path, folder) for name, path in sorted(found.items())}


def _files(folder: Path) -> Iterable[Path]:
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def _is_carried(name: str) -> bool:
    return any(fnmatch(name, p) for p in _CARRIED) and not any(fnmatch(name, p) for p in _LEFT)


def confined(path: Path, folder: Path | None = None) -> Path:
    """Return a file of the source unless it is a link that leads out of it, other than into the hub's cache.

    Raises:
        ConversionError: it does.
    """
    folder = (folder or path.parent).absolute()
    real = path.resolve()
    # The hub's cache has snapshots/<revision>/<name> -> ../../blobs/<hash>.
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if real.is_relative_to(folder.resolve()) or real.is_relative_to(blobs.resolve()):
        return path
    raise ConversionError(
        f"{path} is a link to {real}, outside of its folder; convert a folder that has the file itself."
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a table from a JSON file.

    Raises:
        DamagedSourceError: it cannot be read, or is no table.
    """
    try:
        if path.stat().st_size > _LARGEST_TEXT:
            raise DamagedSourceError(f"{path} is too large for what it should be; copy it anew.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DamagedSourceError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise DamagedSourceError(f"{path} is no JSON ({str(error).splitlines()[0]}); copy it anew.") from error
    if not isinstance(value, dict):
        raise DamagedSourceError(f"{path} is no table of names and values; copy it anew.")
    return value
