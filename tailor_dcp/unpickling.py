"""Unpickling what ``torch.save`` wrote: tensors, plain values, classes that the user names. Nothing else is run.

It is torch's ``weights_only`` unpickler that reads. What it admits beside its own is one table for the whole process;
here it is another one for the thread that reads, and for that call alone.
"""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import pickle
import pkgutil
import re
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import _weights_only_unpickler

from tailor_dcp import numpy_values
from tailor_dcp.errors import TailorError
from tailor_dcp.metadata.pickle_names import shown
from tailor_dcp.python_containers import Containers
from tailor_dcp.settling import settled

Admitted = tuple[Callable[..., Any], str]
"""What to build, and the full name that a pickle asks for it by."""

_PLAIN = (
    datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone,
    argparse.Namespace, types.SimpleNamespace, frozenset, range, slice,
)  # fmt: skip
# A path of the other kind of system cannot be used here, but it can be looked at.
_PATHS = {
    "PosixPath": pathlib.Path if os.name == "posix" else pathlib.PurePosixPath,
    "WindowsPath": pathlib.PureWindowsPath if os.name == "posix" else pathlib.Path,
    "PurePosixPath": pathlib.PurePosixPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
}


def _no_bytes(*content: Any) -> bytes:
    """Return what protocol 2 has for empty bytes; given a number, the real class would take all memory."""
    if content:
        raise pickle.UnpicklingError("bytes are made unusually")
    return b""


_ADMITTED: tuple[Admitted, ...] = (
    (_no_bytes, "builtins.bytes"),
    *((kind, f"{kind.__module__}.{kind.__qualname__}") for kind in _PLAIN),
    *((kind, f"{module}.{name}") for module in ("pathlib", "pathlib._local") for name, kind in _PATHS.items()),
    *numpy_values.NAMES,
)
"""What training states hold and what can do nothing but be a value."""
_ASKED = re.compile(r"GLOBAL (.+?) (?:was not an allowed global|whose module)", re.DOTALL)
_WHY = re.compile(r"WeightsUnpickler error:\s*(\S.*)")
_RUNNING = frozenset(
    {
        "__builtin__", "_io", "_posixsubprocess", "bdb", "builtins", "code", "codeop", "commands", "ctypes",
        "functools", "importlib", "io", "marshal", "multiprocessing", "nt", "operator", "os", "pdb", "pickle", "pip",
        "pkgutil", "platform", "posix", "posixpath", "profile", "pty", "pydoc", "runpy", "shutil", "socket",
        "subprocess", "sys", "threading", "timeit", "trace", "urllib", "webbrowser",
    }
)  # fmt: skip
"""Modules that attacks ask for and training states never do: nobody is advised to trust a name of theirs."""
_CONTAINERS = (Mapping, list, tuple, set, frozenset, deque)
_LONGEST = 2000
_DEEPEST = 150
_EXPANDED = 1 << 20
"""Bytes up to which a tensor's elements may share memory, as those of an expanded one do."""
_lock = threading.RLock()


class NotAllowedError(TailorError, ValueError):
    """What shall be admitted is no class that can be imported."""


def allowed(names: Iterable[str | type]) -> tuple[Admitted, ...]:
    """Return the classes that the user trusts.

    Args:
        names: classes, or their full names as ``module.Class``; the modules of names are imported.

    Raises:
        NotAllowedError: there is no class of such a name.
    """
    return tuple(_class(name) for name in ([names] if isinstance(names, str | type) else names))


def _class(named: str | type) -> Admitted:
    if isinstance(named, type):
        return named, f"{named.__module__}.{named.__qualname__}"
    name = str(named)
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: no name of any form
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise NotAllowedError(
            f"--allow {shown(name)}: there is no such class to import ({why}); give it as module.Class."
        ) from error
    if not isinstance(found, type):
        raise NotAllowedError(
            f"--allow {shown(name)}: that is a {type(found).__name__} and no class, and a file could call it with "
            f"anything; only classes can be admitted."
        )
    return found, name


