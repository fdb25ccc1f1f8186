"""Sources: the checkpoints that a merge reads, as recipes name them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tailor_dcp.base import open_base
from tailor_dcp.catalog import Catalog
from tailor_dcp.contents import Contents
from tailor_dcp.errors import NoCheckpointError
from tailor_dcp.formats import formats
from tailor_dcp.location import METADATA, is_url, locate
from tailor_dcp.merging.index import Index, index_of_catalog, index_of_contents
from tailor_dcp.metadata.compose import unstored
from tailor_dcp.names import listed
from tailor_dcp.open_checkpoint import Checkpoint
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.runs import latest
from tailor_dcp.store_path import place
from tailor_dcp.unpickling import allowed

_AT = re.compile(r"(?P<run>.+)@(?P<step>\d+|latest)")


@dataclass(frozen=True)
class Source:
    """A checkpoint that was opened; no tensor is read yet.

    Attributes:
        name: as the recipe calls it.
        path: its folder or file.
        index: what it holds.
        contents: the DCP checkpoint, None for other formats.
        catalog: what it holds in another format, None for DCP.
    """

    name: str
    path: Path
    index: Index
    contents: Contents | None = None
    catalog: Catalog | None = None


def path_of(name: str) -> Path:
    """Return the folder or file that a recipe means: a path, or ``run@300`` for a step of a run.

    Raises:
        RecipeError: there is none.
    """
    path = place(name)
    at = _AT.fullmatch(name)
    try:
        if path.exists() or at is None:
            return path
    except OSError as error:
        if is_url(path):
            raise RecipeError(f"{name} cannot be reached: {error.strerror}.") from error
        raise RecipeError(f"{name[:60]}… is no path ({error.strerror}); give a checkpoint's.") from error
    run = place(at["run"])
    if not run.is_dir():
        raise RecipeError(f"{name}: there is no run {run} in the current folder; give its path.")
    if at["step"] == "latest":
        newest = latest(run)
        if newest is None:
            raise RecipeError(f"{name}: {run} has no committed checkpoint.")
        return newest
    return _at_step(name, run, int(at["step"]))


def _at_step(name: str, run: Path, step: int) -> Path:
    steps = _steps(run)
    found = steps.get(step, [])
    if len(found) == 1:
        return found[0]
    if found:
        raise RecipeError(f"{name} may be {listed(list(map(str, found)))}; name one of them.")
    raise RecipeError(f"{name}: {run} has no checkpoint of step {step}; {_what(steps)}.")


def _steps(run: Path) -> dict[int, list[Path]]:
    """Return the checkpoints that a run's folder has by step; those that were cut off are none."""
    found: dict[int, list[Path]] = {}
    for child in sorted(run.iterdir()):
        here = locate(child)
        if here.step is None or here.series or not child.is_dir():
            continue
        if (child / METADATA).exists() or (not is_url(child) and formats().recognised(child) is not None):
            found.setdefault(here.step, []).append(child)
    return found


def _what(steps: Iterable[int]) -> str:
    known = sorted(steps)
    if not known:
        return "it has none"
    return f"it has {listed(list(map(str, known if len(known) < 8 else [*known[:3], '…', *known[-3:]])))}"


def open_source(name: str, allow: tuple[str, ...] = (), as_catalog: bool = False) -> Source:
    """Open a source: a DCP checkpoint's metadata, or the files' own tables of any other format.

    Args:
        name: as the recipe writes it.
        allow: classes, as ``module.Class``, that may be unpickled.
        as_catalog: open DCP checkpoints like the others, as readable tensors.

    Raises:
        RecipeError: there is no checkpoint.
        TailorError: it is damaged, or cannot be read.
    """
    path = path_of(name)
    if not path.exists():
        raise RecipeError(f"{name} does not exist in the current folder; give a checkpoint's path, or RUN@STEP.")
    if (path / METADATA).is_file() and not as_catalog:
        contents = Contents(open_base(path))
        missing = unstored(contents.base.metadata)
        if missing:
            raise RecipeError(f"{name} does not tell where {missing[0]} is stored; use another checkpoint.")
        checkpoint = Checkpoint(contents, allowed(allow))
        return Source(name, path, index_of_contents(name, contents, checkpoint.__getitem__), contents=contents)
    if is_url(path) and as_catalog:
        raise RecipeError(f"{name} is on an object store, where layers can only be picked; copy it here to convert it.")
    if is_url(path) or formats().recognised(path) is None:
        raise NoCheckpointError(_no_checkpoint(name, path))
    catalog = formats().open(path, allow=allow)
    return Source(name, path, index_of_catalog(name, catalog), catalog=catalog)


def _no_checkpoint(name: str, path: Path) -> str:
    steps = _steps(path) if path.is_dir() else {}
    if steps:
        return f"{name} is a run, not a checkpoint; say {name}@{max(steps)} ({_what(steps)})."
    return f"{name} is no checkpoint that can be read: neither DCP's nor of {listed(list(formats().sources))}."


class Opener:
    """Opens sources, each once.

    Args:
        allow: classes, as ``module.Class``, that may be unpickled.
        as_catalogs: open DCP checkpoints like the others, as readable tensors.
    """

    def __init__(self, allow: tuple[str, ...] = (), as_catalogs: bool = False) -> None:
        self._allow, self._as_catalogs = allow, as_catalogs
        self._opened: dict[str, Source] = {}

    def __call__(self, name: str) -> Source:
        """Open a source; see ``open_source``."""
        if name not in self._opened:
            self._opened[name] = open_source(name, self._allow, self._as_catalogs)
        return self._opened[name]

    def index(self, name: str) -> Index:
        """Return what a source holds."""
        return self(name).index

    def catalog(self, name: str) -> Catalog:
        """Return a source as readable tensors; only of an opener of catalogs."""
        catalog = self(name).catalog
        assert catalog is not None
        return catalog
