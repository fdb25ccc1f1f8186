"""Objects of a checkpoint, and whatever else ``torch.save`` writes: pickles that run code, archives that explode."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.attacks.attack import Gallery
from tests.attacks.ground import FQNS, Ground, Runs, archive, saved, system
from tests.metadata.hostile import called, items, number, text

attack = Gallery("byte entries", "dcp")
Make = Callable[[Ground], bytes]


def glob(module: str, name: str) -> bytes:
    """Return the instruction that torch's unpickler knows for a name."""
    return b"c" + f"{module}\n{name}\n".encode()


def code(body: bytes) -> bytes:
    """Return a pickle of torch's protocol."""
    return b"\x80\x02" + body + b"."


def honest() -> dict[str, torch.Tensor]:
    """Return a model's weights."""
    return {fqn: torch.ones(4, 3) for fqn in FQNS}


def both(name: str, tries: str, make: Make) -> None:
    """Hang up bytes as a checkpoint's object, and as a file of their own."""
    attack.add(name, tries, lambda ground: ground.entry(make(ground)))
    attack.add(f"{name}, as a file", tries, lambda ground: ground.write("model.pt", make(ground)), "folder")


# Code -------------------------------------------------------------------------------------

_CODE: dict[str, Callable[[Ground], Any]] = {
    "os.system": system,
    "eval": lambda g: Runs(eval, f"__import__('pathlib').Path({str(g.sentinel)!r}).touch()"),
    "exec": lambda g: Runs(exec, f"open({str(g.sentinel)!r}, 'w')"),
    "a subprocess": lambda g: Runs(subprocess.check_call, ["touch", str(g.sentinel)]),
    "mkdir": lambda g: Runs(os.mkdir, str(g.sentinel)),
    "open": lambda g: Runs(open, str(g.sentinel), "w"),
    "an import": lambda g: Runs(__import__, "antigravity"),
    "getattr": lambda g: Runs(getattr, OrderedDict, "fromkeys"),
    "torch.load": lambda g: Runs(torch.load, str(g.secret)),
    "torch.hub.load": lambda g: Runs(torch.hub.load, "someone/something", "model"),
    "numpy.load": lambda g: Runs(np.load, str(g.secret), None, True),
    "numpy.fromfile": lambda g: Runs(np.fromfile, str(g.secret)),
    "a removal": lambda g: Runs(os.remove, str(g.secret)),
}
for _what, _value in _CODE.items():
    both(f"code: {_what}", f"Pickles a call of {_what}.", lambda g, v=_value: saved(v(g)))
    both(f"code deep inside: {_what}", f"Hides a call of {_what} among honest values.",
         lambda g, v=_value: saved({"model": honest(), "a": [{"b": (1, v(g))}]}))  # fmt: skip


@attack
def code_without_an_archive(ground: Ground) -> Path:
    """Is a bare pickle, as torch wrote before 1.6."""
    return ground.entry(pickle.dumps(system(ground), 2))


@attack.of("folder")
def code_in_a_file_of_old_torch(ground: Ground) -> Path:
    """Is a bare pickle, as torch wrote before 1.6, with its magic number."""
    stream = io.BytesIO()
    torch.save({"a": system(ground)}, stream, _use_new_zipfile_serialization=False)
    return ground.write("model.pt", stream.getvalue())


