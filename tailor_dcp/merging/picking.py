"""Picking: doing what a native recipe says, by metadata alone where that is possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tailor_dcp.base import open_base
from tailor_dcp.catalog import Catalog
from tailor_dcp.companions import files_of
from tailor_dcp.contents import Contents
from tailor_dcp.formats import formats
from tailor_dcp.materialize import materialize_base
from tailor_dcp.merging.assemble import assemble, check_files, give_name, growing, in_memory
from tailor_dcp.merging.catalogs import catalog_of, needed_of
from tailor_dcp.merging.remap import Remapped, remap
from tailor_dcp.merging.resolve import Resolved, resolve, sources_of
from tailor_dcp.merging.sources import Source, open_source
from tailor_dcp.open_checkpoint import Checkpoint
from tailor_dcp.recipes.native import Recipe

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
    """

    recipe: Recipe
    sources: Mapping[str, Source]
    resolved: Resolved
    out: Path
    progress: Progress

    @property
    def base(self) -> Source:
        """The recipe's base."""
        return self.sources[self.recipe.base]

    @property
    def companions(self) -> Mapping[str, Path]:
        """The files that the base carries along."""
        base = self.base
        return base.catalog.files if base.catalog else files_of(base.path)

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
) -> Outcome:
    """Do what a recipe says.

    Raises:
        RecipeError: it cannot be done; nothing was written.
        TailorError: a source is damaged or unreadable.
    """
    sources = {name: open_source(name, allow, as_catalog=to != "dcp") for name in sources_of(recipe)}
    resolved = resolve(recipe, {name: source.index for name, source in sources.items()})
    job = Job(recipe, sources, resolved, out, progress)
    shared: frozenset[Path] = frozenset()
    notes: tuple[str, ...] = ()
    if to == "dcp":
        shared = _composite(job, materialize)
    else:
        notes = _written(job, to, world_size)
    notes = tuple(dict.fromkeys([*resolved.notes, *notes]))
    return Outcome(to, len(resolved.layers), tuple(sources), job.live, notes, shared)


def _composite(job: Job, materialize: bool) -> frozenset[Path]:
    """Write a DCP checkpoint; return its files that are links."""
    with growing(job.out) as scratch:
        contents = _contents(job, scratch / "sources")
        made = remap(job.resolved, contents, lambda source, key: Checkpoint(source)[key])
        check_files(made.files.values())
        folder = scratch / job.out.name
        folder.mkdir()
        base = contents[job.recipe.base].base
        if materialize:
            whole = in_memory(made, folder, job.out, base, job.resolved.step)
            materialize_base(whole, job.out, job.companions, progress=job.progress)
            return frozenset()
        assemble(made, folder, job.out, base, job.resolved.step, job.companions)
        give_name(folder, job.out)
    return frozenset(job.out / info.relative_path for info in _linked(made))


def _linked(made: Remapped) -> list[Any]:
    return [info for info in made.storage.values() if "/" in info.relative_path]


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
        formats().write(needed, place, "dcp", progress=_counted(needed, job.progress))
        found[name] = Contents(open_base(place))
    return found


def _written(job: Job, to: str, world_size: int | None) -> tuple[str, ...]:
    """Write another format; return what the user should know."""
    catalogs = {name: _catalog(source) for name, source in job.sources.items()}
    merged = replace(catalog_of(job.resolved, catalogs, job.recipe.base), files=job.companions)
    notes = formats().write(merged, job.out, to, world_size=world_size, progress=_counted(merged, job.progress))
    return (*merged.notes, *notes)


def _catalog(source: Source) -> Catalog:
    assert source.catalog is not None
    return source.catalog


def _counted(catalog: Catalog, progress: Progress) -> Callable[[int], None]:
    total, done = catalog.bytes, 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return advance
