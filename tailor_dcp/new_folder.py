"""New folders: a checkpoint that is being written, on a disk or in a store. It is there as a whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from io import RawIOBase
from pathlib import Path
from typing import Protocol

from torch.distributed.checkpoint.metadata import Metadata

from tailor_dcp.carry import make_folder, sync_folder
from tailor_dcp.commit import commit
from tailor_dcp.companions import FOLDER, put_files
from tailor_dcp.errors import TailorError
from tailor_dcp.location import METADATA
from tailor_dcp.locks import Lock
from tailor_dcp.ranges import share_blocks, write_all
from tailor_dcp.stores import StorePath, copy_object, is_remote, is_url, place, same_store, writing

_MARKER = ".materialize"
_FLOW = 8 << 20
_OWN = re.compile(rf"__\d+_[0-9a-f]{{8}}_\d+\.distcp|{re.escape(_MARKER)}|{FOLDER}/.*")


class MaterializeError(TailorError, ValueError):
    """The copy cannot be made as it is asked for."""


class Sink(Protocol):
    """A file that is written from front to end."""

    descriptor: int | None
    """What the kernel knows it by; None for an object."""

    def write(self, data: bytes | memoryview) -> None:
        """Append all of ``data``."""

    def flow(self) -> None:
        """Let what was appended go on its way to where it stays; called every few megabytes."""


class NewFolder(ABC):
    """A folder that is being made. The first rank begins, commits and discards it; all write files into it.

    Args:
        target: its path when it is complete.
        save_id: of what is written into it.
    """

    def __init__(self, target: Path, save_id: str) -> None:
        self.target, self.save_id = target, save_id

    @abstractmethod
    def begin(self) -> None:
        """Make room: what a call that was killed has left is removed.

        Raises:
            MaterializeError: something is there that is no such thing.
            OSError: nothing can be written there.
        """

    @abstractmethod
    def shares(self, sources: Sequence[Path]) -> bool:
        """Tell whether whole files can be copied without moving their bytes."""

    @abstractmethod
    def share(self, source: Path, name: str) -> bool:
        """Copy a whole file so; False if that is not possible."""

    @abstractmethod
    def create(self, name: str) -> AbstractContextManager[Sink]:
        """Make a file. When it is left it is on the disk, or in the store."""

    @abstractmethod
    def commit(self, metadata: Metadata, companions: Mapping[str, Path]) -> None:
        """Add the files that the checkpoint carries along, and make it appear."""

    @abstractmethod
    def discard(self) -> None:
        """Remove what was written."""

    @abstractmethod
    def end(self) -> None:
        """Let others make a folder of that name."""


def new_folder(out: str | os.PathLike[str]) -> Path:
    """Return the path of a folder that shall be made.

    Raises:
        MaterializeError: it exists.
    """
    if is_url(out):
        target = place(out)
        if (target / METADATA).exists():
            raise _exists(target)
        return target
    target = Path(os.path.abspath(place(out)))  # noqa: PTH100 - resolve() would follow a link that lies there
    if target.exists() or target.is_symlink():
        raise _exists(target)
    return target


def opened(target: Path, save_id: str) -> NewFolder:
    """Return the folder that grows to be ``target``."""
    return _InStore(target, save_id) if is_remote(target) else _OnDisk(target, save_id)


def _exists(target: Path) -> MaterializeError:
    return MaterializeError(f"{target} exists already; name a folder that does not.")


class _File:
    """A local file."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor: int | None = descriptor
        self._flowing = 0

    def write(self, data: bytes | memoryview) -> None:
        assert self.descriptor is not None
        write_all(self.descriptor, data)

    def flow(self) -> None:
        """Have the kernel begin to write, so that the disk works while the rest is copied, not only at the end."""
        assert self.descriptor is not None
        end = os.lseek(self.descriptor, 0, os.SEEK_CUR)
        if end - self._flowing >= _FLOW:
            # It says that the pages are not needed, and drops those that are on the disk already: none of these.
            os.posix_fadvise(self.descriptor, self._flowing, end - self._flowing, os.POSIX_FADV_DONTNEED)
            self._flowing = end


