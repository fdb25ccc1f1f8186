"""Computing: doing what mergekit's plans say, by metadata alone where they only pick layers of DCP checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tailor_dcp.catalog import Catalog, in_training
from tailor_dcp.formats import formats
from tailor_dcp.layers import LayerMap
from tailor_dcp.location import METADATA
from tailor_dcp.merging.assemble import growing
from tailor_dcp.merging.model_files import template_of, tokenizer_files
from tailor_dcp.merging.picking import Outcome, Progress, check_outside, counted, pick
from tailor_dcp.merging.sources import Opener
from tailor_dcp.merging.values import checked, value_catalog
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.mergekit_data import Plan
from tailor_dcp.recipes.mergekit_plan import Merge, picks
from tailor_dcp.recipes.native import KEEP, Recipe, Take
from tailor_dcp.stores import is_remote


def compute(
    plan: Plan,
    out: Path,
    to: str | None,
    materialize: bool,
    world_size: int | None,
    allow: tuple[str, ...],
    seed: int | None,
    progress: Progress,
) -> Outcome:
    """Do what a plan says.

    Raises:
        RecipeError: it cannot be done; nothing was written.
        TailorError: a source is damaged or unreadable.
    """
    opened = Opener(allow, as_catalogs=True)
    sources = {model: opened(model) for model in plan.models}
    catalogs = {model: opened.catalog(model) for model in sources}
    target = to or _target(catalogs)
    if materialize and target != "dcp":
        raise RecipeError("--materialize is for DCP results, and this is a Hugging Face folder; add --to dcp.")
    check_outside(out, sources.values())
    if target != "hf":  # training goes on in its own dtypes, whatever a checkpoint stores
        catalogs = {model: in_training(catalog) for model, catalog in catalogs.items()}
    merge = checked(plan, catalogs)
    chosen = picks(merge)
    if chosen is not None and target == "dcp" and all((s.path / METADATA).is_file() for s in sources.values()):
        recipe = as_recipe(merge, chosen, catalogs[plan.leader])
        told = {"tokenizer": tokenizer_files(plan, catalogs), "chat_template": template_of(plan, catalogs)}
        files = {name: value for name, value in told.items() if value is not None}
        return pick(recipe, out, target, materialize, world_size, allow, progress, files)
    if is_remote(out):
        raise RecipeError(
            f"{out} is on an object store, and a merge that computes writes local folders only; copy it there."
        )
    with growing(out) as scratch:
        catalog = value_catalog(merge, catalogs, scratch, seed=seed)
        written = formats().write(catalog, out, target, world_size=world_size, progress=counted(catalog, progress))
    layers = {LayerMap().layer(fqn) for fqn in catalog.weights}
    notes = tuple(dict.fromkeys([*catalog.notes, *written]))
    return Outcome(target, len(layers), tuple(sources), catalog.bytes, notes)


def _target(catalogs: Mapping[str, Catalog]) -> str:
    """Return the format that a plan's users expect: that of their models."""
    return "hf" if all(catalog.format == "hf" for catalog in catalogs.values()) else "dcp"


def as_recipe(merge: Merge, chosen: Mapping[str, tuple[str, str]], leader: Catalog) -> Recipe:
    """Return the native recipe that does what a passthrough plan says.

    Args:
        merge: the plan.
        chosen: the model and the name there of each tensor of the result.
        leader: what the model holds that the result takes after.

    Raises:
        RecipeError: it takes one layer's tensors from two layers.
    """
    layers = LayerMap()
    made: dict[str, tuple[str, str]] = {}
    for name, (model, source) in chosen.items():
        layer, home = layers.layer(name), (model, layers.layer(source))
        if made.setdefault(layer, home) != home:
            raise RecipeError(
                f"{merge.plan.name} puts {layer} together from {made[layer][0]} and {model}, which leaves its "
                f"optimizer state in two places; take it whole from one."
            )
    rename: dict[str, tuple[str, ...]] = {}
    for layer, (_, origin) in made.items():
        if layer != origin:
            rename[origin] = (*rename.get(origin, ()), layer)
    there = dict.fromkeys(layers.layer(fqn) for fqn in leader.weights)
    return Recipe(
        base=merge.plan.leader,
        takes=tuple(Take(layer, model) for layer, (model, _) in made.items() if model != merge.plan.leader),
        rename=rename,
        drop=tuple(layer for layer in there if layer not in made),
        optimizer=merge.plan.optimizer or KEEP,
        name=merge.plan.name,
        text=merge.plan.text,
    )
