"""Reading native recipes: YAML whose every key is checked, into plain data."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tailor_dcp.names import close, listed
from tailor_dcp.recipes.documents import Document, Place
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.native import KEEP, Recipe, Take


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _as_takes(value: Any) -> Any:
    return [{"from": one} if isinstance(one, str) else one for one in _as_list(value)]


_Names = Annotated[list[str], BeforeValidator(_as_list)]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Take(_Checked):
    source: str = Field(alias="from", min_length=1)
    kinds: Annotated[_Names, Field(min_length=1)] | None = None


class _Native(_Checked):
    base: str = Field(min_length=1)
    layers: dict[str, Annotated[list[_Take], BeforeValidator(_as_takes), Field(min_length=1)]] = {}
    rename: dict[str, Annotated[_Names, Field(min_length=1)]] = {}
    drop: _Names = []
    train: str | None = Field(default=None, min_length=1)
    optimizer: str = Field(default=KEEP, min_length=1)
    max_stale_steps: int | None = Field(default=None, ge=0)


def native(document: Document) -> Recipe:
    """Return the recipe that a document holds.

    Raises:
        RecipeError: a key is unknown or missing, or a value makes no sense; it names the line.
    """
    if not isinstance(document.data, dict):
        raise RecipeError(f"{document.name} holds no keys, so it is no recipe; write at least a base.")
    try:
        held = _Native.model_validate(document.data)
    except ValidationError as error:
        raise _said(document, error) from error
    takes = [
        Take(layers, take.source, None if take.kinds is None else tuple(take.kinds))
        for layers, of_layers in held.layers.items()
        for take in of_layers
    ]
    return Recipe(
        base=held.base,
        takes=tuple(takes),
        rename={old: tuple(new) for old, new in held.rename.items()},
        drop=tuple(held.drop),
        train=held.train,
        optimizer=held.optimizer,
        max_stale_steps=held.max_stale_steps,
        name=document.name,
        text=document.text,
    )


def _said(document: Document, error: ValidationError) -> RecipeError:
    found = error.errors()
    # What is missing is often there under a wrong name.
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    place = _written(document, tuple(first["loc"]))
    key = str(place[-1]) if place else ""
    within = _Native if len(place) == 1 else _Take
    if first["type"] == "extra_forbidden":
        known = _keys(within)
        near = close(key, known, 1)[0]
        return document.error(place, f"the key {key!r} is unknown; did you mean {near!r}? There are {listed(known)}.")
    if first["type"] == "missing":
        what = "the rest comes" if within is _Native else "these layers come"
        return document.error(place, f"there is no {key!r}, the checkpoint that {what} from.")
    words = ": ".join(map(str, place))
    return document.error(place, f"{words} makes no sense: {first['msg'][:1].lower()}{first['msg'][1:]}.")


def _written(document: Document, place: Place) -> Place:
    """Return the place of a value as the document has it: one that may be a list need not be one there."""
    found: Place = ()
    value = document.data
    for part in place:
        if part == "[key]":
            break
        if isinstance(part, int) and not isinstance(value, list | dict):
            continue
        if isinstance(part, int) and isinstance(value, dict) and part not in value:
            continue
        found = (*found, part)
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            value = None
    return found


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]
