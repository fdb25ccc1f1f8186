"""Adapters of peft in a value merge: they must be of one kind, or their factors mean different things."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailor_dcp.catalog import Catalog
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.mergekit_data import Plan

ADAPTER_CONFIG = "adapter_config.json"
CONFIG = "config.json"
_WORDS = {
    "peft_type": "the method",
    "base_model_name_or_path": "the model under them",
    "r": "the rank",
    "target_modules": "the target modules",
}
_SAME = (
    "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "bias",
    "fan_in_fan_out", "layers_to_transform", "target_parameters", "trainable_token_indices", "lora_bias",
)  # fmt: skip
"""Other settings that decide what the factors mean."""


def is_adapter(catalog: Catalog) -> bool:
    """Tell whether a catalog is an adapter's: there is an adapter's configuration and no model's."""
    return _are_adapters(catalog.files)


def check_alike(name: str, files: Mapping[str, Mapping[str, Path]]) -> None:
    """See that all adapters among models are of one kind.

    Args:
        name: the recipe's name.
        files: what each model carries along: its files by their name.

    Raises:
        RecipeError: two differ in rank, target modules, the model under them or another setting that decides what
            their tensors mean.
    """
    configs = [(model, _read(held[ADAPTER_CONFIG])) for model, held in files.items() if _are_adapters(held)]
    for other in configs[1:]:
        _compare(name, configs[0], other)


def _are_adapters(files: Mapping[str, Path]) -> bool:
    return ADAPTER_CONFIG in files and CONFIG not in files


def check_adapters(plan: Plan, sources: Mapping[str, Catalog]) -> None:
    """See that the models of a plan are all adapters of one kind, or none of them is one.

    Raises:
        RecipeError: some are and others are not, or they differ in rank, target modules, the model under them or
            another setting that decides what their tensors mean.
    """
    adapters = [model for model in plan.models if is_adapter(sources[model])]
    whole = [model for model in plan.models if model not in adapters]
    if adapters and whole:
        raise RecipeError(
            f"{plan.name}: {adapters[0]} is an adapter and {whole[0]} a whole model; save the adapter with peft's "
            f"merge_and_unload first, and merge models."
        )
    check_alike(plan.name, {model: sources[model].files for model in adapters})


def _compare(plan: str, one: tuple[str, Mapping[str, Any]], other: tuple[str, Mapping[str, Any]]) -> None:
    for key in (*_WORDS, *_SAME):
        values = [_plain(config.get(key)) for _, config in (one, other)]
        if values[0] != values[1]:
            raise RecipeError(
                f"{plan}: {one[0]} and {other[0]} differ in {_WORDS.get(key, key)} ({values[0]} and {values[1]}); only "
                f"adapters that agree in it can be put together: merge each into its model first, and then the models."
            )


def _plain(value: Any) -> Any:
    """Return a setting for comparison; target modules are a set, which peft writes in any order."""
    return sorted(map(str, value)) if isinstance(value, list) else value or None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path} cannot be read as JSON ({error}); copy it anew.") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{path} is no table of names and values; copy it anew.")
    return value