class _OnDisk(NewFolder):
    """It grows under another name beside its own."""

    def __init__(self, target: Path, save_id: str) -> None:
        super().__init__(target, save_id)
        self._partial = target.with_name(f".{target.name}.materialize")
        busy = MaterializeError(f"Another call is making {target}; wait for it, or name another folder.")
        self._lock = Lock(target.with_name(f"{self._partial.name}.lock"), busy)

    def begin(self) -> None:
        make_folder(self.target.parent)
        self._lock.take()
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir()

    def shares(self, sources: Sequence[Path]) -> bool:
        """Try it with one: what a file system can cannot be told from its name."""
        local = [source for source in sources if not is_remote(source)]
        try:
            return bool(local) and self.share(local[0], _MARKER)
        finally:
            (self._partial / _MARKER).unlink(missing_ok=True)

    def share(self, source: Path, name: str) -> bool:
        if is_remote(source):
            return False
        path = self._partial / name
        with source.open("rb") as old, path.open("xb") as new:
            shared = share_blocks(old.fileno(), new.fileno())
            if shared:
                os.fsync(new.fileno())
        if not shared:
            path.unlink()
        return shared

    @contextmanager
    def create(self, name: str) -> Iterator[Sink]:
        descriptor = os.open(self._partial / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            yield _File(descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def commit(self, metadata: Metadata, companions: Mapping[str, Path]) -> None:
        put_files(companions, self._partial)
        commit(metadata, self._partial)
        self._partial.rename(self.target)
        sync_folder(self.target.parent)

    def discard(self) -> None:
        if self._lock.taken:
            shutil.rmtree(self._partial, ignore_errors=True)

    def end(self) -> None:
        self._lock.release()


class _Upload:
    """An object that is being written."""

    descriptor: int | None = None

    def __init__(self, raw: RawIOBase) -> None:
        self._raw = raw

    def write(self, data: bytes | memoryview) -> None:
        self._raw.write(data)

    def flow(self) -> None:
        """Nothing waits but what is no part of its own yet."""


class _InStore(NewFolder):
    """Its objects have their names at once; only the ``.metadata``, which is put last, makes them a checkpoint.

    A marker beside them tells whose they are as long as they are none: what a killed call has left is known by it,
    and a call that another has thrown out does not commit.
    """

    target: StorePath

    def begin(self) -> None:
        found = {path.relative_to(self.target).as_posix(): path for path in self.target.rglob("*")}
        if found and (_MARKER not in found or METADATA in found or not all(map(_OWN.fullmatch, found))):
            raise _exists(self.target)
        for path in found.values():
            path.unlink(missing_ok=True)
        (self.target / _MARKER).write_bytes(self.save_id.encode())

    def shares(self, sources: Sequence[Path]) -> bool:
        return any(same_store(source, self.target) for source in sources)

    def share(self, source: Path, name: str) -> bool:
        if not same_store(source, self.target):
            return False
        copy_object(source, self.target / name)
        return True

    @contextmanager
    def create(self, name: str) -> Iterator[Sink]:
        with writing(self.target / name) as raw:
            yield _Upload(raw)

    def commit(self, metadata: Metadata, companions: Mapping[str, Path]) -> None:
        put_files(companions, self.target)
        if not self._is_ours():
            raise MaterializeError(f"Another call is making {self.target}; wait for it, or name another folder.")
        commit(metadata, self.target)
        with suppress(OSError):
            (self.target / _MARKER).unlink(missing_ok=True)

    def discard(self) -> None:
        ours = self._is_ours()
        with suppress(OSError):
            for path in list(self.target.rglob("*")):
                name = path.relative_to(self.target).as_posix()
                if self.save_id[:8] in name or (ours and _OWN.fullmatch(name)):
                    path.unlink(missing_ok=True)

    def end(self) -> None:
        """Nobody was kept out."""

    def _is_ours(self) -> bool:
        try:
            return (self.target / _MARKER).read_bytes() == self.save_id.encode()
        except OSError:
            return False
