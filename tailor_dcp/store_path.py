"""Store paths: objects of a store, and the folders that their keys make, used as ``pathlib`` paths are.

What a library's paths would cost in requests, and what they make of ``..`` and of absolute keys, differs from store to
store and from version to version; both decide here what a save costs and what a checkpoint may reach.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat as modes
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, cast

from tailor_dcp.errors import TailorError

_LOCAL = re.compile(r"(?:file|local)://")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+._:-]*://")  # a chain of stores has colons
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_CHANGED = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
"""What stores call the time at which an object was put."""


class StoreUnavailableError(TailorError):
    """A URL is of no store that can be reached from here."""


def is_url(checkpoint_id: str | os.PathLike[str]) -> bool:
    """Tell an object store's address from a local path; ``file://`` and ``local://`` are local."""
    text = os.fspath(checkpoint_id)
    return _URL.match(text) is not None and _LOCAL.match(text) is None


def place(where: str | os.PathLike[str]) -> Path:
    """Return a path: a plain ``pathlib.Path`` for what is local, a ``StorePath`` for a URL of any of fsspec's stores.

    Nothing is asked of the store. How it is reached, credentials included, is fsspec's own configuration
    (``fsspec.config``, ``FSSPEC_…`` variables, or what the store's own tools use).

    Raises:
        StoreUnavailableError: the package for that store is not installed, or there is no such store.
    """
    if isinstance(where, Path | StorePath):
        return where
    text = os.fspath(where)
    if not is_url(text):
        return Path(_LOCAL.sub("", text, count=1) if _LOCAL.match(text) else text)
    fs, address = _opened(text)
    key = address.strip("/")
    protocol = text.partition("://")[0]
    stem = text.rstrip("/")
    # sftp://host/path: what is before the key names the server. s3://bucket/key has no server.
    server = stem[: len(stem) - len(key)].rstrip("/") if stem.endswith(key) else f"{protocol}:"
    prefix = f"{protocol}://" if server == f"{protocol}:" else f"{server}/" if server else ""  # http: all is the key
    return StorePath(fs, prefix, "/" if address.startswith("/") else "", key)


def _opened(url: str) -> tuple[Any, str]:
    protocol = url.partition("://")[0]
    if "::" in url:
        raise StoreUnavailableError(f"{url} is a chain of stores; give the address of the store itself.")
    try:
        from fsspec.core import url_to_fs  # noqa: PLC0415 - an extra

        # What another rank has just written must be seen: no listing is ever remembered.
        return cast(tuple[Any, str], url_to_fs(url, use_listings_cache=False))
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        way = f'pip install "tailor-dcp[{extra}]"' if extra else f"install it ({error})"
        raise StoreUnavailableError(f"{url} needs a package that is not installed: {way}.") from error
    except Exception as error:
        raise StoreUnavailableError(f"{url} cannot be reached: {reason(error)}.") from error


def reason(error: BaseException) -> str:
    """Return in half a sentence why a store could not do something."""
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror).rstrip(".")
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