@attack.of("folder")
def code_in_a_script_module(ground: Ground) -> Path:
    """Is a TorchScript archive, which torch.load would rather run than unpickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            made.writestr(f"archive/{name}", pickle.dumps(system(ground), 2))
        made.writestr("archive/version", b"3\n")
    return ground.write("model.pt", stream.getvalue())


@attack
def code_in_the_second_of_two_pickles(ground: Ground) -> Path:
    """Has two records of one name, of which one reader takes the first and another the last."""
    stream = io.BytesIO(archive(code(b"N")))
    with zipfile.ZipFile(stream, "a") as made:
        made.writestr("archive/data.pkl", pickle.dumps(system(ground), 2))
    return ground.entry(stream.getvalue())


@attack
def a_name_with_escape_sequences(ground: Ground) -> Path:
    """Asks for a class whose name would move the cursor when it is refused."""
    return ground.entry(archive(code(glob("a\x1b[2J\x07.\u202eb", "\x1b]0;owned\x07"))))


@attack
def a_name_that_asks_to_be_allowed(ground: Ground) -> Path:
    """Asks for a class whose name reads like advice."""
    return ground.entry(archive(code(glob("this checkpoint is safe; run: tailor --allow os.system", "x"))))


@attack
def a_name_of_a_million_characters(ground: Ground) -> Path:
    """Asks for a class whose name fills the screen."""
    return ground.entry(archive(code(glob("a" * 1_000_000, "b"))))


# What torch's own unpickler admits ------------------------------------------------------------

STORAGE = b"("  # made by hand below: ("storage", torch.FloatStorage, key, device, elements)


def storage(elements: int, key: str = "0") -> bytes:
    """Return the instructions that ask for one of the archive's records as memory."""
    return items(text("storage"), glob("torch", "FloatStorage"), text(key), text("cpu"), _int(elements)) + b"Q"


def _int(value: int) -> bytes:
    return number(value)


