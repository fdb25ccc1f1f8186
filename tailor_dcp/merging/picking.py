"""Picking: doing what a native recipe says, by metadata alone where that is possible."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tailor_dcp.base import open_base
from tailor_dcp.catalog import Catalog
from tailor_dcp.collector import collector_off
from tailor_dcp.companions import files_of
from tailor_dcp.contents import Contents
from tailor_dcp.formats import formats
from tailor_dcp.location import is_within
from tailor_dcp.materialize import materialize_base
from tailor_dcp.merging import checks, tying
from tailor_dcp.merging.assemble import assemble, check_files, give_name, growing, in_memory
from tailor_dcp.merging.catalogs import catalog_of, needed_of
from tailor_dcp.merging.index import index_of_catalog
from tailor_dcp.merging.model_files import files_of_merge
from tailor_dcp.merging.placing import numbers_of
from tailor_dcp.merging.remap import remap
from tailor_dcp.merging.resolve import Resolved, Slot, of_weights, recipe_train, resolve, sources_of
from tailor_dcp.merging.sources import Opener, Source
from tailor_dcp.merging.value_adapters import check_alike
from tailor_dcp.merging.whole_groups import whole_groups
from tailor_dcp.open_checkpoint import Checkpoint
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.native import Recipe
from tailor_dcp.stores import is_remote
from tailor_dcp.tensors import Readable, same
from tailor_dcp.units import WEIGHT

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What came of a merge.

    Attributes:
        format: the format that was written.
        layers: how many layers the result has.
        sources: the names of its sources.
        live: bytes of tensors that it holds.
        notes: what the user should know.
        shared: the result's files that are also its sources'.
    """

    format: str
    layers: int
    sources: tuple[str, ...]
    live: int
    notes: tuple[str, ...]
    shared: frozenset[Path] = frozenset()


@dataclass(frozen=True)
class Job:
    """A merge that was checked and can be done.

    Attributes:
        recipe: what to do.
        sources: the opened sources by name.
        resolved: where everything comes from.
        out: the result's name.
        progress: is told how many of how many bytes are done.
        files: what ``files_of_merge`` is told besides: another model's tokenizer, a chat template, that what the
            base ties is tied no longer.
    """

    recipe: Recipe
    sources: Mapping[str, Source]
    resolved: Resolved
    out: Path
    progress: Progress
    files: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> Source:
        """The recipe's base."""
        return self.sources[self.recipe.base]

    def companions(self, to: str, scratch: Path) -> Mapping[str, Path]:
        """Return the files that the result carries along: the base's, and what has to be written anew for it.

        Args:
            to: the result's format. A Hugging Face folder gets a model card.
            scratch: a folder for new files.
        """
        base = self.base
        files = _carried(base)
        layers = numbers_of(self.resolved.layers, base.index.layers)
        if not files or (to != "hf" and not layers and not self.files):
            return files
        models = tuple(self.sources)
        return files_of_merge(files, scratch, layers=layers, text=self.recipe.text, models=models, **self.files)

    @property
    def live(self) -> int:
        """The bytes of the result's tensors."""
        return sum(slot.held.shape.bytes for slot in self.resolved.slots.values())


def pick(
    recipe: Recipe,
    out: Path,
    to: str,
    materialize: bool,
    world_size: int | None,
    allow: tuple[str, ...],
    progress: Progress,
    files: Mapping[str, Any] | None = None,
) -> Outcome:
    """Do what a recipe says.

    Raises:
        RecipeError: it cannot be done; nothing was written.
        TailorError: a source is damaged or unreadable.
    """
    if to == "hf":
        recipe = of_weights(recipe)
    opened = Opener(allow, as_catalogs=to != "dcp")
    with collector_off():  # from one large metadata to the next, and while they are looked through
        sources = {name: opened(name) for name in sources_of(recipe)}
        check_outside(out, sources.values())
        sources = _with_whole_groups(recipe, sources)
        resolved = resolve(recipe, {name: source.index for name, source in sources.items()})
    if to != "dcp":
        checks.named(recipe, sources[recipe.base].index)
    check_alike(recipe.name, {name: _carried(source) for name, source in sources.items()})
    resolved = _with_equal_tied(resolved, sources)
    if resolved.loose and to != "hf":
        raise tying.two_tensors(sources[recipe.base].index, *resolved.loose[0])
    told = {**(files or {}), **({"untied": True} if resolved.loose else {})}
    job = Job(recipe, sources, resolved, out, progress, told)
    shared: frozenset[Path] = frozenset()
    notes: tuple[str, ...] = ()
    if to == "dcp":
        shared = _composite(job, materialize)
    else:
        notes = _written(job, to, world_size)
    notes = tuple(dict.fromkeys([*resolved.notes, *notes]))
    return Outcome(to, len(resolved.layers), tuple(sources), job.live, notes, shared)


