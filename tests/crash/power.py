"""Loss of power: what the disk may hold after a call, worked out from the log of everything that was changed.

What was not flushed may be there or not: each stretch of a file that was written, each name that was made, moved or
removed. A file's own flush covers what is in it, a folder's the names in it, and neither the other. That is what POSIX
promises, which is less than common file systems keep.
"""

from __future__ import annotations

import hashlib
import os
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

_HEAD = struct.Struct("<BQqqHH")


class Op(IntEnum):
    """What was done, as the shim writes it."""

    CREATE = 1
    WRITE = 2
    TRUNCATE = 3
    LINK = 4
    RENAME = 5
    UNLINK = 6
    MKDIR = 7
    RMDIR = 8
    SYMLINK = 9
    SYNC = 10
    TIMES = 11


class Done(NamedTuple):
    """A call that changed something, or made it stay.

    Attributes:
        op: what was done.
        inode: the file's or the folder's number; 0 of what it does not matter.
        offset: where a write began; the size after a truncation; a time in nanoseconds.
        path: the path; the old name, or what a symbolic link points to.
        other: the new name.
        data: what was written.
    """

    op: Op
    inode: int
    offset: int
    path: str
    other: str
    data: bytes


def read_log(path: Path) -> list[Done]:
    """Read what the shim has written."""
    raw, found, at = path.read_bytes() if path.exists() else b"", [], 0
    while at < len(raw):
        op, inode, offset, length, one, two = _HEAD.unpack_from(raw, at)
        at += _HEAD.size
        old, new = raw[at : at + one].decode(), raw[at + one : at + one + two].decode()
        at += one + two
        found.append(Done(Op(op), inode, offset, old, new, raw[at : at + length]))
        at += length
    return found


# A disk -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _File:
    """A file: what it held at first, and when that was written; None for now."""

    data: bytes = b""
    time: int | None = None


@dataclass(eq=False)
class _Folder:
    """A folder: what was in it at first, and what is in it if nothing is lost."""

    first: dict[str, _Node] = field(default_factory=dict)
    now: dict[str, _Node] = field(default_factory=dict)


@dataclass(frozen=True)
class _Symlink:
    target: str


_Node = _File | _Folder | _Symlink


class _Name(NamedTuple):
    """What a name in a folder leads to from now on; None for nothing."""

    folder: _Folder
    name: str
    node: _Node | None


@dataclass(eq=False)
class _Change:
    """A change that is there as a whole or not at all.

    Attributes:
        names: what it does to names; the last of them is in the folder whose flush makes it stay.
        file: the file that it changes.
        offset: where; or the file's new time.
        data: what is written there; None to cut the file off, or lengthen it.
        is_time: whether it only changes the file's time.
        stays: whether it was flushed.
    """

    names: tuple[_Name, ...] = ()
    file: _File | None = None
    offset: int = 0
    data: bytes | None = None
    is_time: bool = False
    stays: bool = False