def rebuilt(elements: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """Return a tensor over a record, of any size, stride and offset."""
    empty = glob("collections", "OrderedDict") + b")R"
    dims, steps = items(*map(_int, size)), items(*map(_int, stride))
    return called(
        glob("torch._utils", "_rebuild_tensor_v2"), storage(elements), _int(offset), dims, steps, b"\x89", empty
    )


def with_tensor(value: bytes, record: bytes = bytes(48)) -> bytes:
    """Return an archive of a model whose first weight is made by instructions."""
    body = b"}(" + text(FQNS[0]) + value + b"u"
    return archive(code(body), records={"archive/data/0": record})


for _what, _value in {
    "a tensor expanded to 2 to the 40": rebuilt(12, 0, (1 << 40,), (0,)),
    "a tensor expanded to a gigabyte": rebuilt(12, 0, (1 << 28,), (0,)),
    "a tensor expanded in two dimensions": rebuilt(12, 0, (1 << 20, 1 << 20), (0, 0)),
    "a tensor of overlapping windows": rebuilt(12, 0, (1 << 14, 12), (0, 1)),
    "a tensor beyond its memory": rebuilt(12, 8, (4, 3), (3, 1)),
    "a tensor before its memory": rebuilt(12, -8, (4, 3), (3, 1)),
    "negative strides": rebuilt(12, 11, (12,), (-1,)),
    "strides of 2 to the 62": rebuilt(12, 0, (4, 3), (1 << 62, 1 << 62)),
    "negative sizes": rebuilt(12, 0, (-4, -3), (3, 1)),
    "sizes that overflow": rebuilt(12, 0, (1 << 32, 1 << 32), (1 << 32, 1)),
    "fewer strides than sizes": rebuilt(12, 0, (4, 3), (1,)),
    "memory of 2 to the 40 elements": rebuilt(1 << 40, 0, (4, 3), (3, 1)),
    "memory of negative length": rebuilt(-12, 0, (4, 3), (3, 1)),
    "a tensor without memory": called(
        glob("torch._utils", "_rebuild_meta_tensor_no_storage"),
        glob("torch", "float32"), items(_int(4), _int(3)), items(_int(3), _int(1)), b"\x89",
    ),
    "a tensor without memory of 2 to the 40": called(
        glob("torch._utils", "_rebuild_meta_tensor_no_storage"),
        glob("torch", "float32"), items(_int(1 << 40)), items(_int(1)), b"\x89",
    ),
    "a bytearray of a terabyte": called(glob("builtins", "bytearray"), _int(1 << 40)),
    "a bytearray of two gigabytes": called(glob("builtins", "bytearray"), _int(1 << 31)),
    "a number where a tensor is": _int(1),
    "a storage where a tensor is": storage(12),
    "a storage of another name": called(
        glob("torch._utils", "_rebuild_tensor_v2"), storage(12, "../../outside/secret"), _int(0),
        items(_int(12)), items(_int(1)), b"\x89", glob("collections", "OrderedDict") + b")R",
    ),
    "a class where a tensor is": glob("torch", "FloatStorage"),
    "a function where a tensor is": glob("torch._utils", "_rebuild_tensor_v2"),
    "state for an ordered dict": glob("collections", "OrderedDict") + b")R}(" + text("items") + b"Nub",
    "state for an ordered dict's class": glob("collections", "OrderedDict") + b")R}(" + text("__class__") + b"Nub",
    "an unknown device": items(
        text("storage"), glob("torch", "FloatStorage"), text("0"), text("cuda:99"), _int(12)) + b"Q",
}.items():  # fmt: skip
    both(_what, f"Makes {_what} of a few bytes." if "state" not in _what else f"Sets {_what}.",
         lambda g, v=_value: with_tensor(v))  # fmt: skip


@attack.of("folder")
def sparse_indices_outside(ground: Ground) -> Path:
    """Saves a sparse tensor whose indices lie outside of it."""
    sparse = torch.sparse_coo_tensor(torch.tensor([[1 << 40]]), torch.ones(1), (4,), check_invariants=False)
    return ground.write("model.pt", saved({FQNS[0]: sparse, FQNS[1]: torch.ones(4, 3)}))


@attack.of("folder")
def tensors_of_odd_kinds(ground: Ground) -> Path:
    """Saves tensors of kinds that no checkpoint has."""
    odd = {
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "sparse": torch.eye(3).to_sparse(),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "conjugated": torch.ones(3, dtype=torch.complex64).conj(),
    }
    return ground.write("model.pt", saved({**odd, FQNS[0]: torch.ones(4, 3)}))


# numpy, whose own classes are not safe ------------------------------------------------------------


def dtype(kind: str, *state: bytes) -> bytes:
    """Return numpy's dtype with a state."""
    made = called(glob("numpy", "dtype"), text(kind), b"\x89", b"\x88")
    return made + items(*state) + b"b" if state else made


def latin(raw: bytes) -> bytes:
    """Return bytes as protocol 2 has them."""
    return called(glob("_codecs", "encode"), text(raw.decode("latin1")), text("latin1"))


def filled(shape: bytes, kind: bytes, raw: bytes) -> bytes:
    """Return numpy's array as it pickles itself."""
    array = called(
        glob("numpy._core.multiarray", "_reconstruct"), glob("numpy", "ndarray"), items(_int(0)), latin(b"b")
    )
    return array + items(_int(1), shape, kind, b"\x89", raw) + b"b"


_PLAIN = (_int(3), text("<"), b"N", b"N", b"N", _int(-1), _int(-1), _int(0))
_OBJECTS = items(text("a"))
_FIELDS = b"}(" + text("a") + items(dtype("O"), _int(0)) + b"u"
for _what, _value in {
    "an array of objects over any address": called(
        glob("numpy", "ndarray"), items(_int(1)), dtype("O"), latin(b"A" * 8)
    ),
    "an array of objects made anew": b"(" + glob("numpy", "ndarray") + items(_int(1)) + b"\x81",
    "an array over foreign memory": called(
        glob("numpy", "ndarray"), items(_int(1 << 30)), dtype("f8"), latin(b"A" * 8), _int(-(1 << 20))
    ),
    "an array of 2 to the 40": called(
        glob("numpy._core.multiarray", "_reconstruct"), glob("numpy", "ndarray"), items(_int(1 << 40)), latin(b"d")
    ),
    "an array whose dtype has objects for fields": filled(
        items(_int(1)),
        dtype("f8", _int(3), text("<"), b"N", _OBJECTS, _FIELDS, _int(-1), _int(-1), _int(0)),
        latin(b"A" * 8),
    ),
    "an array of a void dtype": filled(
        items(_int(1)),
        dtype("V8", _int(3), text("|"), b"N", _OBJECTS, _FIELDS, _int(8), _int(1), _int(0)),
        latin(b"A" * 8),
    ),
    "an array of objects as it pickles itself": filled(
        items(_int(1)), dtype("O", _int(3), text("|"), b"N", b"N", b"N", _int(-1), _int(-1), _int(63)), b"]Na"
    ),
    "an array of objects from bytes": filled(
        items(_int(1)), dtype("O", _int(3), text("|"), b"N", b"N", b"N", _int(-1), _int(-1), _int(63)), latin(b"A" * 8)
    ),
    "a text of negative width": filled(
        items(_int(2)),
        dtype("U5", _int(3), text("<"), b"N", b"N", b"N", _int(-8), _int(4), _int(8)),
        latin(b""),
    ),
    "text that is no characters": filled(
        items(_int(1)),
        dtype("U1", _int(3), text("<"), b"N", b"N", b"N", _int(4), _int(4), _int(8)),
        latin(b"\xff" * 4),
    ),
    "an array of fewer bytes": filled(items(_int(1 << 40)), dtype("f8", *_PLAIN), latin(b"A" * 8)),
    "an array of a negative shape": filled(items(_int(-1)), dtype("f8", *_PLAIN), latin(b"A" * 8)),
    "an array of a million dimensions": filled(items(*[_int(1)] * 1000), dtype("f8", *_PLAIN), latin(b"A" * 8)),
    "a dtype of a path": dtype("/etc/passwd"),
    "a dtype of a gigabyte": filled(items(_int(0)), dtype("S999999999", *_PLAIN), latin(b"")),
    "a dtype of many fields": dtype(",".join(["f8"] * 100_000)),
    "a scalar of objects": called(glob("numpy._core.multiarray", "scalar"), dtype("O"), latin(b"A" * 8)),
    "a scalar of fewer bytes": called(glob("numpy._core.multiarray", "scalar"), dtype("f8", *_PLAIN), latin(b"A")),
    "a generator": called(glob("numpy.random._pickle", "__randomstate_ctor"), text("MT19937")),
    "a memory map": called(glob("numpy", "memmap"), text("/etc/passwd")),
}.items():  # fmt: skip
    both(f"numpy: {_what}", f"Makes {_what}.", lambda g, v=_value: archive(code(b"}(" + text("a") + v + b"u")))


# What exhausts -----------------------------------------------------------------------------------

_DEEP = 100_000
for _what, _value in {
    "deep lists": b"]" * _DEEP + b"a" * (_DEEP - 1),
    "deep tuples": b")" + b"\x85" * _DEEP,
    "deep dicts": (b"}" + text("a")) * _DEEP + b"N" + b"s" * _DEEP,
    "a list in itself": b"]q\x00h\x00a",
    "a dict in itself": b"}q\x00" + text("a") + b"h\x00s",
    "a tuple that holds the list that it is in": b"]q\x00h\x00\x85a",
    "doubling tuples": b"Nq\x00"
    + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60)),
    "lists that multiply": b"".join(
        b"](" + (b"h" + bytes([max(i - 1, 0)])) * 50 * bool(i) + b"eq" + bytes([i]) for i in range(10)
    ),
    "a memo of 2 to the 32": b"Nr\xff\xff\xff\xff",
    "a text of 4 gigabytes": b"X\xff\xff\xff\xff",
    "marks": b"(" * 1_000_000,
    "nothing at all": b"",
    "an empty stack": b"R",
    "persistent ids": text("0") + b"Q",
    "a negative persistent id": _int(-1) + b"Q",
    "an extension": b"\x82\x01",
    "a long of 255 bytes": b"\x8a\xff" + b"\x7f" * 255,
    "an unhashable key": b"}]Ns",
}.items():
    both(_what, f"Pickles {_what}.", lambda g, v=_value: archive(code(v)))


