"""Assembling: a merged checkpoint on disk, of files of its sources and next to no bytes of its own."""

from __future__ import annotations

import errno
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta

from tailor_dcp.base import Base
from tailor_dcp.carry import CARRIED, explain, make_folder, sync_folder
from tailor_dcp.commit import commit
from tailor_dcp.companions import put_files
from tailor_dcp.crc import crc32
from tailor_dcp.errors import TailorError
from tailor_dcp.file_marks import mark_of
from tailor_dcp.lineage import new_save_id
from tailor_dcp.location import locate
from tailor_dcp.locks import Lock
from tailor_dcp.merging.remap import File, Remapped
from tailor_dcp.metadata.record import ATTRIBUTE
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.stores import StorePath, copy_object, is_remote, same_store, writing


def assemble(
    made: Remapped, folder: Path, out: Path, base: Base, step: int | None, files: Mapping[str, Path]
) -> dict[str, str]:
    """Write a composite: link its files, and write ``.metadata`` and the param groups' lists of names.

    Args:
        made: its metadata.
        folder: an empty folder to make it in, on the file system of ``out``; ``out`` itself in a store.
        out: the name that it will have.
        base: the recipe's base.
        step: the result's training step.
        files: companions: configuration, tokenizer.

    Returns:
        The name in the folder of each of ``made.files``.

    Raises:
        RecipeError: a file cannot be linked.
    """
    save_id = new_save_id()
    names = _refer(made.files, folder) if is_remote(folder) else _link(made.files, folder, out)
    made.place(names)
    _write_values(made, folder, save_id)
    put_files(files, folder)
    linked = {above for name in names.values() for above in (folder / name).parents if above.is_relative_to(folder)}
    for touched in () if is_remote(folder) else {folder, *linked}:
        sync_folder(touched)
    commit(metadata_of(made, out, save_id, step, base), folder)
    return names


def in_memory(made: Remapped, folder: Path, out: Path, base: Base, step: int | None) -> Base:
    """Return the result as a checkpoint that is nowhere, its files left where they are.

    Args:
        made: its metadata.
        folder: an empty folder for param groups' lists of names.
        out: the name that it will have.
        base: the recipe's base.
        step: the result's training step.
    """
    save_id = new_save_id()
    elsewhere = {name: file.path for name, file in made.files.items()}
    written = _write_values(made, folder, save_id)
    elsewhere |= {name: folder / name for name in written}
    metadata = metadata_of(made, out, save_id, step, base)
    return Base(locate(out), save_id, metadata, made.record(save_id, step, base), elsewhere)


def metadata_of(made: Remapped, out: Path, save_id: str, step: int | None, base: Base) -> Metadata:
    """Return the metadata as DCP pickles it."""
    metadata = Metadata(
        state_dict_metadata=made.entries,
        planner_data=made.paths,
        storage_data=made.storage,
        storage_meta=StorageMeta(checkpoint_id=str(out), save_id=save_id),
        version=base.metadata.version,
    )
    setattr(metadata, ATTRIBUTE, made.record(save_id, step, base).to_builtins())
    return metadata


def _refer(files: Mapping[str, File], out: StorePath) -> dict[str, str]:
    """Return what each file is called in a store: where it is, if that is in the result's run, or a copy's name."""
    names: dict[str, str] = {}
    taken: set[Path] = set()
    run = locate(out).run
    for name, file in files.items():
        # A run that lies within the result's run looks no higher before it removes what it saves again.
        if is_remote(file.path) and locate(file.path.parent).run == run:
            names[name] = file.path.absolute_key
            continue
        if not same_store(file.path, out):
            raise RecipeError(
                f"{file.path} is not in the store of {out}; ask for a copy of the bytes with --materialize."
            )
        homes = (out / CARRIED / home / file.path.name for home in _homes(file.save_id))
        new = next(home for home in homes if home not in taken)
        taken.add(new)
        copy_object(file.path, new)
        names[name] = new.relative_to(out).as_posix()
    return names