class Disk:
    """A folder on a disk that remembers nothing but what was flushed.

    Args:
        root: the folder, as it is before anything is done.
        journal: whether any flush brings all names to the disk that were made before, as ext4 and XFS do.
    """

    def __init__(self, root: Path, journal: bool = False) -> None:
        self._journal = journal
        self._prefix = os.path.realpath(root)
        self._nodes: dict[int, _File | _Folder] = {}
        self._changes: list[_Change] = []
        self._root = self._scan(root)

    def _scan(self, folder: Path) -> _Folder:
        found = self._nodes[folder.stat().st_ino] = _Folder()
        for path in folder.iterdir():
            status = path.lstat()
            node: _Node
            if path.is_symlink():
                node = _Symlink(str(path.readlink()))
            elif path.is_dir():
                node = self._scan(path)
            else:
                node = self._nodes.setdefault(status.st_ino, _File(path.read_bytes(), status.st_mtime_ns))
            found.first[path.name] = node
        found.now = dict(found.first)
        return found

    def do(self, done: Done) -> None:
        """Take in the next call."""
        if done.op == Op.SYNC:
            self._flush(done.inode)
        elif done.op in (Op.WRITE, Op.TRUNCATE, Op.TIMES):
            file = self._nodes[done.inode]
            if isinstance(file, _File):  # the times of folders tell nothing
                data = done.data if done.op == Op.WRITE else None
                self._changes.append(_Change((), file, done.offset, data, done.op == Op.TIMES))
        else:
            self._rename(_NAMES[done.op](self, done))

    def _rename(self, names: tuple[_Name, ...]) -> None:
        for folder, name, node in names:
            if node is None:
                folder.now.pop(name, None)
            else:
                folder.now[name] = node
        self._changes.append(_Change(names))

    def _flush(self, inode: int) -> None:
        for change in self._changes:
            owner = change.names[-1].folder if change.names else change.file
            if not inode or owner is self._nodes.get(inode) or (self._journal and change.names):
                change.stays = True

    def _place(self, path: str) -> tuple[_Folder, str]:
        parts = path.removeprefix(self._prefix).strip("/").split("/")
        folder = self._root
        for part in parts[:-1]:
            folder = folder.now[part]  # type: ignore[assignment]
        return folder, parts[-1]

    def _new(self, done: Done) -> tuple[_Name, ...]:
        node: _File | _Folder = _File() if done.op == Op.CREATE else _Folder()
        self._nodes[done.inode] = node
        return (_Name(*self._place(done.path), node),)

    def _linked(self, done: Done) -> tuple[_Name, ...]:
        node = _Symlink(done.path) if done.op == Op.SYMLINK else self._nodes[done.inode]
        return (_Name(*self._place(done.other), node),)

    def _moved(self, done: Done) -> tuple[_Name, ...]:
        old, new = self._place(done.path), self._place(done.other)
        return _Name(*old, None), _Name(*new, old[0].now[old[1]])

    def _removed(self, done: Done) -> tuple[_Name, ...]:
        return (_Name(*self._place(done.path), None),)

    # What may be left -------------------------------------------------------------------------------------------

    @property
    def at_risk(self) -> int:
        """How many changes a loss of power could undo."""
        return sum(not change.stays for change in self._changes)

    def left(self, kept: Callable[[int, bool], bool]) -> Left:
        """Return what is left if of the changes at risk those stay that are chosen.

        Args:
            kept: tells of each by its number and by whether it is one of names.
        """
        number = 0
        folders: dict[_Folder, dict[str, _Node | None]] = {}
        files: dict[_File, _File] = {}
        for change in self._changes:
            if not change.stays:
                number += 1
                if not kept(number - 1, bool(change.names)):
                    continue
            for folder, name, node in change.names:
                folders.setdefault(folder, dict(folder.first))[name] = node
            if change.file is not None:
                _change(files.setdefault(change.file, _File(change.file.data, change.file.time)), change)
        return Left(self._root, folders, files)

    def samples(self, draw: random.Random, count: int) -> Iterator[Left]:
        """Yield what may be left: nothing of what is at risk, names alone, data alone, and by chance."""
        risk = self.at_risk
        yield self.left(lambda _, __: False)
        if risk:
            yield self.left(lambda _, is_name: is_name)
            yield self.left(lambda _, is_name: not is_name)
        for _ in range(count if risk > 1 else 0):
            if draw.random() < 0.5:
                end = draw.randrange(risk)
                yield self.left(lambda number, _, end=end: number < end)  # type: ignore[misc]
            else:
                chosen = {number for number in range(risk) if draw.random() < 0.5}
                yield self.left(lambda number, _, chosen=chosen: number in chosen)  # type: ignore[misc]


_NAMES: dict[Op, Callable[[Disk, Done], tuple[_Name, ...]]] = {
    Op.CREATE: Disk._new,
    Op.MKDIR: Disk._new,
    Op.LINK: Disk._linked,
    Op.SYMLINK: Disk._linked,
    Op.RENAME: Disk._moved,
    Op.UNLINK: Disk._removed,
    Op.RMDIR: Disk._removed,
}


def _change(file: _File, change: _Change) -> None:
    if change.is_time:
        file.time = change.offset
        return
    file.time, data = None, bytearray(file.data)
    end = change.offset + len(change.data or b"")
    if len(data) < end:
        data.extend(bytes(end - len(data)))
    if change.data is None:
        del data[change.offset :]
    else:
        data[change.offset : end] = change.data
    file.data = bytes(data)


class Left:
    """What is on a disk after a loss of power."""

    def __init__(
        self, root: _Folder, folders: dict[_Folder, dict[str, _Node | None]], files: dict[_File, _File]
    ) -> None:
        self._root, self._folders, self._files = root, folders, files

    def write(self, root: Path) -> None:
        """Make it, in a folder that is not there yet."""
        root.mkdir(parents=True)
        self._write(self._root, root, {})

    def _write(self, folder: _Folder, path: Path, made: dict[_File, Path]) -> None:
        for name, node in self._entries(folder):
            here = path / name
            if isinstance(node, _Symlink):
                here.symlink_to(node.target)
            elif isinstance(node, _Folder):
                here.mkdir()
                self._write(node, here, made)
            elif node in made:
                here.hardlink_to(made[node])
            else:
                made[node] = here
                held = self._files.get(node, node)
                here.write_bytes(held.data)
                if held.time is not None:
                    os.utime(here, ns=(held.time, held.time))
        # A folder is as old as what was put into it, not as this copy: prune tells by that whether a save has begun.
        times = [one.lstat().st_mtime_ns for one in path.iterdir()]
        if times:
            os.utime(path, ns=(max(times), max(times)))

    def _entries(self, folder: _Folder) -> list[tuple[str, _Node]]:
        found = self._folders.get(folder, folder.first)
        return [(name, node) for name, node in sorted(found.items()) if node is not None]

    def digest(self) -> str:
        """Return what is the same for disks that hold the same."""
        told = hashlib.sha256()
        self._tell(self._root, "", told.update)
        return told.hexdigest()

    def _tell(self, folder: _Folder, path: str, tell: Callable[[bytes], None]) -> None:
        for name, node in self._entries(folder):
            tell(f"{path}/{name}\n".encode())
            if isinstance(node, _Folder):
                self._tell(node, f"{path}/{name}", tell)
            else:
                tell(node.target.encode() if isinstance(node, _Symlink) else self._files.get(node, node).data)