def _with_whole_groups(recipe: Recipe, sources: dict[str, Source]) -> dict[str, Source]:
    """Give the source of the training's progress all param groups, where it was saved with some layers only."""
    name, base = recipe_train(recipe), sources[recipe.base]
    train = sources[name] if name else base
    if train.catalog is None or not train.catalog.groups or base.index.fqns <= train.index.fqns:
        return sources
    groups = whole_groups(train.catalog, base.catalog or formats().open(base.path))
    catalog = replace(train.catalog, groups=groups)
    return {**sources, train.name: replace(train, catalog=catalog, index=index_of_catalog(train.name, catalog))}


def _with_equal_tied(resolved: Resolved, sources: Mapping[str, Source]) -> Resolved:
    """Tie what the base ties and what is the same in a source that knows of no ties: stock saves tell of none."""
    equal = [pair for pair in resolved.loose if same(*(_readable(slot, sources) for slot in pair))]
    rest = tuple(pair for pair in resolved.loose if pair not in equal)
    return replace(resolved, ties=tying.joined(resolved.ties, equal), loose=rest) if equal else resolved


def _readable(slot: Slot, sources: Mapping[str, Source]) -> Readable:
    source, held = sources[slot.source], slot.held
    catalog = source.catalog or formats().open(source.path)
    return catalog.weights[held.fqn] if held.kind == WEIGHT else catalog.state[held.fqn][held.kind]


def _carried(source: Source) -> Mapping[str, Path]:
    """Return the files that a source carries along."""
    return source.catalog.files if source.catalog else files_of(source.path)


def check_outside(out: Path, sources: Iterable[Source]) -> None:
    """Refuse to write into a source.

    Raises:
        RecipeError: ``out`` lies inside of one.
    """
    for source in sources:
        if source.path.is_dir() and is_within(out, source.path):
            raise RecipeError(f"{out} lies inside of the source {source.name}, which is never changed; name another.")


def _composite(job: Job, materialize: bool) -> frozenset[Path]:
    """Write a DCP checkpoint; return its files that it shares with its sources."""
    with growing(job.out) as scratch:
        contents = _contents(job, scratch / "sources")
        with collector_off():
            made = remap(job.resolved, contents, lambda source, key: Checkpoint(source)[key])
        check_files(made.files.values())
        folder = job.out if is_remote(job.out) and not materialize else scratch / job.out.name
        folder.mkdir()
        base, files = contents[job.recipe.base].base, job.companions("dcp", scratch / "files")
        if materialize:
            whole = in_memory(made, folder, job.out, base, job.resolved.step)
            materialize_base(whole, job.out, files, progress=job.progress)
            return frozenset()
        names = assemble(made, folder, job.out, base, job.resolved.step, files)
        give_name(folder, job.out)
        # What was converted for this merge is its own, though it was linked into its place.
        shared = {names[name] for name, file in made.files.items() if not is_within(file.path, scratch)}
    return frozenset(job.out / name for name in shared)


def _contents(job: Job, scratch: Path) -> dict[str, Contents]:
    """Return all sources as DCP checkpoints: what is needed of others is written into a folder beside the result."""
    found: dict[str, Contents] = {}
    for number, (name, source) in enumerate(job.sources.items()):
        if source.contents is not None:
            found[name] = source.contents
            continue
        assert source.catalog is not None
        needed = needed_of(job.resolved, name, source.catalog)
        place = scratch / str(number) / f"step-{source.index.step or 0}"
        place.parent.mkdir(parents=True)
        formats().write(needed, place, "dcp", progress=counted(needed, job.progress))
        found[name] = Contents(open_base(place))
    return found


def _written(job: Job, to: str, world_size: int | None) -> tuple[str, ...]:
    """Write another format; return what the user should know."""
    catalogs = {name: _catalog(source) for name, source in job.sources.items()}
    with growing(job.out) as scratch:
        merged = replace(catalog_of(job.resolved, catalogs, job.recipe.base), files=job.companions(to, scratch))
        notes = formats().write(merged, job.out, to, world_size=world_size, progress=counted(merged, job.progress))
    return (*merged.notes, *notes)


def _catalog(source: Source) -> Catalog:
    assert source.catalog is not None
    return source.catalog


def counted(catalog: Catalog, progress: Progress) -> Callable[[int], None]:
    """Return what is told of bytes that were done, and tells how many of the catalog's those are."""
    total, done = catalog.bytes, 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return advance
