"""Whether a plan and its models go together: one sentence for each way in which they do not."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tailor_dcp.catalog import Catalog
from tailor_dcp.methods.base import Method
from tailor_dcp.methods.registry import method_named, method_names
from tailor_dcp.names import close, listed
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.mergekit_anatomy import Anatomy, is_input
from tailor_dcp.recipes.mergekit_data import Plan, PlanSlice

_RECOMPUTED = ("inv_freq", "position_ids", "masked_bias")
"""Buffers that old files hold and newer ones do not, as models compute them anew."""
_MASK = "attn.bias"
_HEADS = ("lm_head", "embed_out", "output")


def check_parameters(plan: Plan, method: Method) -> list[str]:
    """See that the method takes what the plan says; return notes about what only other methods take.

    Raises:
        RecipeError: no method takes a parameter, so it is a slip.
    """
    known = {parameter.name for parameter in (*method.parameters, *method.model_parameters)}
    said: dict[str, str] = {}
    for one in plan.slices:
        for where, scope in [(one.where, one.parameters), *((s.where, s.parameters) for s in one.sources)]:
            said |= {name: said.get(name, where) for name in scope}
    for scope in plan.parameters:
        said |= {name: said.get(name, plan.name) for name in scope}
    notes = []
    for name, where in said.items():
        if name in known:
            continue
        if name not in _all_parameters():
            near = listed([repr(other) for other in close(name, known)]) if known else "nothing, as it takes none"
            raise RecipeError(
                f"{where}: the merge method {method.name!r} has no parameter {name!r}; did you mean {near}?"
            )
        notes.append(f"The merge method {method.name!r} does not take {name!r}, which has no effect.")
    return notes


def _all_parameters() -> set[str]:
    found: set[str] = set()
    for name in method_names():
        try:
            method = method_named(name)
        except (RecipeError, ImportError):
            continue  # another package's, which the plan does not ask for
        found |= {parameter.name for parameter in (*method.parameters, *method.model_parameters)}
    return found


def check_sources(one: PlanSlice, method: Method, plan: Plan) -> int | None:
    """See that the method takes a slice's models; return which is the base model's.

    Raises:
        RecipeError: it does not.
    """
    models = [source.model for source in one.sources]
    twice = next((model for model in models if models.count(model) > 1), None)
    if twice is not None:
        raise RecipeError(f"{one.where}: {twice} is merged with itself; name it once in a slice.")
    base = models.index(one.base) if one.base in models else None
    minds = method.base == "needed" or any(not parameter.of_base for parameter in method.model_parameters)
    if one.base is not None and base is None and minds:
        raise RecipeError(
            f"{one.where}: the base model {one.base} is not among the sources, and {method.name!r} needs its layers; "
            f"add it to the slice."
        )
    try:
        method.check(len(models), base is not None)
    except RecipeError as error:
        raise RecipeError(f"{one.where}: {error}") from error
    return base


def matched(one: PlanSlice, held: tuple[Mapping[str, str], ...]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Return the names of each tensor in all of a slice's models, and notes about those that were left out.

    Raises:
        RecipeError: a model lacks a tensor that another has.
    """
    found: dict[str, tuple[str, ...]] = {}
    notes = []
    for end in dict.fromkeys(end for names in held for end in names):
        if all(end in names for names in held):
            found[end] = tuple(names[end] for names in held)
            continue
        there = next(names[end] for names in held if end in names)
        lacking, having = (
            next(s.model for s, names in zip(one.sources, held, strict=True) if (end in names) is has)
            for has in (False, True)
        )
        if end.endswith((*_RECOMPUTED, _MASK)):
            notes.append(f"{there} of {having} is left out, as {lacking} has none: models compute it anew.")
            continue
        raise RecipeError(
            f"{one.where}: {lacking} has no {there}, which {having} has; merge models of one architecture and number "
            f"of layers."
        )
    return found, notes


def check_built(
    one: PlanSlice,
    layer: int | None,
    matches: Mapping[str, tuple[str, ...]],
    leader: Anatomy,
    catalogs: Mapping[str, Catalog],
) -> None:
    """See that tensors have one shape in all models, and the one that the result's configuration asks for.

    Args:
        one: the slice.
        layer: the layer's number in the first model; None outside of the layers.
        matches: the tensors' names in the slice's models.
        leader: the model whose configuration the result has.
        catalogs: what the models hold.

    Raises:
        RecipeError: shapes differ.
    """
    models = [source.model for source in one.sources]
    for names in matches.values():
        sizes = [catalogs[model].weights[name].size for model, name in zip(models, names, strict=True)]
        for model, name, size in zip(models, names, sizes, strict=True):
            _check_size(one, (models[0], names[0], sizes[0]), (model, name, size))
    if models[0] == leader.model or not matches:
        return
    weights, own = catalogs[models[0]].weights, catalogs[leader.model].weights
    if layer is None:
        for names in matches.values():
            if names[0] not in own:
                raise RecipeError(f"{one.where}: {leader.model} has no {names[0]}, which {models[0]} has; {_MIXED}")
            _check_size(
                one, (leader.model, names[0], own[names[0]].size), (models[0], names[0], weights[names[0]].size)
            )
        return
    built = {end: weights[names[0]].size for end, names in matches.items()}
    others = [{end: own[name].size for end, name in held.items()} for held in leader.layers]
    if built in others:
        return
    alike = next((other for other in others if other.keys() == built.keys()), None)
    if alike is not None:
        end = next(end for end in built if built[end] != alike[end])
        _check_size(one, (leader.model, end, alike[end]), (models[0], matches[end][0], built[end]))
    odd = sorted(set(built) ^ set(others[0]))[0] if others else next(iter(built))
    raise RecipeError(
        f"{one.where}: layer {layer} of {models[0]} is built otherwise than those of {leader.model} "
        f"({odd.lstrip('.')} is in one alone); {_MIXED}"
    )


_MIXED = "merge models of one architecture."


def _check_size(one: PlanSlice, a: tuple[str, str, torch.Size], b: tuple[str, str, torch.Size]) -> None:
    if a[2] == b[2]:
        return
    name = b[1]
    vocabulary = is_input(name) or any(part in _HEADS for part in name.split("."))
    if vocabulary and a[2][1:] == b[2][1:]:
        raise RecipeError(
            f"{one.where}: the vocabulary has {a[2][0]} tokens in {a[0]} and {b[2][0]} in {b[0]} ({name}); give all "
            f"models one vocabulary first, as mergekit-tokensurgeon and resize_token_embeddings do."
        )
    raise RecipeError(
        f"{one.where}: {name} has the shape {tuple(b[2])} in {b[0]} and {tuple(a[2])} in {a[0]}; merge models of one "
        f"shape."
    )
