"""What the parsers are compared with: the standard library's and torch's own readers, kept from running anything."""

from __future__ import annotations

import io
import pickle
from pathlib import PurePath, PurePosixPath
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from tailor_dcp.metadata.pickle_names import NAMES, Asked


class _Unpickler(pickle.Unpickler):
    """Python's own machine, with the classes that DCP's pickles may name and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NAMES:
            raise AssertionError(f"accepted although it asks for {module}.{name}")
        known = NAMES[module, name]
        if isinstance(known, Asked) and known.name == "builtins.getattr":
            return _member
        if module.startswith("pathlib"):
            return _path
        return super().find_class(module, name)


def _path(*parts: Any) -> PurePath | None:
    """Return a path; None of what is no path's part, which both readers refuse where anybody looks at it."""
    return PurePosixPath(*parts) if all(isinstance(part, str) for part in parts) else None


def _member(owner: Any, name: str) -> Any:
    if getattr(owner, "__name__", "") not in ("_MEM_FORMAT_ENCODING", "MEM_FORMAT_ENCODING"):
        raise AssertionError(f"accepted although it asks for getattr({owner!r}, {name!r})")
    return owner[name]


def unpickled(data: bytes) -> Metadata:
    """Return what pickle makes of a ``.metadata`` that was found harmless."""
    made: Metadata = _Unpickler(io.BytesIO(data)).load()
    return made


def check_same(ours: Metadata, stock: Metadata) -> None:
    """Compare what DCP and we look at; a path may be text, and attributes unknown to both are dropped."""
    assert list(ours.state_dict_metadata) == list(stock.state_dict_metadata), "entries differ"
    for key, value in ours.state_dict_metadata.items():
        assert _fields(value) == _fields(stock.state_dict_metadata[key]), f"{key!r} differs"
    assert _fields(ours.storage_data) == _fields(stock.storage_data), "places differ"
    for name in ("planner_data", "tailor", "version"):
        assert _fields(getattr(ours, name, None)) == _fields(getattr(stock, name, None)), f"{name} differs"
    assert _fields(ours.storage_meta) == _fields(getattr(stock, "storage_meta", None)), "storage_meta differs"


def _fields(value: Any) -> Any:
    """Return a value so that comparing it compares types, floats bit by bit, and instances by what they hold."""
    if isinstance(value, dict):
        return [(_fields(key), _fields(held)) for key, held in value.items()]
    if type(value) in (list, tuple):
        return type(value), [_fields(held) for held in value]
    if isinstance(value, PurePath):
        return str, str(value)
    if isinstance(value, float):
        return float, value.hex()
    if isinstance(value, str | int | bytes | bool) or value is None or not hasattr(value, "__dict__"):
        return type(value), str(value)
    held = {
        name: inner for name, inner in vars(value).items() if not (name == "transform_descriptors" and inner is None)
    }
    return type(value).__name__, sorted((name, _fields(inner)) for name, inner in held.items())
