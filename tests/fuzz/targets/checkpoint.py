"""A whole checkpoint with any ``.metadata``: looked into and verified, whatever it says of its one data file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from tailor_dcp.inspection import inspect
from tailor_dcp.verify import verify
from tests.fuzz.mutators.pickles import pickles
from tests.fuzz.mutators.pickles import text as pickle_text
from tests.fuzz.scratch import folder, put
from tests.fuzz.target import Target
from tests.fuzz.targets.blob_head import blob
from tests.fuzz.targets.metadata import PIECES
from tests.fuzz.targets.record import WORDS
from tests.metadata import hostile

_DATA = "__0_0.distcp"
_BLOB = blob(torch.zeros(4, 3))


def parse(data: bytes) -> None:
    """Put it beside the data file; ask what both commands ask. No file appears, and both answers can be shown."""
    path = put(data, "run/step-1/.metadata").parent
    if not (path / _DATA).exists():
        put(_BLOB, f"run/step-1/{_DATA}")
    assert json.dumps(verify(path, threads=1).to_dict())
    assert json.dumps(inspect(path).to_dict())
    assert {file.name for file in path.iterdir()} == {".metadata", _DATA}, "a file that was not there before"
    assert not any(Path(folder().parent, name).exists() for name in ("x", "passwd"))


def seeds() -> Iterator[bytes]:
    """Honest files, with and without a record, and files that tell of what is not there."""
    length = hostile.number(len(_BLOB))
    honest = hostile.mapped((hostile.index(), hostile.info(length=length)))
    yield hostile.metadata(storage_data=honest)
    record = hostile.mapped(
        (hostile.text("format"), hostile.number(2)), (hostile.text("save_id"), hostile.text("1" * 32)),
        (hostile.text("step"), hostile.number(1)), (hostile.text("index"), hostile.number(0)),
        (hostile.text("time"), b"G" + bytes(8)), (hostile.text("policy"), hostile.text("full")),
        (hostile.text("carry"), hostile.text("link")), (hostile.text("parent"), hostile.NONE),
        (hostile.text("origins"), hostile.listed(hostile.listed(
            hostile.text("1" * 32), hostile.number(1), hostile.text("step-1"), hostile.number(0)))),
        (hostile.text("units"), hostile.mapped((hostile.text("w"), hostile.mapped((hostile.text("weight"),
        hostile.listed( hostile.number(0), hostile.listed(hostile.text("w")))))))),
        (hostile.text("crcs"), hostile.mapped((hostile.text(_DATA), b"C\x0c" + bytes(12)))),
    )  # fmt: skip
    yield hostile.metadata(storage_data=honest, tailor=record)
    for path in ("../step-0/__0_0.distcp", "/etc/passwd", "../../../x", ".", "", "a/../" + _DATA):
        yield hostile.with_place(value=hostile.info(relative_path=hostile.text(path), length=length))
    yield hostile.with_place(value=hostile.info(offset=hostile.number((1 << 63) - 1)))
    yield hostile.with_tensor(hostile.tensor(dims=hostile.size(1 << 62, 4), chunks=hostile.listed()))


_PIECES = (*PIECES, *WORDS, *map(pickle_text, (_DATA, "../step-0/x", "/etc/passwd", "w", "weight")))
TARGET = Target(parse, seeds, pickles(_PIECES), _PIECES, longest=2304)
