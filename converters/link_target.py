"""Writing a linked checkpoint: a ``.metadata`` that points into the files of the source, which get another name in it.

No tensor is read, and of those that lie in the source's files as they are in memory none is written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from tailor_dcp.carry import CARRIED, explain
from tailor_dcp.catalog import Catalog
from tailor_dcp.errors import ConversionError
from tailor_dcp.file_marks import mark_of
from tailor_dcp.lineage import new_save_id
from tailor_dcp.metadata.record import ATTRIBUTE
from tailor_dcp.planner import LayerwisePlanner
from tailor_dcp.raw_stretch import raw

from . import ranks
from .dcp_state import Planned, state_dict
from .dcp_target import StreamingWriter, put_beside, save
from .links import Links, links_of
from .options import Options

_SOURCES = ("zero", "hf", "torch")


def check(catalog: Catalog, options: Options) -> None:
    """Refuse what cannot be had without copying.

    Raises:
        ConversionError: telling what to leave out.
    """
    if catalog.format not in _SOURCES:
        how = (
            "`tailor copy` and `tailor merge` share its bytes" if catalog.format == "dcp" else "it is many small files"
        )
        raise ConversionError(f"{catalog.source} cannot be linked to ({how}); leave --link out to copy its bytes.")
    if options.dtype is not None:
        raise ConversionError("--dtype would change the bytes that --link points to; leave one of them out.")
    if options.keys != "tailor":
        raise ConversionError(
            f"--keys {options.keys} is for a trainer that loads with DCP's own reader, which cannot read a linked "
            f"checkpoint; leave --keys or --link out."
        )


def linked(catalog: Catalog) -> int:
    """Return the bytes of the tensors that can be pointed to."""
    chunks = links_of(catalog).chunks
    return sum(place.length for places in chunks.values() for place in places.values())


def write(catalog: Catalog, place: Path, final: Path, options: Options) -> Sequence[str]:
    """Write a checkpoint that ``LayerwiseReader`` reads, and everything else in this package; all ranks call it.

    Args:
        catalog: what to write. What does not lie in its files as it is in memory is written as DCP has it.
        place: the folder to make.
        final: the name that it will have.
        options: whom to tell of progress.

    Raises:
        ConversionError: the files cannot be linked, or nothing lies in them as it is in memory.
        DamagedSourceError: a source cannot be read.
    """
    check(catalog, options)
    links = links_of(catalog)
    if not links.chunks:
        raise ConversionError(
            f"No tensor of {catalog.source} lies in its files as it is in memory, so there is nothing to link to; "
            f"leave --link out."
        )
    names = _names(links, ranks.gather(new_save_id())[0])
    ranks.together(lambda: _link(names, place, final) if ranks.rank() == 0 else None)
    save(state_dict(catalog, links.cut), _LinkingWriter(place, final, options, links, names))
    ranks.together(lambda: put_beside(catalog, place, options) if ranks.rank() == 0 else None)
    return (_how_to_load(final), *_written(catalog, links))


def _how_to_load(final: Path) -> str:
    return (
        f"It is linked: load it with storage_reader=tailor_dcp.LayerwiseReader({final.name!r}), or make a plain copy "
        f"with `tailor materialize`. Its source may be removed, but not be written to."
    )


def _written(catalog: Catalog, links: Links) -> tuple[str, ...]:
    """Say what was copied after all."""
    if not links.others:
        return ()
    size = sum(catalog.tensors[key].bytes for key in links.others)
    more = f" and {len(links.others) - 3} more" if len(links.others) > 3 else ""
    return (
        f"{', '.join(links.others[:3])}{more} ({size / 1e6:.1f} MB) do not lie in the source's files as they are in "
        f"memory and were written.",
    )


# Files ----------------------------------------------------------------------------------------------------


def _names(links: Links, home: str) -> dict[Path, str]:
    """Return what each file is called in the checkpoint; all ranks find the same."""
    names: dict[Path, str] = {}
    for path in links.files:
        number, name = 0, f"{CARRIED}/{home}/{path.name}"
        while name in names.values():
            number += 1
            name = f"{CARRIED}/{home}-{number}/{path.name}"
        names[path] = name
    return names


def _link(names: dict[Path, str], place: Path, final: Path) -> None:
    for path, name in names.items():
        new = place / name
        new.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(os.path.realpath(path), new)  # of a symbolic link, link(2) would make another one
        except OSError as error:
            error.filename = str(path)
            raise ConversionError(
                f"{final} cannot be linked to its source ({explain(error)}); leave --link out to copy the bytes."
            ) from error


# The save ---------------------------------------------------------------------------------------------------


class _LinkingWriter(StreamingWriter):
    """Notes where chunks lie that the source has, and writes the others."""

    def __init__(self, place: Path, final: Path, options: Options, links: Links, names: dict[Path, str]) -> None:
        super().__init__(place, final, options.progress)
        self._links = links
        self._names = names

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Do this rank's share."""
        state = cast(LayerwisePlanner, planner).state_dict
        linked: list[WriteResult] = []
        others: list[WriteItem] = []
        for item in plan.items:
            found = self._linked(item, state[item.index.fqn]) if item.tensor_data is not None else None
            others += [item] if found is None else []
            linked += [] if found is None else [found]
        self.progress(sum(result.size_in_bytes for result in linked))
        written = super().write_data(replace(plan, items=others), planner).value()
        future: Future[list[WriteResult]] = Future()
        future.set_result([*linked, *written])
        return future

    def _linked(self, item: WriteItem, value: Any) -> WriteResult | None:
        chunks = self._links.chunks.get(id(value.tensor)) if isinstance(value, Planned) else None
        if chunks is None or item.index.offset is None:
            return None
        place = chunks[tuple(item.index.offset)]
        return WriteResult(item.index, place.length, raw(self._names[place.path], place.offset, place.length))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit, with what tells later that the files are still the ones that they are."""
        marks = {name: list(mark_of(path)) for path, name in self._names.items()}
        getattr(metadata, ATTRIBUTE)["marks"] = marks
        super().finish(metadata, results)
