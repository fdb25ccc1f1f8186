"""The record in a ``.metadata``: what is accepted can be used and written again."""

from __future__ import annotations

from collections.abc import Iterator

from tailor_dcp.layers import LayerMap
from tailor_dcp.metadata.record import Origin, Record, UnitRecord, from_builtins, record_of, save_id_of
from tailor_dcp.metadata.safe_pickle import loads
from tailor_dcp.units import Unit
from tests.fuzz.mutators.pickles import pickles
from tests.fuzz.mutators.pickles import text as pickle_text
from tests.fuzz.mutators.values import TEXTS
from tests.fuzz.target import Target
from tests.metadata import hostile

_FIELDS = (
    "format", "save_id", "step", "index", "time", "policy", "carry", "parent", "origins", "units", "narrowed", "ties",
    "crcs", "fingerprints", "sketches", "seconds", "marks", "link", "reference", "copy",
)  # fmt: skip


def parse(data: bytes) -> None:
    """Read a pickled record as an honest file has it; do with it what everything does that reads one."""
    metadata = loads(hostile.with_tailor(data), "input")
    save_id_of(metadata)
    record = record_of(metadata, "input")
    if record is None:
        return
    for unit in record.units:
        LayerMap.position(unit.layer)
    for sums in record.crcs.values():
        assert len(dict(sums)) <= len(sums)
    again = from_builtins(record.to_builtins(), "input")
    assert again.units == record.units, "a record is another one after it was written"
    assert again.parent == record.parent, "a record has another parent after it was written"


def _code(value: object) -> bytes:
    if isinstance(value, dict):
        return hostile.mapped(*((_code(key), _code(held)) for key, held in value.items()))
    if isinstance(value, list):
        return hostile.listed(*map(_code, value))
    if isinstance(value, bytes):
        return b"C" + bytes([len(value)]) + value
    if isinstance(value, float):
        import struct

        return b"G" + struct.pack(">d", value)
    if value is None:
        return hostile.NONE
    return hostile.number(value) if isinstance(value, int) else pickle_text(str(value))


def seeds() -> Iterator[bytes]:
    """Records of both formats."""
    origin = Origin("0" * 32, 100, "step-100", 0)
    record = Record(
        save_id="1" * 32, step=200, index=1, time=1.5, policy="parity:groups=2", carry="link", parent=origin,
        units={Unit("layers.0", "weight"): UnitRecord(origin, ("model.layers.0.weight",))},
        narrowed={"model.layers.0.weight": "float32"}, ties=(("a", "b"),), crcs={"__0_0.distcp": {0: 7, 64: 9}},
        fingerprints={"a": 17}, sketches={"a": b"abcd"}, marks={"f": (3, 4)},  # type: ignore[dict-item]
    )  # fmt: skip
    yield _code(record.to_builtins())
    yield _code({**record.to_builtins(), "format": 1, "crcs": {"f": {0: 1}}})
    yield _code({**record.to_builtins(), "parent": None, "units": {}, "origins": []})


WORDS = tuple(map(pickle_text, (*_FIELDS, *TEXTS)))
TARGET = Target(parse, seeds, pickles(WORDS), WORDS)
