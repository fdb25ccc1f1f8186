"""The short forms of ``tailor merge``: what a recipe's file would say, said by options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from tailor_dcp.merging.sources import Opener
from tailor_dcp.merging.values import competition
from tailor_dcp.names import listed
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.flags import assemble, read_flags
from tailor_dcp.recipes.mergekit_data import Plan
from tailor_dcp.recipes.native import KEEP, Recipe, Take


@dataclass(frozen=True)
class Asked:
    """What the options say; None, or nothing, where one was not given."""

    base: str | None
    take: Sequence[str]
    rename: Sequence[str]
    drop: Sequence[str]
    train: str | None
    optimizer: str | None
    max_stale_steps: int | None
    method: str | None
    models: bool
    weights: str | None
    settings: Sequence[str]
    flags: str | None
    at: int | None


def recipe_of(before: Sequence[str], asked: Asked, allow: tuple[str, ...]) -> str | Recipe | Plan:
    """Return the recipe's file, or the recipe that the options spell out.

    Args:
        before: the arguments before the folder to make.
        asked: the options.
        allow: classes that may be unpickled.

    Raises:
        RecipeError: they make no sense together.
    """
    if asked.flags is not None:
        return _by_flags(before, asked, allow)
    if asked.method is not None or asked.models:
        return _models(before, asked)
    if asked.base is not None:
        return _takes(before, asked)
    _refuse(asked, (), "a recipe's file")
    if len(before) != 1:
        raise RecipeError(
            "Give a recipe and the folder to make; or --base with --take and the folder; or --method with --models, "
            "the models and the folder; or --flags with --at, the run and the folder."
        )
    return before[0]


def _takes(before: Sequence[str], asked: Asked) -> Recipe:
    _refuse(asked, ("base", "take", "rename", "drop", "train", "optimizer", "max_stale_steps"), "--base")
    if before:
        raise RecipeError(f"With --base there is no recipe file, so {before[0]!r} has no meaning; leave it out.")
    assert asked.base is not None
    renames: dict[str, tuple[str, ...]] = {}
    for text in asked.rename:
        old, new = _pair(text, "--rename", "OLD=NEW")
        renames[old] = (*renames.get(old, ()), new)
    takes = tuple(Take(*_pair(text, "--take", "LAYERS=SOURCE")) for text in asked.take)
    return Recipe(
        base=asked.base,
        takes=takes,
        rename=renames,
        drop=tuple(asked.drop),
        train=asked.train,
        optimizer=asked.optimizer or KEEP,
        max_stale_steps=asked.max_stale_steps,
        name="the command line",
        text=_written(asked, takes, renames),
    )


def _written(asked: Asked, takes: Sequence[Take], renames: Mapping[str, tuple[str, ...]]) -> str:
    """Return the file that would say the same, for model cards."""
    said: dict[str, Any] = {
        "base": asked.base,
        "layers": {take.layers: take.source for take in takes},
        "rename": {old: list(new) for old, new in renames.items()},
        "drop": list(asked.drop),
        "train": asked.train,
        "optimizer": asked.optimizer,
        "max_stale_steps": asked.max_stale_steps,
    }
    return yaml.safe_dump({key: value for key, value in said.items() if value not in (None, {}, [])}, sort_keys=False)


def _models(before: Sequence[str], asked: Asked) -> Plan:
    _refuse(asked, ("method", "models", "weights", "settings", "base", "optimizer"), "--method")
    if asked.method is None or not asked.models or not before:
        raise RecipeError("Write --method METHOD --models MODEL MODEL ... OUT, as --method linear --models A B C OUT.")
    if len(before) < 2 and asked.base is None:
        raise RecipeError("--models takes the models and then the folder to make: --models MODEL MODEL ... OUT.")
    weights = None if asked.weights is None else [_number(text, "--weights") for text in asked.weights.split(",")]
    settings = dict(_pair(text, "--set", "NAME=VALUE") for text in asked.settings)
    values = {name: _value(name, text) for name, text in settings.items()}
    plan = competition(asked.method, before, values, weights=weights, base=asked.base)
    return plan if asked.optimizer is None else replace(plan, optimizer=asked.optimizer)


def _value(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {name}={text} is no value; write a number, true or false, or a list.") from error


def _by_flags(before: Sequence[str], asked: Asked, allow: tuple[str, ...]) -> Recipe:
    _refuse(asked, ("flags", "at", "base"), "--flags")
    if asked.at is None or len(before) != 1:
        raise RecipeError("Write --flags LOG --at STEP RUN OUT, as --flags logs/flags.jsonl --at 160 run out.")
    assert asked.flags is not None
    return assemble(read_flags(asked.flags), asked.at, before[0], Opener(allow).index, asked.base)


_OPTIONS = {"settings": "set"}


def _refuse(asked: Asked, known: Sequence[str], form: str) -> None:
    """Refuse options that mean nothing here: they would be ignored."""
    given = [name for name, value in vars(asked).items() if value not in (None, (), [], False)]
    others = [f"--{_OPTIONS.get(name, name).replace('_', '-')}" for name in given if name not in known]
    if others:
        raise RecipeError(f"{listed(others).replace(' or ', ' and ')} has no meaning with {form}; leave it out.")


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    left, found, right = text.partition("=")
    if not (left and found and right):
        raise RecipeError(f"{option} {text!r} makes no sense; write it as {form}.")
    return left, right


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise RecipeError(f"{option}: {text!r} is no number; write them as 0.5,0.3,0.2.") from error