def _link(files: Mapping[str, File], folder: Path, out: Path) -> dict[str, str]:
    """Link each file into the folder; return their names there."""
    names: dict[str, str] = {}
    for name, file in files.items():
        for home in _homes(file.save_id):
            new = folder / CARRIED / home / file.path.name
            try:
                new.parent.mkdir(parents=True, exist_ok=True)
                os.link(file.path, new)
            except FileExistsError:
                # Two copies of a run hold files of one name, which are not one file.
                if not os.path.samestat(file.path.stat(), new.stat()):
                    continue
            except OSError as error:
                if error.errno in _FULL:
                    raise
                error.filename = str(file.path)
                raise RecipeError(
                    f"{out} cannot be made of links ({explain(error)}); ask for a copy of the bytes with --materialize."
                ) from error
            names[name] = new.relative_to(folder).as_posix()
            break
    return names


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""A copy would need more room still."""


def _homes(save_id: str) -> Iterator[str]:
    """Yield the names of folders for the files of one save: its own, and others if that has another file."""
    own = save_id if save_id and save_id.replace("-", "").isalnum() else new_save_id()
    yield own
    number = 1
    while True:
        yield f"{own}-{number}"
        number += 1


def _write_values(made: Remapped, folder: Path, save_id: str) -> list[str]:
    """Write the entries whose content changes to a file of their own; return its name, if there is one."""
    if not made.values:
        return []
    name, offset = f"__0_{save_id[:8]}_values.distcp", 0
    crcs: dict[int, int] = {}
    with _new_file(folder / name) as stream:
        for key, value in made.values.items():
            data = _saved(value)
            stream.write(data)
            made.storage[MetadataIndex(key)] = _StorageInfo(name, offset, len(data))
            crcs[offset] = crc32(data)
            offset += len(data)
    made.crcs[name] = crcs
    return [name]


@contextmanager
def _new_file(path: Path) -> Iterator[io.RawIOBase | io.BufferedWriter]:
    if is_remote(path):
        with writing(path) as upload:
            yield upload
        return
    with path.open("xb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@contextmanager
def growing(out: Path) -> Iterator[Path]:
    """Yield a new folder beside the result's name; nothing of it stays unless it was given that name.

    For a result in a store it is a folder on this machine; what is put in the store goes there under its own name, and
    is removed again if the merge fails.

    Raises:
        RecipeError: ``out`` exists, another merge is making it, or nothing can be written there.
    """
    if out.exists() or out.is_symlink():
        raise RecipeError(f"{out} exists already; name a new folder, or remove it first.")
    if is_remote(out):
        with _put(out), tempfile.TemporaryDirectory(prefix="tailor-merge-") as scratch:
            yield Path(scratch)
        return
    folder = out.with_name(f".{out.name}.merge")
    lock = Lock(
        out.with_name(f"{folder.name}.lock"),
        RecipeError(f"Another merge is making {out}; wait for it, or name another folder."),
    )
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        make_folder(out.parent)
        lock.take()
        shutil.rmtree(folder, ignore_errors=True)  # of a merge that was killed
        folder.mkdir()
        yield folder
    except OSError as error:
        if isinstance(error, TailorError):
            raise
        raise RecipeError(f"{out} cannot be written: {error.strerror or error}.") from error
    finally:
        if lock.taken:
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()
        for parent in made if not out.exists() else ():
            with suppress(OSError):  # another has put something there
                parent.rmdir()


@contextmanager
def _put(out: StorePath) -> Iterator[None]:
    """Let nothing stay in a store of a result that failed."""
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            for path in out.rglob("*"):
                path.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, TailorError):
            raise RecipeError(f"{out} cannot be written: {error.strerror or error}.") from error
        raise


def give_name(folder: Path, out: Path) -> None:
    """Give a complete folder its name, on the disk as well; in a store it has it already."""
    if is_remote(folder):
        return
    folder.rename(out)
    sync_folder(out.parent)


def check_files(files: Iterable[File]) -> None:
    """Check that every file is there, long enough and, where another program wrote it, the one that was linked.

    Raises:
        RecipeError: naming one that is not.
    """
    for file in files:
        try:
            size = file.path.stat().st_size
        except OSError as error:
            raise RecipeError(f"{file.path} is missing ({error.strerror}); use another checkpoint.") from error
        if size < file.size:
            raise RecipeError(f"{file.path} has {size} bytes where {file.size} are needed; use another checkpoint.")
        if file.mark and mark_of(file.path) != file.mark:
            raise RecipeError(
                f"{file.path} has changed since its checkpoint was linked to it; restore the file, or convert its "
                f"checkpoint anew."
            )