# Archives ----------------------------------------------------------------------------------------


@attack
def zip_bomb_for_an_object(ground: Ground) -> Path:
    """Compresses four gigabytes of nothing to four megabytes, where a pickle should be."""
    return ground.entry(_bomb("archive/data.pkl"))


@attack.of("folder")
def zip_bomb_for_a_tensor(ground: Ground) -> Path:
    """Compresses gigabytes of nothing, where a tensor's bytes should be."""
    body = with_tensor(rebuilt(1 << 28, 0, (1 << 28,), (1,)))
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(body)) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as made:
        for name in old.namelist():
            if not name.endswith("/data/0"):
                made.writestr(name, old.read(name))
        _zeros(made, "archive/data/0", 1 << 30)
    return ground.write("model.pt", stream.getvalue())


def _bomb(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made:
        _zeros(made, name, 2 << 30)
        made.writestr("archive/version", b"3\n")
    return stream.getvalue()


def _zeros(made: zipfile.ZipFile, name: str, size: int) -> None:
    with made.open(name, "w", force_zip64=True) as record:
        for _ in range(size >> 24):
            record.write(bytes(1 << 24))


def _patched(ground: Ground, at: int, form: str, value: int, central: bool = True) -> bytes:
    """Return an honest archive with a number changed in its first record's central entry, or its local header."""
    honest = bytearray(saved({FQNS[0]: torch.ones(4, 3)}))
    start = honest.find(b"PK\x01\x02") if central else 0
    struct.pack_into(form, honest, start + at, value)
    return bytes(honest)


for _what, (_at, _form, _number, _central) in {
    "a record of four gigabytes": (24, "<I", 0xFFFFFFF0, True),
    "a record that needs 64 bits and has none": (24, "<I", 0xFFFFFFFF, True),
    "a record beyond the file": (42, "<I", 0xFFFFFFF0, True),
    "a record compressed in an unknown way": (10, "<H", 99, True),
    "a record that is encrypted": (8, "<H", 1, True),
    "a record with a name of 64 kilobytes": (28, "<H", 0xFFFF, True),
    "a record with a wrong checksum": (16, "<I", 12345, True),
    "a header with a name of 64 kilobytes": (26, "<H", 0xFFFF, False),
    "a header with other sizes": (18, "<I", 0xFFFFFFF0, False),
}.items():
    both(f"archive: {_what}", f"Has an archive with {_what}.",
         lambda g, a=_at, f=_form, n=_number, c=_central: _patched(g, a, f, n, c))  # fmt: skip


@attack.of("folder")
def archive_that_leads_outside(ground: Ground) -> Path:
    """Has records whose names lead out of a folder that they would be unpacked to."""
    stream = io.BytesIO(saved({FQNS[0]: torch.ones(4, 3)}))
    with zipfile.ZipFile(stream, "a") as made:
        for name in ("../../outside/it-ran", "/tmp/it-ran", "archive/data/../../../outside/it-ran"):
            made.writestr(name, b"x")
    return ground.write("model.pt", stream.getvalue())


@attack.of("folder")
def archive_of_a_hundred_thousand_records(ground: Ground) -> Path:
    """Has so many records that whatever is quadratic in them hangs."""
    stream = io.BytesIO(saved({FQNS[0]: torch.ones(4, 3)}))
    with zipfile.ZipFile(stream, "a") as made:
        for index in range(20_000):
            made.writestr(f"archive/data/{index + 1}", b"")
    return ground.write("model.pt", stream.getvalue())


@attack.of("folder")
def records_that_lie_over_each_other(ground: Ground) -> Path:
    """Has two names for one record, of which each claims all of the file."""
    honest = saved({FQNS[0]: torch.ones(4, 3), FQNS[1]: torch.ones(4, 3)})
    return ground.write("model.pt", honest.replace(b"data/1", b"data/0"))


@attack.of("folder")
def two_archives_in_one(ground: Ground) -> Path:
    """Is one archive for who reads from the front and another for who reads from the end."""
    return ground.write(
        "model.pt", saved({FQNS[0]: torch.ones(4, 3)}) + saved({FQNS[0]: torch.zeros(4, 3), "e": system(ground)})
    )


@attack.of("folder")
def pipe_for_a_file(ground: Ground) -> Path:
    """Lets a reader wait for ever on a pipe."""
    os.mkfifo(ground.folder / "model.pt")
    return ground.folder / "model.pt"


@attack.of("folder")
def link_to_a_device_for_a_file(ground: Ground) -> Path:
    """Is a symbolic link to a device that never ends."""
    (ground.folder / "model.pt").symlink_to("/dev/zero")
    return ground.folder / "model.pt"


@attack.of("folder")
def record_names_that_are_numbers_of_other_scripts(ground: Ground) -> Path:
    """Asks for memory by a record's name that is no name."""
    return ground.write(
        "model.pt", with_tensor(rebuilt(12, 0, (4, 3), (3, 1)).replace(b"X\x01\0\0\x000", b"X\x02\0\0\0\xd9\xa3"))
    )