@contextmanager
def told(path: Path) -> Generator[None, None, None]:
    """Let whatever a store's library raises be an ``OSError`` that names the object, as for local files.

    Raises:
        FileNotFoundError: there is no such object.
        PermissionError: it may not be reached.
        OSError: anything else; ``strerror`` says what.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    except PermissionError as error:
        raise PermissionError(errno.EACCES, reason(error), str(path)) from error
    except Exception as error:
        raise OSError(errno.EIO, reason(error), str(path)) from error


if TYPE_CHECKING:
    # To the type checker a store path is a path: every function that takes the one takes the other. It has those of
    # pathlib's methods that a checkpoint's files and folders are asked for, with the same meaning; others are missing.
    _Base = Path
else:
    _Base = object


class StorePath(_Base):
    """An object of a store, or a folder: all objects whose keys begin with its own.

    ``path / "/bucket/other"`` is an absolute key in the same store, as DCP's own fsspec reader has it. Objects appear
    under their names when they are complete, so no rename is ever needed, nor is there one.

    Args:
        fs: fsspec's file system.
        prefix: of its URLs: ``s3://``, ``sftp://host/``.
        root: what ``fs`` wants before keys: ``/`` or nothing.
        key: bucket and key, without a slash at either end.
    """

    def __init__(self, fs: Any, prefix: str, root: str, key: str) -> None:
        self.fs = fs
        self.key = key
        self._prefix, self._root = prefix, root

    # What it is called ----------------------------------------------------------------------

    @property
    def address(self) -> str:
        """What ``fs`` calls it."""
        return self._root + self.key

    @property
    def absolute_key(self) -> str:
        """What a ``.metadata`` calls it, and DCP's own fsspec reader finds it by: ``/bucket/run/step-100/…``."""
        return f"/{self.key}"

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """What the name ends with, from its last dot on."""
        return PurePosixPath(self.name).suffix

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the key, the store's prefix first."""
        return (self._prefix, *(self.key.split("/") if self.key else ()))

    @property
    def parent(self) -> StorePath:
        """The folder that it is in; a store's top is its own."""
        return self._at(self.key.rpartition("/")[0])

    @property
    def is_bucket(self) -> bool:
        """Whether nothing is above it but the list of all buckets, most of them other people's."""
        return not self._root and "/" not in self.key

    @property
    def parents(self) -> Sequence[StorePath]:
        """All folders that it is in, the nearest first."""
        parts = self.key.split("/")
        return tuple(self._at("/".join(parts[:count])) for count in range(len(parts) - 1, -1, -1))

    def __truediv__(self, other: str | os.PathLike[str]) -> StorePath:
        text = other.as_posix() if isinstance(other, PurePath) else os.fspath(other)
        if text.startswith("/"):
            return self._at(text.strip("/"))
        return self._at(f"{self.key}/{text.rstrip('/')}".strip("/")) if text else self

    def with_name(self, name: str) -> StorePath:
        """Return what is called so beside it."""
        return self.parent / name

    def relative_to(self, *other: Any) -> Any:
        """Return the path from a folder above to here, without the store.

        Raises:
            ValueError: it is not below that folder.
        """
        (above,) = other
        if not self.is_relative_to(above):
            raise ValueError(f"{self} does not lie in {above}")
        return PurePosixPath(self.key[len(above.key) :].strip("/"))

    def is_relative_to(self, *other: Any) -> bool:
        """Tell whether it is a folder or lies in it."""
        (above,) = other
        if not isinstance(above, StorePath) or not self._same_store(above):
            return False
        return self.key == above.key or not above.key or self.key.startswith(f"{above.key}/")

    def resolve(self, strict: bool = False) -> StorePath:
        """Return it without ``.`` and ``..``. Stores take these for names; a run that was local refers by them."""
        if "/." not in f"/{self.key}":
            return self
        parts: list[str] = []
        for part in self.key.split("/"):
            if part == "..":
                del parts[-1:]
            elif part != ".":
                parts.append(part)
        return self._at("/".join(parts))

    def as_posix(self) -> str:
        """Return the URL."""
        return str(self)

    def __str__(self) -> str:
        return self._prefix + self.key

    def __fspath__(self) -> str:
        """Return the URL, which DCP's own fsspec reader and writer take."""
        return str(self)

    def __repr__(self) -> str:
        return f"StorePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and self._same_store(other) and self.key == other.key

    def __lt__(self, other: Any) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash((self._prefix, self.key))

    def __reduce__(self) -> tuple[Any, ...]:
        return place, (str(self),)

    def _at(self, key: str) -> StorePath:
        return StorePath(self.fs, self._prefix, self._root, key)

    def _same_store(self, other: StorePath) -> bool:
        return self._prefix == other._prefix

    # What the store tells about it ----------------------------------------------------------

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Return size, kind, time, and as the inode what changes whenever the object is put anew. One HEAD.

        Raises:
            FileNotFoundError: there is no such object or folder. Costs a LIST besides.
            OSError: the store cannot be asked.
        """
        with told(self):
            info = self.fs.info(self.address)
        kind = modes.S_IFDIR if info["type"] == "directory" else modes.S_IFREG
        changed = _seconds(next((info[name] for name in _CHANGED if info.get(name)), 0.0))
        mark = info.get("ETag") or info.get("etag") or info.get("generation") or changed
        inode = int(hashlib.sha256(str(mark).encode()).hexdigest()[:15], 16)
        fields = (kind | 0o644, inode, 0, 1, 0, 0, info["size"] or 0, 0, int(changed), 0)
        return os.stat_result(fields, {"st_mtime": changed, "st_mtime_ns": int(changed * 1e9)})

    lstat = stat

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Tell whether there is such an object or folder.

        Raises:
            OSError: the store cannot be asked.
        """
        return self._mode() != 0

    def is_file(self) -> bool:
        """Tell whether there is such an object."""
        return modes.S_ISREG(self._mode())

    def is_dir(self) -> bool:
        """Tell whether there are objects in such a folder."""
        return modes.S_ISDIR(self._mode())

    def is_symlink(self) -> bool:
        """Say no: stores have none."""
        return False

    def _mode(self) -> int:
        try:
            return self.stat().st_mode
        except FileNotFoundError:
            return 0

    def iterdir(self) -> Generator[Any, None, None]:
        """Yield what is in the folder. One LIST for each thousand.

        Raises:
            FileNotFoundError: there is no such folder.
            OSError: the store cannot be asked.
        """
        with told(self):
            names = self.fs.ls(self.address, detail=False)
        for name in sorted(names):
            key = name.strip("/")
            if key != self.key:  # a folder's own marker, which some tools put
                yield self._at(key)

    def glob(self, pattern: str, **_: Any) -> Generator[Any, None, None]:
        """Yield what a pattern of single levels means. Each ``*`` lists a folder, each plain name asks for it."""
        first, _slash, rest = pattern.strip("/").partition("/")
        if any(sign in first for sign in "*?["):
            found: Iterator[StorePath] = (path for path in self._listed() if fnmatchcase(path.name, first))
        else:
            found = iter((self / first,))
        for path in found:
            if rest:
                yield from path.glob(rest)
            elif any(sign in first for sign in "*?[") or path.exists():
                yield path

    def rglob(self, pattern: str, **_: Any) -> Generator[Any, None, None]:
        """Yield all objects in the folder and below whose names match. One LIST for each thousand."""
        with told(self):
            names = self.fs.find(self.address)
        yield from (path for path in (self._at(name.strip("/")) for name in names) if fnmatchcase(path.name, pattern))

    def _listed(self) -> list[StorePath]:
        try:
            return list(self.iterdir())
        except FileNotFoundError:
            return []

    # What is in it --------------------------------------------------------------------------

    def read_bytes(self) -> bytes:
        """Return an object's bytes. One GET.

        Raises:
            FileNotFoundError: there is no such object.
            OSError: it cannot be read.
        """
        with told(self):
            return bytes(self.fs.cat_file(self.address))

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """Return an object's text; see ``read_bytes``."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: Any) -> int:
        """Put an object, complete or not at all. One PUT; several, and one that completes them, for more than 100 MB.

        Raises:
            OSError: it cannot be written.
        """
        with told(self):
            self.fs.pipe_file(self.address, bytes(data))
        return len(data)

    def open(self, mode: str = "rb", *_: Any, **__: Any) -> IO[Any]:  # type: ignore[override]
        """Open an object for reading anywhere in it; ``stores.writing`` is for writing.

        Raises:
            FileNotFoundError: there is no such object.
            OSError: it cannot be read.
        """
        if mode != "rb":
            raise ValueError(f"{self} can only be opened for reading, not with {mode!r}")
        with told(self):
            return cast(IO[Any], self.fs.open(self.address, "rb"))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove an object.

        Raises:
            FileNotFoundError: it is not there, where a store tells.
            OSError: it cannot be removed.
        """
        try:
            with told(self):
                self.fs.rm_file(self.address)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder is there as soon as something is in it."""

    def rmdir(self) -> None:
        """Do nothing: a folder is gone as soon as nothing is in it."""


def _seconds(when: object) -> float:
    """Return seconds since the epoch, however a store writes a time."""
    if isinstance(when, str):
        try:
            when = datetime.fromisoformat(when)
        except ValueError:
            return 0.0
    if isinstance(when, datetime):
        return when.timestamp()
    return float(when) if isinstance(when, int | float) else 0.0