def load(stored: Any, admitted: Iterable[Admitted] = (), **how: Any) -> Any:
    """Return what ``torch.load`` makes of a file or of a stream, running nothing.

    Args:
        stored: as ``torch.load`` takes it.
        admitted: classes beside those that training states hold; see ``allowed``.
        how: further arguments of ``torch.load``.

    Raises:
        pickle.UnpicklingError: it asks for something else; see ``asked_for``.
        Exception: whatever damaged bytes lead ``torch.load`` to.
    """
    containers = Containers()
    with _lock, _admitting((*admitted, *_ADMITTED, *containers.names)):
        loaded = torch.load(stored, weights_only=True, **how)
    loaded = settled(loaded, lambda value: containers.become(numpy_values.real(value)))
    _check_depth(loaded)
    for tensor in tensors_of(loaded):
        _check(tensor)
    return loaded


def _check_depth(tree: Any) -> None:
    """Refuse what holds itself, or nests so deeply that whoever goes through it runs out of stack.

    Raises:
        pickle.UnpicklingError: it does.
    """
    stack: list[tuple[Any, int]] = [(tree, 0)]
    seen: dict[int, int] = {}
    while stack:
        value, depth = stack.pop()
        if not isinstance(value, _CONTAINERS) or seen.get(id(value), -1) >= depth:
            continue
        if depth > _DEEPEST:
            raise pickle.UnpicklingError(f"it holds itself, or is nested more than {_DEEPEST} deep")
        seen[id(value)] = depth
        stack += [(held, depth + 1) for held in (value.values() if isinstance(value, Mapping) else value)]


class _ShortError(pickle.UnpicklingError):
    """What torch's unpickler raises, without the million characters that a name from a file may have."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message[:_LONGEST])


@contextmanager
def _admitting(ours: Iterable[Admitted]) -> Iterator[None]:
    """Let torch's unpickler find these names as well, in this thread alone.

    It also raises short errors then: torch looks for words in them, in quadratic time.
    """
    table: Callable[[], dict[str, Any]] = _weights_only_unpickler._get_user_allowed_globals
    error = _weights_only_unpickler.UnpicklingError
    own, reading = {**table(), **{name: made for made, name in ours}}, threading.get_ident()
    _weights_only_unpickler._get_user_allowed_globals = lambda: own if threading.get_ident() == reading else table()
    _weights_only_unpickler.UnpicklingError = _ShortError  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        _weights_only_unpickler._get_user_allowed_globals = table
        _weights_only_unpickler.UnpicklingError = error  # type: ignore[misc]


def tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of nested containers."""
    stack, seen = [tree], set()
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, _CONTAINERS) and id(value) not in seen:
            seen.add(id(value))  # a pickle can make a list that contains itself
            stack.extend(value.values() if isinstance(value, Mapping) else value)


def _check(tensor: torch.Tensor) -> None:
    """Refuse what whoever copies it would need more memory for than the file has bytes.

    Raises:
        pickle.UnpicklingError: it is such a tensor.
    """
    if tensor.is_meta:
        raise pickle.UnpicklingError("a tensor has no values")
    if tensor.layout is torch.strided and not tensor.is_nested:
        size = tensor.numel() * tensor.itemsize
        if size > max(_EXPANDED, tensor.untyped_storage().nbytes()):
            raise pickle.UnpicklingError(f"a tensor of {size} bytes is stored in fewer")


def asked_for(error: BaseException) -> str | None:
    """Return the full name that a pickle asked for in vain; None if the error is none of that kind."""
    found = _ASKED.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if found is None:
        return None
    return found[1] if "." in found[1] else f"builtins.{found[1]}"  # torch leaves these out


def reason(error: BaseException) -> str:
    """Return the one line of an error that says what is wrong, without torch's advice to unpickle everything."""
    text = str(error) or type(error).__name__
    found = _WHY.search(text)
    return (found[1] if found else text.splitlines()[0]).rstrip(".")


def refusal(name: str) -> str:
    """Return how a sentence goes on that has said where the name was found: what it is, and the way out."""
    if name.partition(".")[0] in _RUNNING:
        return f"asks for {shown(name)}, which no training state needs; it was not run. Do not load this file"
    if not all(part.isidentifier() for part in name.split(".")):
        return "asks for an object by what is no class's name, so it was not loaded; use another copy"
    return (
        f"holds an object of {shown(name)}, which could run code and was not loaded; if you trust whoever wrote it, "
        f'admit it with --allow {shown(name)}, in Python with allow=["{shown(name)}"]'
    )
