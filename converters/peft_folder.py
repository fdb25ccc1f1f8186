"""PEFT adapter folders: what ``PeftModel.save_pretrained`` writes, by the names that a live PEFT model has.

A live model's names have the adapter's name in them (``q_proj.lora_A.default.weight``), and trained copies of whole
modules lie under ``modules_to_save``; in the file both are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tailor_dcp.catalog import Catalog
from tailor_dcp.errors import ConversionError
from tailor_dcp.tensors import Readable

from . import hf_files
from .hf_files import ADAPTER, ADAPTER_CONFIG, carried, confined, read_json, stored_tensors
from .options import Options

WEIGHTS = "adapter_model.safetensors"
_FILES = (WEIGHTS, f"{ADAPTER}.bin")
_PREFIXES = {
    "LORA": "lora_",
    "IA3": "ia3_",
    "LOHA": "hada_",
    "LOKR": "lokr_",
    "OFT": "oft_",
    "HRA": "hra_",
    "LN_TUNING": "ln_tuning_",
    "FOURIERFT": "fourierft_",
    "TRAINABLE_TOKENS": "trainable_tokens_",
}
"""How the names of the parameters begin that each method adds to a module."""
_TOKENS = _PREFIXES["TRAINABLE_TOKENS"]  # other methods can train tokens beside
_EMBEDDINGS = frozenset(["embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared"])
_SAVED = "modules_to_save"
_DORA = "lora_magnitude_vector"  # a module since long, but in files still a parameter
_NAME = "default"


def weight_file(path: Path) -> Path | None:
    """Return the file that an adapter's folder has its weights in; None if it is none."""
    if not (path / ADAPTER_CONFIG).is_file():
        return None
    return next((path / name for name in _FILES if (path / name).is_file()), None)


def open_adapter(path: Path, options: Options) -> Catalog:
    """Open an adapter's folder.

    Raises:
        ConversionError: it is none, or of a method whose names are not known here.
        DamagedSourceError: a file is damaged.
    """
    file = weight_file(path)
    if file is None:
        raise ConversionError(f"{path} holds neither weights nor an adapter; give a folder or file that does.")
    config = read_json(path / ADAPTER_CONFIG)
    prefixes = _prefixes(config, path)
    saved = config.get(_SAVED) or []
    saved = saved if isinstance(saved, list) and all(isinstance(name, str) for name in saved) else []
    stored = stored_tensors(hf_files.WeightFiles([confined(file)], {}), options)
    weights = {_live(name, prefixes, saved): tensor for name, tensor in stored.items()}
    return Catalog(source=path, format="hf", weights=weights, files=carried(path))


def is_adapter(catalog: Catalog) -> bool:
    """Tell whether a folder of it should be an adapter's: there is an adapter's configuration and no model's."""
    return ADAPTER_CONFIG in catalog.files and hf_files.CONFIG not in catalog.files


def filed(catalog: Catalog) -> tuple[Mapping[str, Readable], Sequence[str]]:
    """Return an adapter's weights as its folder has them, and what the user should know.

    Raises:
        ConversionError: there are several adapters, or none.
    """
    path = catalog.files[ADAPTER_CONFIG]
    config = read_json(path)
    prefixes = _prefixes(config, path)
    parts = {fqn: _filed(fqn, prefixes) for fqn in catalog.weights}
    others = [fqn for fqn, (_, adapter) in parts.items() if adapter is None]
    # Besides its own parameters an adapter's file can have biases and embeddings, but no other weights.
    whole = any(not fqn.endswith(".bias") and not _EMBEDDINGS.intersection(fqn.split(".")) for fqn in others)
    left = {fqn for fqn in others if whole and not _belongs(fqn, config)}
    names = sorted({adapter for _, adapter in parts.values() if adapter is not None})
    if not names:
        raise ConversionError(f"{catalog.source} holds none of the parameters that {path.name} describes.")
    if len(names) > 1:
        raise ConversionError(f"{catalog.source} holds the adapters {', '.join(names)}, and a folder has room for one.")
    notes = [f"{len(left)} tensors of the model under the adapter are not part of its folder."] if left else []
    return {name: catalog.weights[fqn] for fqn, (name, _) in parts.items() if fqn not in left}, notes


def _belongs(fqn: str, config: Mapping[str, Any]) -> bool:
    """Tell whether peft would save a parameter of the model itself with the adapter."""
    if fqn.endswith(".bias"):
        return config.get("bias") == "all" or (config.get("bias") == "lora_only" and ".base_layer." in fqn)
    return fqn.endswith(".base_layer.weight") and bool(_EMBEDDINGS.intersection(fqn.split(".")))


def _prefixes(config: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    method = config.get("peft_type")
    if method not in _PREFIXES:
        known = ", ".join(_PREFIXES)
        raise ConversionError(
            f"{path} is an adapter of the method {method}, which is not converted; those that are: {known}."
        )
    return (_PREFIXES[method], _TOKENS)


def _live(name: str, prefixes: Sequence[str], saved: Sequence[str]) -> str:
    """Return the name that a parameter of the file has in a live model."""
    parts = name.split(".")
    at = _own(parts, prefixes)
    if at is not None:
        rest = parts[at + 1 :] or (["weight"] if parts[at] == _DORA else [])
        return ".".join([*parts[: at + 1], _NAME, *rest])
    for end in range(1, len(parts)):
        module = ".".join(parts[:end])
        if module.endswith(tuple(saved)):  # peft's own rule, which takes "norm" for "input_layernorm" as well
            return ".".join([module, _SAVED, _NAME, *parts[end:]])
    return name


def _filed(fqn: str, prefixes: Sequence[str]) -> tuple[str, str | None]:
    """Return the name that a live parameter has in the file, and the adapter's; None if it has no adapter's in it."""
    parts = fqn.split(".")
    if _SAVED in parts[:-2]:
        at = parts.index(_SAVED)
        return ".".join([*parts[:at], *parts[at + 2 :]]), parts[at + 1]
    own = _own(parts, prefixes)
    if own is None or own + 1 == len(parts):
        return fqn, None
    rest = [] if parts[own] == _DORA else parts[own + 2 :]
    return ".".join([*parts[: own + 1], *rest]), parts[own + 1]


def _own(parts: Sequence[str], prefixes: Sequence[str]) -> int | None:
    """Return which part of a name is the adapter's own: one of the last three, so that no module's name is meant."""
    places = [i for i in range(max(0, len(parts) - 3), len(parts)) if parts[i].startswith(tuple(prefixes))]
    return places[-1] if places else None
