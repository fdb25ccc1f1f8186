"""Reading mergekit's plans as they are: every key is checked, and the forms become one.

The plan's format is that of mergekit 0.1.5 (https://github.com/arcee-ai/mergekit), which ignores the keys that it does
not know. Here they are refused: a plan with a slip in it would give other weights than its author thinks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tailor_dcp.names import close, listed
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.mergekit_data import Plan, PlanSlice, PlanSource
from tailor_dcp.recipes.mergekit_parameters import setting
from tailor_dcp.recipes.mergekit_refusals import Place, Where, refuse

_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}
_TEMPLATE_PART = "{"


def _model(value: Any) -> Any:
    """Return the path of a model that is written as mergekit's own data has it."""
    for key, others in (("model", {"lora"}), ("path", {"revision"})):
        if not isinstance(value, Mapping) or key not in value or not set(value) <= {key, *others}:
            break
        value = value[key]
    return value


def _dtype(value: Any) -> Any:
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name is not None and (not isinstance(name, str) or name not in _DTYPES):
        raise ValueError(f"{value!r} is not among {listed(list(_DTYPES))}")
    return name


_Model = Annotated[str, BeforeValidator(_model), Field(min_length=1)]
_Dtype = Annotated[str | None, BeforeValidator(_dtype)]
_Parameters = dict[str, Annotated[Any, BeforeValidator(setting)]] | None


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Input(_Checked):
    model: _Model
    parameters: _Parameters = None


class _Part(_Input):
    layer_range: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


class _Slice(_Checked):
    sources: Annotated[list[_Part], Field(min_length=1)]
    base_model: _Model | None = None
    residual_weight: None = None  # mergekit reads it and does nothing with it
    parameters: _Parameters = None


class _Module(_Checked):
    slices: Annotated[list[_Slice], Field(min_length=1)] | None = None
    models: Annotated[list[_Input], Field(min_length=1)] | None = None
    parameters: _Parameters = None


class _Tokenizer(_Checked):
    source: _Model
    tokens: dict[str, Any] | None = None
    pad_to_multiple_of: int | None = None


class _Top(_Module):
    merge_method: str
    modules: dict[str, _Module] | None = None
    base_model: _Model | None = None
    dtype: _Dtype = None
    out_dtype: _Dtype = None
    tokenizer_source: _Model | None = None
    tokenizer: _Tokenizer | None = None
    chat_template: str | None = None
    optimizer: str | None = None


