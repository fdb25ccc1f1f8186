"""Pickles that no honest writer makes: each tries to run code, to take all memory or time, or to lie.

They are put together by hand from instructions, so that each does what its name says and nothing refuses to
write it. ``ATTACKS`` is the gallery.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

NOW = "torch.distributed.checkpoint.metadata"
NONE, TRUE, FALSE, EMPTY_LIST, EMPTY_DICT = b"N", b"\x88", b"\x89", b"]", b"}"


# --- An assembler: each function gives the instructions that push one value ---


def pickled(code: bytes) -> bytes:
    return b"\x80\x04" + code + b"."


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def items(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def listed(*values: bytes) -> bytes:
    return b"](" + b"".join(values) + b"e"


def mapped(*pairs: tuple[bytes, bytes]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


def called(function: bytes, *args: bytes) -> bytes:
    return function + items(*args) + b"R"


def bare(kind: bytes) -> bytes:
    return kind + b")\x81"


def made(kind: bytes, **state: bytes) -> bytes:
    return bare(kind) + mapped(*((text(key), value) for key, value in state.items())) + b"b"


def size(*dims: int) -> bytes:
    return called(name("torch", "Size"), items(*map(number, dims)))


def memoized(value: bytes, index: int) -> bytes:
    """The value, stored under an index that must be the next."""
    return value + b"r" + struct.pack("<I", index)


def stored(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


PROPERTIES = name(NOW, "TensorProperties")
ENCODING = name(NOW, "_MEM_FORMAT_ENCODING")
LAYOUT = called(name("torch.serialization", "_get_layout"), text("torch.strided"))


def properties(
    dtype: bytes = name("torch", "float32"),
    layout: bytes = LAYOUT,
    memory_format: bytes = called(ENCODING, number(0)),
) -> bytes:
    return bare(PROPERTIES) + items(dtype, layout, FALSE, memory_format, FALSE) + b"b"


def chunk(offsets: bytes, sizes: bytes) -> bytes:
    return made(name(NOW, "ChunkStorageMetadata"), offsets=offsets, sizes=sizes)


def tensor(
    dims: bytes = size(4, 3),
    chunks: bytes = listed(chunk(size(0, 0), size(4, 3))),
    about: bytes = properties(),
) -> bytes:
    return made(name(NOW, "TensorStorageMetadata"), properties=about, size=dims, chunks=chunks)


def index(**state: bytes) -> bytes:
    return made(name(NOW, "MetadataIndex"), **{"fqn": text("w"), "index": number(0), "offset": size(0, 0), **state})


def info(**state: bytes) -> bytes:
    honest = {"relative_path": text("__0_0.distcp"), "offset": number(0), "length": number(48)}
    return made(name("torch.distributed.checkpoint.filesystem", "_StorageInfo"), **{**honest, **state})


def metadata(**changed: bytes) -> bytes:
    """A whole honest file, but for what is changed."""
    honest = {
        "state_dict_metadata": mapped((text("w"), tensor())),
        "planner_data": mapped((text("w"), items(text("w")))),
        "storage_data": mapped((index(), info())),
        "storage_meta": made(name(NOW, "StorageMeta"), checkpoint_id=text("run/step-1"), modules=EMPTY_LIST),
        "version": text("1.0.0"),
    }
    return pickled(made(name(NOW, "Metadata"), **{**honest, **changed}))


def with_tensor(code: bytes) -> bytes:
    return metadata(state_dict_metadata=mapped((text("w"), code)))


def with_place(key: bytes = index(), value: bytes = info()) -> bytes:
    return metadata(storage_data=mapped((key, value)))


def with_tailor(code: bytes) -> bytes:
    return metadata(tailor=code)


# --- The gallery ---


@dataclass(frozen=True)
class Attack:
    """One hostile file.

    Attributes:
        name: what it does.
        build: makes it; given a path that its code, if it were run, would create.
        says: what the error must name.
        runs: whether ``pickle.loads`` really creates that path.
    """

    name: str
    build: Callable[[Path], bytes]
    says: str
    runs: bool = False


def shell(sentinel: Path) -> bytes:
    return text(f"touch {sentinel}")


def asks(module: str, attribute: str, *args: bytes) -> bytes:
    return pickled(called(name(module, attribute), *args))


def running() -> list[Attack]:
    """What executes code or reaches into objects."""
    system, get = name("os", "system"), name("builtins", "getattr")

    def shell(path: Path) -> bytes:
        return text(f"touch {path}")

    def python(path: Path) -> bytes:
        return text(f"__import__('pathlib').Path({str(path)!r}).touch()")

    def old(before: bytes, after: bytes) -> Callable[[Path], bytes]:
        return lambda path: before + f"S'touch {path}'\n".encode() + after

    return [
        Attack("os.system", lambda p: asks("os", "system", shell(p)), "os.system", True),
        Attack("posix.system", lambda p: asks("posix", "system", shell(p)), "posix.system", True),
        Attack("eval", lambda p: asks("builtins", "eval", python(p)), "builtins.eval", True),
        Attack("exec", lambda p: asks("builtins", "exec", python(p)), "builtins.exec", True),
        Attack(
            "subprocess",
            lambda p: asks("subprocess", "check_call", listed(text("touch"), text(str(p)))),
            "subprocess.check_call",
            True,
        ),
        Attack("inside a metadata", lambda p: metadata(version=called(system, shell(p))), "os.system", True),
        Attack("inside the record", lambda p: with_tailor(called(system, shell(p))), "os.system", True),
        Attack("inside a note", lambda p: metadata(mcore_data=called(system, shell(p))), "os.system", True),
        Attack(
            "through an allowed module",
            lambda p: asks("torch.serialization", "os.system", shell(p)),
            "torch.serialization.os.system",
            True,
        ),
        Attack("text GLOBAL", old(b"cos\nsystem\n(", b"tR."), "os.system", True),
        Attack("INST of text", old(b"(", b"ios\nsystem\n."), "STRING", True),
        Attack("OBJ", old(b"(cos\nsystem\n", b"o."), "os.system", True),
    ] + [
        Attack(what, lambda p, data=data: data, says)
        for what, (data, says) in {
            "through an allowed class": (pickled(name(NOW, "Metadata.__init__")), "Metadata.__init__"),
            "torch.load": (asks("torch", "load", text("x")), "torch.load"),
            "torch.hub": (asks("torch.hub", "load", text("someone/something"), text("x")), "torch.hub.load"),
            "torch._utils": (asks("torch._utils", "_rebuild_tensor_v2"), "torch._utils._rebuild_tensor_v2"),
            "torch.storage": (asks("torch.storage", "_load_from_bytes", text("x")), "_load_from_bytes"),
            "torch.ones": (asks("torch", "ones", number(1 << 40)), "torch.ones"),
            "getattr": (
                pickled(called(get, name(NOW, "Metadata"), text("__init__"))),
                "builtins.getattr(Metadata, __init__)",
            ),
            "getattr of the enum": (
                pickled(called(get, ENCODING, text("__reduce_ex__"))),
                "builtins.getattr(_MEM_FORMAT_ENCODING, __reduce_ex__)",
            ),
            "getattr chain": (
                pickled(called(get, called(get, ENCODING, text("__class__")), text("__subclasses__"))),
                "builtins.getattr",
            ),
            "attrgetter": (asks("operator", "attrgetter", text("x")), "operator.attrgetter"),
            "import": (asks("importlib", "import_module", text("this")), "importlib.import_module"),
            "unheard-of module": (asks("no.such.module", "x"), "no.such.module.x"),
            "str subclass": (asks("copyreg", "_reconstructor", NONE), "copyreg._reconstructor"),
            "numpy": (with_tailor(called(name("numpy", "str_"), text("x"))), "numpy.str_"),
            "bytes of any length": (asks("builtins", "bytes", number(1 << 40)), "builtins.bytes"),
            "control characters in a name": (asks("a\x1b[2J", "b\n"), r"a\x1b[2J.b\n"),
            "name that is no text": (pickled(number(1) + number(2) + b"\x93"), "a name that is not text"),
        }.items()
    ]


def misusing() -> list[Attack]:
    """Instructions that DCP does not use, and those that it uses in other ways."""
    empty, a_state = name(NOW, "BytesStorageMetadata"), mapped((text("x"), NONE))
    builds = {
        "INST": (b"(ios\nsystem\n.", "INST"),
        "OBJ of an allowed class": (pickled(b"(" + empty + b"o"), "OBJ"),
        "EXT1": (pickled(b"\x82\x01"), "EXT1"),
        "EXT2": (pickled(b"\x83\x01\x01"), "EXT2"),
        "EXT4": (pickled(b"\x84\x01\x01\x01\x01"), "EXT4"),
        "PERSID": (b"Pos.system\n.", "PERSID"),
        "BINPERSID": (pickled(text("os.system") + b"Q"), "BINPERSID"),
        "BYTEARRAY8": (pickled(b"\x96" + bytes(8)), "BYTEARRAY8"),
        "NEXT_BUFFER": (pickled(b"\x97"), "NEXT_BUFFER"),
        "DUP": (pickled(b"N2"), "DUP"),
        "unassigned instruction": (pickled(b"\xff"), "0xff"),
        "NEWOBJ_EX": (pickled(name(NOW, "Metadata") + b")}\x92"), "NEWOBJ_EX"),
        "NEWOBJ with arguments": (pickled(empty + items(NONE) + b"\x81"), "BytesStorageMetadata"),
        "NEWOBJ of a function": (pickled(bare(name("torch", "Size"))), "torch.Size"),
        "NEWOBJ of a value": (pickled(bare(text("str"))), "no class"),
        "REDUCE of a class": (asks(NOW, "StorageMeta", text("x")), "StorageMeta"),
        "REDUCE of a value": (asks("torch", "float32"), "no function"),
        "BUILD of __class__": (with_tensor(made(empty, __class__=NONE)), "__class__"),
        "BUILD of __setstate__": (with_tensor(made(empty, __setstate__=NONE)), "__setstate__"),
        "BUILD with slots": (with_tensor(bare(empty) + items(NONE, a_state) + b"b"), "Metadata with a state"),
        "BUILD on a class": (
            pickled(name("torch", "Size") + a_state + b"b"),
            "a state to be set on a value of type class",
        ),
        "BUILD on a dtype": (
            pickled(name("torch", "float32") + a_state + b"b"),
            "a state to be set on a value of type dtype",
        ),
        "BUILD on a list": (pickled(EMPTY_LIST + a_state + b"b"), "a state to be set on a value of type list"),
    }
    return [Attack(what, lambda p, data=data: data, says) for what, (data, says) in builds.items()]


def exhausting() -> list[Attack]:
    """What a naive reader answers with all the memory, all the time, or a crash of the interpreter."""
    many, keyed = 300_000, EMPTY_DICT + b"%s" + NONE + b"s"
    doubling = b"".join(memoized(b"\x86", i + 1) + stored(i + 1) for i in range(60))
    tuples = memoized(items(NONE), 0) + stored(0) + doubling + b"\x86"
    lists = listed(
        memoized(EMPTY_LIST, 0),
        *[memoized(EMPTY_LIST, i + 1) + b"(" + stored(i) * 50 + b"e" for i in range(10)],
    )
    dims = memoized(items(*[number(1)] * 20_000), 0)
    path = memoized(items(*[text("x" * 1_000_000)]), 0)
    wide = memoized(mapped(*[(text(f"a{i}"), NONE) for i in range(20_000)]), 0)
    strings = memoized(listed(*[text("zip")] * 20_000), 0)
    colliding = [number(i * ((1 << 61) - 1)) for i in range(1, 20_000)]

    def after(stored_value: bytes, code: bytes, times: int) -> Callable[[Path], bytes]:
        return lambda p: pickled(listed(stored_value, *[code] * times))

    return [
        Attack("memo bomb", lambda p: b"Nr\xff\xff\xff\x7f.", "stores memo 2147483647 after 0"),
        Attack("memo bomb, BINPUT", lambda p: b"Nq\xff.", "stores memo 255 after 0"),
        Attack("memo bomb, text PUT", lambda p: b"Np999999999999\n.", "PUT"),
        Attack("missing memo", lambda p: pickled(stored(1 << 31)), "is not there"),
        Attack(
            "text of 2**60 bytes", lambda p: pickled(b"\x8d" + struct.pack("<Q", 1 << 60)), "1152921504606846976 bytes"
        ),
        Attack("text of 2**32 bytes", lambda p: pickled(b"X\xff\xff\xff\xff"), "4294967295 bytes"),
        Attack(
            "bytes of 2**60 bytes", lambda p: pickled(b"\x8e" + struct.pack("<Q", 1 << 60)), "1152921504606846976 bytes"
        ),
        Attack("frame of 2**60 bytes", lambda p: pickled(b"\x95" + struct.pack("<Q", 1 << 60)), "missing"),
        Attack("LONG4", lambda p: pickled(b"\x8b\xff\xff\xff\x7f"), "LONG4"),
        Attack("text LONG", lambda p: b"L" + b"9" * many + b"L\n.", "LONG"),
        Attack("deep tuple", lambda p: pickled(b")" + b"\x85" * many), "is of type tuple"),
        Attack("deep tuple as a key", lambda p: pickled(keyed % (b")" + b"\x85" * many)), "is of type dict"),
        Attack("deep tuple as a storage key", lambda p: with_place(b")" + b"\x85" * many), "storage_data"),
        Attack("deep tuple as a name", lambda p: with_place(index(fqn=b")" + b"\x85" * many)), "fqn is of type tuple"),
        Attack(
            "deep tuple as a record's key", lambda p: with_tailor(keyed % (b")" + b"\x85" * many)), "deeper than 12"
        ),
        Attack("doubling tuples as a key", lambda p: pickled(keyed % tuples), "is of type dict"),
        Attack("doubling tuples as a name", lambda p: with_place(index(fqn=tuples)), "fqn is of type tuple"),
        Attack("deep list", lambda p: pickled(b"]" * many + b"a" * (many - 1)), "is of type list"),
        Attack("deep list in the record", lambda p: with_tailor(b"]" * many + b"a" * (many - 1)), "deeper than 12"),
        Attack(
            "deep dict",
            lambda p: with_tailor((EMPTY_DICT + NONE) * many + NONE + b"s" * many),
            "deeper than 12",
        ),
        Attack("marks", lambda p: pickled(b"(" * many), "nests deeper than 64"),
        Attack("list in itself", lambda p: with_tailor(memoized(EMPTY_LIST, 0) + stored(0) + b"a"), "deeper than 12"),
        Attack(
            "lists that multiply",
            lambda p: with_tailor(lists),
            "refers to the same values too often",
        ),
        Attack("one size for ever", after(dims, called(name("torch", "Size"), stored(0)), 20_000), "at most 64"),
        Attack(
            "one path for ever",
            after(path, name("pathlib", "PosixPath") + stored(0) + b"R", 20_000),
            "is of type list",
        ),
        Attack("one state for ever", after(wide, bare(name(NOW, "Metadata")) + stored(0) + b"b", 20_000), "state"),
        Attack(
            "one list of transforms for ever",
            after(strings, info(transform_descriptors=stored(0)), 20_000),
            "transforms",
        ),
        Attack(
            "one list of chunks for ever",
            lambda p: metadata(
                state_dict_metadata=mapped(
                    (text("w"), tensor(chunks=memoized(listed(*[chunk(size(0), size(1))] * 2000), 0), dims=size(4))),
                    *[(text(f"w{i}"), tensor(chunks=stored(0), dims=size(4))) for i in range(4000)],
                )
            ),
            "more chunks than it has bytes",
        ),
        Attack(
            "keys that collide",
            lambda p: with_tailor(mapped(*[(key, NONE) for key in colliding])),
            "equal hashes",
        ),
        Attack(
            "one storage key for ever",
            lambda p: metadata(storage_data=b"}(" + memoized(index(), 0) + info() + (stored(0) + info()) * 5000 + b"u"),
            "equal hashes",
        ),
        Attack("name without an end", lambda p: b"c" * many, "does not end"),
        Attack("tuple of nothing", lambda p: pickled(b"\x86"), "is not there"),
    ]


def lying() -> list[Attack]:
    """What is only wrong."""
    unbuilt = {kind: bare(name(NOW, kind)) for kind in ("MetadataIndex", "ChunkStorageMetadata")}
    builds = {
        "empty file": (b"", "end"),
        "no end": (metadata()[:-1], "end"),
        "two values": (pickled(NONE + NONE), "end"),
        "an open mark": (pickled(b"(N"), "end"),
        "bytes after the end": (metadata() + b"N.", "goes on after its end"),
        "text": (b"hello, this is no checkpoint at all", "is not there"),
        "a dict": (pickled(EMPTY_DICT), "is of type dict"),
        "a state dict": (pickled(mapped((text("w"), size(1)))), "is of type dict"),
        "protocol 6": (b"\x80\x06N.", "protocol 6"),
        "not UTF-8": (pickled(b"X\x02\0\0\0\xff\xfe"), "UTF-8"),
        "key without a value": (pickled(b"}(Nu"), "without a value"),
        "items for a tuple": (pickled(b")(Ne"), "adds items to a value of type tuple"),
        "no state_dict_metadata": (pickled(bare(name(NOW, "Metadata"))), "no state_dict_metadata"),
        "no storage_data": (
            pickled(made(name(NOW, "Metadata"), state_dict_metadata=EMPTY_DICT)),
            "no storage_data",
        ),
        "state_dict_metadata a list": (metadata(state_dict_metadata=EMPTY_LIST), "state_dict_metadata is of type list"),
        "storage_data a list": (metadata(storage_data=EMPTY_LIST), "storage_data is of type list"),
        "a name that is bytes": (metadata(state_dict_metadata=mapped((b"C\x01w", tensor()))), "is not text"),
        "an entry that is a size": (with_tensor(size(1)), "the entry w is neither a tensor nor bytes"),
        "a chunk that is text": (with_tensor(tensor(chunks=listed(text("x")))), "the chunks of w"),
        "a chunk without a state": (
            with_tensor(tensor(chunks=listed(unbuilt["ChunkStorageMetadata"]))),
            "1 of its entries",
        ),
        "chunks in a tuple": (with_tensor(tensor(chunks=items())), "chunks is of type tuple"),
        "negative size": (with_tensor(tensor(dims=size(-4, 3))), "non-negative"),
        "size of truth values": (
            with_tensor(tensor(dims=called(name("torch", "Size"), items(TRUE)))),
            "non-negative 64-bit",
        ),
        "size beyond 64 bits": (with_tensor(tensor(dims=size(1 << 63))), "64-bit"),
        "size of a number": (with_tensor(tensor(dims=called(name("torch", "Size"), number(1 << 40)))), "size"),
        "size of 65 dimensions": (with_tensor(tensor(dims=size(*[1] * 65))), "at most 64"),
        "chunk beyond its tensor": (
            with_tensor(tensor(chunks=listed(chunk(size(1, 0), size(4, 3))))),
            "a chunk of w lies outside",
        ),
        "chunk of other dimensions": (
            with_tensor(tensor(chunks=listed(chunk(size(0), size(4))))),
            "a chunk of w lies outside",
        ),
        "dtype that is text": (with_tensor(tensor(about=properties(dtype=text("float32")))), "dtype is of type str"),
        "unknown layout": (
            with_tensor(tensor(about=properties(layout=called(name("torch.serialization", "_get_layout"), text("x"))))),
            "layout",
        ),
        "memory format 99": (
            with_tensor(tensor(about=properties(memory_format=called(ENCODING, number(99))))),
            "memory format",
        ),
        "memory format by name": (
            with_tensor(tensor(about=properties(memory_format=called(ENCODING, text("__class__"))))),
            "memory format",
        ),
        "properties of four": (with_tensor(tensor(about=bare(PROPERTIES) + items(NONE) + b"b")), "TensorProperties"),
        "properties by name": (with_tensor(tensor(about=made(PROPERTIES, dtype=NONE))), "TensorProperties"),
        "index without a state": (with_place(unbuilt["MetadataIndex"]), "1 of its entries"),
        "index by name": (with_place(text("w")), "storage_data"),
        "index of a number": (with_place(index(fqn=number(1))), "fqn is of type int"),
        "index with a tuple": (with_place(index(offset=items(number(0)))), "offset is of type tuple"),
        "index with more": (with_place(index(extra=NONE)), "an attribute extra"),
        "hint that is a truth value": (with_place(index(index=TRUE)), "index is of type bool"),
        "state twice": (with_place(index() + mapped((text("fqn"), text("v"))) + b"b"), "twice"),
        "place that is text": (with_place(value=text("x")), "storage_data"),
        "NUL in a path": (with_place(value=info(relative_path=text("a\0b"))), r"a\x00b has a NUL"),
        "path that is bytes": (with_place(value=info(relative_path=b"C\x01a")), "relative_path is of type bytes"),
        "negative offset": (with_place(value=info(offset=number(-1))), "offset is no non-negative"),
        "negative length": (with_place(value=info(length=number(-1))), "length is no non-negative"),
        "length of 800 bits": (with_place(value=info(length=number(1 << 800))), "64-bit"),
        "length that is a float": (with_place(value=info(length=b"G" + bytes(8))), "length is of type float"),
        "transforms that are text": (with_place(value=info(transform_descriptors=text("zip"))), "is of type str"),
        "transforms of numbers": (with_place(value=info(transform_descriptors=listed(number(1)))), "transform"),
        "modules of numbers": (
            metadata(storage_meta=made(name(NOW, "StorageMeta"), modules=listed(number(1)))),
            "module",
        ),
        "save id of a number": (metadata(storage_meta=made(name(NOW, "StorageMeta"), save_id=number(1))), "save_id"),
        "path of numbers": (
            metadata(
                storage_meta=made(
                    name(NOW, "StorageMeta"), checkpoint_id=called(name("pathlib", "PosixPath"), number(1))
                )
            ),
            "checkpoint_id",
        ),
        "version of a number": (metadata(version=number(1)), "version is of type int"),
        "planner data of instances": (
            metadata(planner_data=mapped((text("w"), size(1)))),
            "planner_data holds a value of type Size",
        ),
        "record of instances": (with_tailor(listed(index())), "tailor holds a value of type MetadataIndex"),
        "record of 13 levels": (with_tailor(b"]" * 13 + b"a" * 12), "deeper than 12"),
        "record with a class": (with_tailor(name("torch", "Size")), "tailor holds a value of type class"),
        "record with a nested key": (with_tailor(mapped((items(items()), NONE))), "flat tuple"),
    }
    return [Attack(what, lambda p, data=data: data, says) for what, (data, says) in builds.items()]


ATTACKS = running() + misusing() + exhausting() + lying()
