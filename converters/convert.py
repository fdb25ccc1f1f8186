"""Converting: from whatever a checkpoint is in to whatever it should be in, all or nothing."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tailor_dcp.carry import make_folder, sync_file, sync_folder
from tailor_dcp.catalog import Catalog, in_dtype, only_layers, weights_only
from tailor_dcp.collector import collector_off
from tailor_dcp.errors import ConversionError, TailorError
from tailor_dcp.layers import LayerMap
from tailor_dcp.location import is_url
from tailor_dcp.locks import Lock
from tailor_dcp.memory import peak_memory
from tailor_dcp.tensors import close_files

from . import ranks
from .formats import Target, source_of, target_of
from .options import Options


@dataclass(frozen=True)
class Converted:
    """What was converted, or would be.

    Attributes:
        source: where from.
        source_format: the format that it was found to be in.
        target: where to.
        target_format: the format that was written.
        layers: how many layers.
        weights: how many parameters and buffers, tied ones counted once.
        states: how many optimizer states.
        read: bytes of tensors that are read.
        written: bytes of the files that were written; of tensors if this is a dry run.
        linked: bytes of tensors that were pointed to where the source has them.
        kinds: bytes of tensors in the result by kind (``weight``, ``exp_avg``, …).
        train: what there is under ``train.``.
        files: the names of files that are carried along.
        notes: what the user should know.
        seconds: how long it took.
        peak_memory: the largest amount of memory that one rank held, in bytes, pages of files included.
        dry_run: nothing was written.
    """

    source: str
    source_format: str
    target: str
    target_format: str
    layers: int
    weights: int
    states: int
    read: int
    written: int
    linked: int
    kinds: Mapping[str, int]
    train: tuple[str, ...]
    files: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float
    peak_memory: int
    dry_run: bool

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain builtins, for ``--json``."""
        return asdict(self)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    from_: str | None = None,
    options: Options | None = None,
    dry_run: bool = False,
    total: Callable[[int], None] | None = None,
) -> Converted:
    """Translate a checkpoint.

    Under torchrun all ranks call it and share the work. The result appears under its name when it is
    complete; the source is never modified, and nothing in it is run.

    Args:
        source: a folder or file in any format of ``formats.SOURCES``.
        target: what to write; it must not exist.
        to: a format of ``formats.TARGETS``.
        from_: the source's format; None to recognise it.
        options: see ``Options``.
        dry_run: only tell what would be read and written.
        total: is told, before anything is written, how many bytes of tensors this rank will report to
            ``options.progress``.

    Raises:
        ConversionError: the source is of no known format, cannot be converted as asked, or ``target`` exists.
        TailorError: whatever reading the source says.
    """
    options = options or Options()
    with collector_off() if options.link else nullcontext():
        return _converted(source, target, to, from_, options, dry_run, total)


def _converted(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    from_: str | None,
    options: Options,
    dry_run: bool,
    total: Callable[[int], None] | None,
) -> Converted:
    start = time.monotonic()
    writer = target_of(to, options.link)
    catalog, place, final = ranks.together(lambda: _opened(source, target, writer, from_, options, dry_run))
    notes: tuple[str, ...] = catalog.notes
    linked = writer.linked(catalog)
    if total is not None:
        total(catalog.bytes)
    if not dry_run:
        notes = (*notes, *_written(catalog, writer, place, final, options))
    return replace(
        _described(catalog, writer, final, dry_run, linked),
        notes=tuple(dict.fromkeys(notes)),
        seconds=time.monotonic() - start,
        peak_memory=max(ranks.gather(peak_memory())),
        written=max(0, catalog.bytes - linked) if dry_run else _size(final),
    )


def write_catalog(
    catalog: Catalog, target: str | os.PathLike[str], to: str, options: Options | None = None
) -> tuple[str, ...]:
    """Write a checkpoint of what a catalog holds, complete or not at all; all ranks call it.

    Args:
        catalog: what to write, in the names of the live model.
        target: what to write; it must not exist.
        to: a format of ``formats.TARGETS``.
        options: those of the target count; the others choose from a source and are left alone.

    Returns:
        Sentences that the user should read.

    Raises:
        ConversionError: it cannot be written as asked, or ``target`` exists.
        TailorError: whatever reading the sources says.
    """
    writer = target_of(to)
    place, final = ranks.together(lambda: _named(target, False))
    return _written(catalog, writer, place, final, options or Options())


def _written(catalog: Catalog, writer: Target, place: Path, final: Path, options: Options) -> tuple[str, ...]:
    with _complete_or_absent(place, final):
        return tuple(writer.write(catalog, place, final, options))


