"""The index of a Hugging Face folder, and the other tables that folders have as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator

from tailor_dcp.converters.hf_files import read_json as converters_table
from tailor_dcp.converters.hf_files import weight_files
from tailor_dcp.errors import TailorError
from tailor_dcp.merging.model_files import read_json as merging_table
from tailor_dcp.merging.value_adapters import _read as adapter_table
from tests.fuzz.mutators.trees import jsons
from tests.fuzz.scratch import folder, put
from tests.fuzz.target import Target

_FILE = "model-00001-of-00001.safetensors"


def parse(data: bytes) -> None:
    """Read it as an index whose one file is there, and by each reader of tables."""
    path = put(data, "model.safetensors.index.json")
    if not (folder() / _FILE).exists():
        put(b"", _FILE)
    for read in (merging_table, adapter_table):
        try:
            assert isinstance(read(path), dict)
        except TailorError as error:
            assert str(error)
    table = converters_table(path)
    assert repr(table) == repr(json.loads(data)), "another table"
    held = weight_files(path)
    assert all(file.parent == folder() for file in held.files), "a file outside of the folder"


def seeds() -> Iterator[bytes]:
    """An index, and what tries to lead out."""
    yield json.dumps({"metadata": {"total_size": 8}, "weight_map": {"w": _FILE, "b": _FILE}}).encode()
    for name in ("../x", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b"):
        yield json.dumps({"weight_map": {"w": name}}).encode()
    yield b"[" * 2000


_WORDS = ("weight_map", "metadata", "total_size", _FILE, "..", "../x", "/etc/passwd", "a\0b", "w")
TARGET = Target(parse, seeds, jsons(_WORDS), tuple(word.encode() for word in _WORDS))
