"""Value merges: a catalog whose tensors are computed from those of several models while they are written."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from tailor_dcp.catalog import Catalog
from tailor_dcp.merging.catalogs import Repeated
from tailor_dcp.merging.model_files import check_vocabularies, files_of_merge, template_of, tokenizer_files
from tailor_dcp.merging.value_adapters import check_adapters, is_adapter
from tailor_dcp.merging.value_state import with_state
from tailor_dcp.merging.value_tensors import Bench, Computed, Windowed
from tailor_dcp.methods.base import REQUIRED, Input, Method, Request
from tailor_dcp.methods.registry import method_named
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.mergekit_data import Plan
from tailor_dcp.recipes.mergekit_plan import Made, Merge, resolve
from tailor_dcp.recipes.mergekit_schema import parse
from tailor_dcp.tensors import Readable, cast, same

_WEIGHT = "weight"
_ELEMENTWISE = frozenset(["passthrough", "linear", "task_arithmetic"])
"""Methods that look at one element at a time, so that a stretch of a tensor can be merged without the rest."""


def competition(
    method: str,
    models: Sequence[str],
    parameters: Mapping[str, Any] | None = None,
    *,
    weights: Sequence[float] | None = None,
    base: str | None = None,
    dtype: str | None = None,
) -> Plan:
    """Return the plan that merges whole models, or adapters of equal rank, without a file that says so.

    Args:
        method: the merge method's name.
        models: the models' folders.
        parameters: what the method is told besides.
        weights: one for each model; equal ones by default, for methods that take any.
        base: the base model, for methods that take one.
        dtype: what the models are cast to.

    Raises:
        RecipeError: there is no such method, it takes no weights, or there is not one for each model.
    """
    weighted = any(parameter.name == _WEIGHT for parameter in method_named(method).model_parameters)
    if weights is not None and not weighted:
        raise RecipeError(f"The merge method {method!r} takes no weights; leave --weights out.")
    if weights is not None and len(weights) != len(models):
        raise RecipeError(f"There are {len(weights)} weights for {len(models)} models; give one for each.")
    _check_told(method_named(method), parameters or {}, base)
    plan: dict[str, Any] = {"merge_method": method}
    given = [1.0] * len(models) if weights is None else [float(weight) for weight in weights]
    own = [{"parameters": {_WEIGHT: weight}} if weighted else {} for weight in given]
    plan["models"] = [{"model": str(model), **said} for model, said in zip(models, own, strict=True)]
    options = {"base_model": base, "dtype": dtype, "parameters": dict(parameters or {})}
    plan |= {key: value for key, value in options.items() if value}
    text = yaml.safe_dump(plan, sort_keys=False)
    return parse(plan, lambda _: "--method", name="--method", text=text)


def _check_told(method: Method, parameters: Mapping[str, Any], base: str | None) -> None:
    """See that everything is told that a plan without a file can only be told by options."""
    if method.base == "needed" and base is None:
        raise RecipeError(f"The merge method {method.name!r} needs a base model; give it with --base MODEL.")
    asked = [*method.parameters, *(one for one in method.model_parameters if one.name != _WEIGHT)]
    for parameter in asked:
        if parameter.default is REQUIRED and parameter.name not in parameters:
            raise RecipeError(
                f"The merge method {method.name!r} needs {parameter.name!r}; give it with --set {parameter.name}=VALUE."
            )


def checked(plan: Plan, sources: Mapping[str, Catalog]) -> Merge:
    """Resolve a plan, and see that its models' configurations and tokenizers go together, too.

    Raises:
        RecipeError: the plan and its models do not go together. No tensor was read.
        TailorError: a source's files cannot be read.
    """
    check_adapters(plan, sources)
    check_vocabularies(plan, sources)
    return resolve(plan, sources)


def value_catalog(
    merge: Merge,
    sources: Mapping[str, Catalog],
    scratch: Path,
    *,
    seed: int | None = None,
    optimizer: str | None = None,
) -> Catalog:
    """Return what a plan makes of its models, with nothing computed yet.

    A tensor is computed, from all of its inputs at once, when a writer asks for its first element. So memory holds, for
    each thread that writes, about one tensor of each model and what the method needs beside; with methods that look at
    one element at a time, a window of each.

    Args:
        merge: the plan, as ``checked`` has resolved it.
        sources: what each of the plan's models holds; the catalogs that it was resolved with.
        scratch: an empty folder for the result's configuration, model card and the like. It must stay until the
            catalog is written.
        seed: fixes what stochastic methods draw; by default it is drawn itself, and a note tells it.
        optimizer: what becomes of moments: ``drop``; ``average`` (linear alone: as the weights are, and the largest
            ``step``); ``keep`` (passthrough alone: each tensor's own); or the model that all of them come from. The
            plan's own word by default. What the plan computes has no moments of its own, so one must be given if a
            source has some.

    Raises:
        RecipeError: the moments cannot be had as asked, or tensors that are not of floating point differ.
        TailorError: a source's files cannot be read.
    """
    drawn = secrets.randbelow(1 << 32) if seed is None else seed
    leader = sources[merge.plan.leader]
    catalog = Catalog(
        source=leader.source,
        format="merge",
        weights=_weights(merge, sources, drawn),
        buffers=_marked(merge, {model: held.buffers for model, held in sources.items()}),
        frozen=_marked(merge, {model: held.frozen for model, held in sources.items()}),
        files=_files(merge, sources, scratch),
        notes=tuple(dict.fromkeys(_notes(merge, sources, drawn if seed is None else None))),
    )
    return with_state(catalog, merge, sources, merge.plan.optimizer if optimizer is None else optimizer)


def _weights(merge: Merge, sources: Mapping[str, Catalog], seed: int) -> dict[str, Readable]:
    bench = Bench()
    made: dict[str, Readable] = {}
    taken: set[int] = set()
    for name, one in merge.tensors.items():
        tensor = _readable(merge, one, sources, bench, seed)
        # A layer that is there twice is not tied to itself: training moves each on its own.
        made[name] = Repeated(tensor) if id(tensor) in taken else tensor
        taken.add(id(tensor))
    made |= {name: made[main] for name, main in merge.ties.items()}
    order = dict.fromkeys([*sources[merge.plan.leader].weights, *made])
    return {name: made[name] for name in order if name in made}


def _readable(merge: Merge, made: Made, sources: Mapping[str, Catalog], bench: Bench, seed: int) -> Readable:
    inputs = [sources[taken.model].weights[taken.name] for taken in made.inputs]
    if made.copied:
        return cast(cast(inputs[0], made.computed), made.dtype)
    if not all(tensor.dtype.is_floating_point for tensor in inputs):
        _check_equal(made, inputs)
        return inputs[0]
    given = [cast(tensor, made.computed) for tensor in inputs]
    if merge.method.name in _ELEMENTWISE:
        return Windowed(made.size, made.dtype, given, lambda windows: _merged(merge, made, windows, seed))
    return Computed(
        made.size, made.dtype, lambda: _merged(merge, made, [tensor.whole() for tensor in given], seed), bench
    )


def _merged(merge: Merge, made: Made, tensors: Sequence[torch.Tensor], seed: int) -> torch.Tensor:
    request = Request(
        name=made.name,
        inputs=tuple(Input(tensor, taken.parameters) for tensor, taken in zip(tensors, made.inputs, strict=True)),
        base=made.base,
        parameters=made.parameters,
        seed=_seed(seed, made.name),
    )
    return merge.method.merge(request).to(made.computed).to(made.dtype)


def _seed(seed: int, name: str) -> int:
    """Return a seed that is another one for each tensor, whatever the order in which they are computed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") >> 1


def _check_equal(made: Made, inputs: Sequence[Readable]) -> None:
    """See that models agree about what has no mean: counters, masks and the like."""
    first, *others = inputs
    for taken, other in zip(made.inputs[1:], others, strict=True):
        if not same(first, other):
            raise RecipeError(
                f"{made.name} is not of floating point and differs between {made.inputs[0].model} and {taken.model}, "
                f"so it cannot be merged; make it equal in both, or take its layer from one model."
            )


def _marked(merge: Merge, held: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """Return the names of the result whose inputs are marked in their models, as buffers or as frozen."""
    found = {name for name, made in merge.tensors.items() if all(t.name in held[t.model] for t in made.inputs)}
    return frozenset(found | {name for name, main in merge.ties.items() if main in found})


def _files(merge: Merge, sources: Mapping[str, Catalog], scratch: Path) -> dict[str, Path]:
    plan = merge.plan
    leader = sources[plan.leader]
    return files_of_merge(
        leader.files,
        scratch,
        layers=merge.layers,
        text=plan.text,
        models=tuple(dict.fromkeys([*([plan.base] if plan.base else []), *plan.models])),
        method=plan.method,
        dtype=plan.out_dtype or plan.dtype,
        untied=any(name not in merge.ties for name in leader.ties if name in merge.tensors),
        tokenizer=tokenizer_files(plan, sources),
        chat_template=template_of(plan, sources),
    )


def _notes(merge: Merge, sources: Mapping[str, Catalog], drawn: int | None) -> Iterator[str]:
    yield from merge.notes
    if merge.method.stochastic and drawn is not None:
        yield f"The merge method {merge.method.name!r} draws random numbers; with --seed {drawn} it draws them again."
    if is_adapter(sources[merge.plan.leader]) and len(sources) > 1:
        yield (
            "Adapters are merged factor by factor, which is not the same as merging what they add to the model: the "
            "product of means is no mean of products."
        )
    for model in merge.plan.models:
        yield from sources[model].notes