def _opened(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    writer: Target,
    from_: str | None,
    options: Options,
    dry_run: bool,
) -> tuple[Catalog, Path, Path]:
    """Return what is to be written, the name that it grows under and the one that it will have."""
    if is_url(source):
        raise ConversionError(
            f"{os.fspath(source)} is on an object store; bring it here with `tailor materialize` first."
        )
    place, final = _named(target, dry_run)
    found = source_of(Path(source), from_)
    opened = found.open(Path(source), options)
    writer.check(opened, options)
    catalog = _selected(opened, options, writer)
    _check(catalog, writer, final)
    return catalog, place, final


def _named(target: str | os.PathLike[str], dry_run: bool) -> tuple[Path, Path]:
    """Return the name that the result grows under and the one that it will have."""
    if is_url(target):
        raise ConversionError(f"{os.fspath(target)} is on an object store; only a local folder can be written.")
    final = Path(os.path.abspath(target))  # noqa: PTH100 - resolve() would follow a link that lies there
    if (final.exists() or final.is_symlink()) and not dry_run:
        raise ConversionError(f"{final} exists already; name a new one, or remove it first.")
    return final.with_name(f".{final.name}.convert"), final


def _selected(catalog: Catalog, options: Options, target: Target) -> Catalog:
    if options.weights_only:
        catalog = weights_only(catalog)
    if options.layers is not None:
        catalog = only_layers(catalog, options.layers)
    if options.dtype is not None and not target.masters:
        catalog = in_dtype(catalog, options.dtype)
    return catalog


def _check(catalog: Catalog, target: Target, final: Path) -> None:
    inside = Path(os.path.realpath(final)).is_relative_to(os.path.realpath(catalog.source))
    if inside and Path(catalog.source).is_dir():
        raise ConversionError(f"{final} lies inside of the source {catalog.source}, which is never modified.")
    if not catalog.weights and not catalog.state:
        raise ConversionError(
            f"{catalog.source} holds no parameters, so there is nothing to convert to {target.words}."
        )


@contextmanager
def _complete_or_absent(place: Path, final: Path) -> Iterator[None]:
    """Give the result its name once all ranks have written it; leave nothing of it if one fails."""
    first = ranks.rank() == 0
    busy = ConversionError(f"Another conversion is writing {final}; wait for it, or name another folder.")
    lock = Lock(place.with_name(f"{place.name}.lock"), busy)

    def prepare() -> None:
        if first:
            make_folder(place.parent)
            lock.take()
            _remove(place)  # of a conversion that was killed

    def commit() -> None:
        if first:
            _sync(place)
            place.rename(final)
            sync_folder(final.parent)

    try:
        ranks.together(prepare)
        yield
        ranks.together(commit)
    except BaseException as error:
        close_files()
        if lock.taken:
            _remove(place)
        if isinstance(error, OSError) and not isinstance(error, TailorError):
            raise ConversionError(f"{final} cannot be written: {error.strerror or error}.") from error
        raise
    finally:
        lock.release()
    close_files()


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def _sync(place: Path) -> None:
    """Bring to the disk what was written without being synced: small files and the folders' entries."""
    for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if _is_linked(path):
            continue
        if path.is_dir():
            sync_folder(path)
        else:
            sync_file(path)
    if place.is_dir():
        sync_folder(place)


def _described(catalog: Catalog, target: Target, final: Path, dry_run: bool, linked: int) -> Converted:
    layers = LayerMap()
    kinds = {"weight": sum(tensor.bytes for tensor in catalog.stored.values())}
    for held in catalog.state.values():
        for kind, tensor in held.items():
            kinds[kind] = kinds.get(kind, 0) + tensor.bytes
    return Converted(
        source=str(catalog.source),
        source_format=catalog.format,
        target=str(final),
        target_format=target.name,
        layers=len({layers.layer(fqn) for fqn in [*catalog.weights, *catalog.state]}),
        weights=len(catalog.stored),
        states=sum(map(len, catalog.state.values())),
        read=max(0, catalog.source_bytes - linked),
        written=0,
        linked=linked,
        kinds=kinds,
        train=tuple(map(str, catalog.train)),
        files=tuple(catalog.files),
        notes=(),
        seconds=0.0,
        peak_memory=0,
        dry_run=dry_run,
    )


def _size(final: Path) -> int:
    files = final.rglob("*") if final.is_dir() else [final]
    return sum(path.stat().st_size for path in files if path.is_file() and not _is_linked(path))


def _is_linked(path: Path) -> bool:
    """Tell whether a file of a result is the source's own, under another name."""
    return path.is_file() and path.stat().st_nlink > 1