def parse(data: object, where: Where, *, name: str = "the plan", text: str = "") -> Plan:
    """Return the plan that a document holds.

    Args:
        data: the document's content, of plain builtins.
        where: gives the words that a sentence about a place in the document begins with: the file and the line.
        name: what the plan is called in messages.
        text: the document as it was written.

    Raises:
        RecipeError: a key is unknown or missing, a value makes no sense, or it asks for what is not done here.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where(())}: there are no keys, so it is no plan; write at least a merge_method.")
    refuse(data, where)
    try:
        held = _Top.model_validate(dict(data))
    except ValidationError as error:
        raise _said(error, where) from error
    return _plan(held, where, name, text)


def _plan(held: _Top, where: Where, name: str, text: str) -> Plan:
    module, place = _only_form(held, where)
    base = held.base_model
    return Plan(
        method=held.merge_method,
        slices=_slices(module, base, where, place),
        base=base,
        parameters=tuple(scope.parameters or {} for scope in ([module, held] if module is not held else [held])),
        dtype=_DTYPES[held.dtype] if held.dtype else None,
        out_dtype=_DTYPES[held.out_dtype] if held.out_dtype else None,
        tokenizer=_tokenizer(held, where),
        chat_template=_template(held.chat_template, where),
        optimizer=held.optimizer,
        name=name,
        text=text,
    )


def _only_form(held: _Top, where: Where) -> tuple[_Module, Place]:
    """Return what holds the models or slices, and where it is."""
    forms = [key for key in ("models", "slices", "modules") if getattr(held, key)]
    if len(forms) != 1:
        found = f"are {listed(forms).replace(' or ', ' and ')}" if forms else "is none of models, slices and modules"
        raise RecipeError(f"{where(tuple(forms[-1:]))}: there {found}; a plan has exactly one of the three.")
    if held.modules is None:
        return held, ()
    if "default" not in held.modules:
        raise RecipeError(f"{where(('modules',))}: there is no module in it; name it 'default'.")
    module, place = held.modules["default"], ("modules", "default")
    if bool(module.slices) == bool(module.models):
        raise RecipeError(f"{where(place)}: a module has either slices or models.")
    return module, place


def _slices(module: _Module, base: str | None, where: Where, place: Place) -> tuple[PlanSlice, ...]:
    if module.models is not None:
        return (_of_models(module.models, base, where, place),)
    slices = []
    for number, one in enumerate(module.slices or ()):
        here = (*place, "slices", number)
        sources = [_part(part, where((*here, "sources", i))) for i, part in enumerate(one.sources)]
        slices.append(PlanSlice(tuple(sources), one.base_model or base, one.parameters or {}, where(here)))
    return tuple(slices)


def _part(part: _Part, where: str) -> PlanSource:
    first, stop = part.layer_range
    if stop < first:
        raise RecipeError(f"{where}: the layer_range [{first}, {stop}] of {part.model} ends before it starts.")
    return PlanSource(part.model, (first, stop), part.parameters or {}, where)


def _of_models(models: Sequence[_Input], base: str | None, where: Where, place: Place) -> PlanSlice:
    """Return the slice of whole models; a base model that is not listed comes last."""
    here = (*place, "models")
    sources = [
        PlanSource(one.model, None, one.parameters or {}, where((*here, number))) for number, one in enumerate(models)
    ]
    if base is not None and all(source.model != base for source in sources):
        sources.append(PlanSource(base, where=where(("base_model",))))
    return PlanSlice(tuple(sources), base, where=where(here))


def _tokenizer(held: _Top, where: Where) -> str | None:
    if held.tokenizer_source and held.tokenizer:
        raise RecipeError(f"{where(('tokenizer',))}: there are both tokenizer and tokenizer_source; leave one.")
    named = held.tokenizer.source if held.tokenizer else held.tokenizer_source
    if named == "base" and held.base_model is None:
        raise RecipeError(
            f"{where(('tokenizer_source',))}: the tokenizer is the base model's, and there is no base_model."
        )
    return held.base_model if named == "base" else named


def _template(template: str | None, where: Where) -> str | None:
    if template is None or template == "auto" or _TEMPLATE_PART in template:
        return template
    raise RecipeError(
        f"{where(('chat_template',))}: {template!r} is no Jinja template, and mergekit's own templates are not part of "
        f"this package; write the template itself, or 'auto'."
    )


def _said(error: ValidationError, where: Where) -> RecipeError:
    first = error.errors()[0]
    place: Place = tuple(first["loc"])
    key = str(place[-1]) if place else ""
    if first["type"] == "extra_forbidden":
        known = list(_at(place[:-1]).model_fields)
        near = close(key, known, 1)[0]
        return RecipeError(
            f"{where(place)}: the key {key!r} is unknown; did you mean {near!r}? There are {listed(known)}."
        )
    if first["type"] == "missing":
        return RecipeError(f"{where(place[:-1])}: there is no {key!r}; mergekit's plans have one there.")
    words = ".".join(map(str, place))
    problem = first["msg"].removeprefix("Value error, ")
    return RecipeError(f"{where(place)}: {words} makes no sense: {problem[:1].lower()}{problem[1:]}.")


def _at(place: Place) -> type[BaseModel]:
    """Return the class whose keys a place of the document has."""
    inner: dict[str, type[BaseModel]] = {
        "sources": _Part, "slices": _Slice, "models": _Input, "modules": _Module, "tokenizer": _Tokenizer,
    }  # fmt: skip
    return next((inner[part] for part in reversed(place) if isinstance(part, str) and part in inner), _Top)
