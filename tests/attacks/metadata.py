"""A ``.metadata`` that runs code, takes all memory or time, reaches outside of its run, or lies about its tensors."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from tests.attacks.attack import Attack, Gallery
from tests.attacks.ground import LAYERS, Ground
from tests.metadata import hostile

attack = Gallery("metadata", "dcp")
KEY = f"model.{LAYERS[0]}"


def _pickle(one: hostile.Attack) -> Callable[[Ground], Path]:
    return lambda ground: ground.checkpoint(raw=one.build(ground.sentinel))


_TRIES = {
    "running": "code",
    "misusing": "instructions that DCP does not use",
    "exhausting": "all the memory or all the time",
    "lying": "a file that is only wrong",
}
for _family, _why in _TRIES.items():
    for _one in getattr(hostile, _family)():
        attack.attacks.append(
            Attack(f"{_family}: {_one.name}", f"A pickle for {_why}: {_one.name}.", "dcp", _pickle(_one))
        )


# Where files are --------------------------------------------------------------------------


def _places(ground: Ground, path: str | Callable[[Ground], str]) -> Path:
    """Return a checkpoint whose first tensor, and an object, are in another file."""
    where = path if isinstance(path, str) else path(ground)

    def change(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn in (KEY, "train.note"):
                metadata.storage_data[index] = replace(info, relative_path=where)

    return ground.checkpoint(change)


for _what, _path in {
    "relative path to the outside": "../../../outside/secret.distcp",
    "relative path to passwd": "../../../../../../../../../../../../etc/passwd",
    "path that goes in and out again": "carried/../../../../outside/secret.distcp",
    "absolute path": lambda ground: str(ground.secret),
    "absolute path to passwd": "/etc/passwd",
    "device that never ends": "/dev/zero",
    "device through the file system of processes": "/proc/self/fd/0",
    "memory of the process": "/proc/self/mem",
    "its own metadata as data": ".metadata",
    "URL of a store": "s3://bucket/run/step-100/__0_0.distcp",
    "URL of a web server": "http://169.254.169.254/latest/meta-data/",
    "URL of a local file": "file:///etc/passwd",
    "path of a Windows share": r"\\host\share\secret.distcp",
    "path with coded dots": "%2e%2e/%2e%2e/%2e%2e/outside/secret.distcp",
    "path of a home": "~/secret.distcp",
    "path with a variable": "$HOME/secret.distcp",
    "empty path": "",
    "dot": ".",
    "folder as a file": "..",
    "path of a million characters": "a" * 1_000_000,
    "path of a hundred thousand folders": "a/" * 100_000 + "b",
    "path of control characters": "\x1b[2J\x07\r\nroot@host#.distcp",
}.items():  # fmt: skip
    _shown = repr(_path[:60]) if isinstance(_path, str) else "a file outside, by its absolute path,"
    attack.add(_what, f"Names {_shown} as a data file.", lambda ground, path=_path: _places(ground, path))


@attack
def data_file_that_is_a_link_outside(ground: Ground) -> Path:
    """Puts a symbolic link to a secret where a data file should be."""
    path = _places(ground, "link.distcp")
    (path / "link.distcp").symlink_to(ground.secret)
    return path


@attack
def carried_folder_that_is_a_link_outside(ground: Ground) -> Path:
    """Lets carried/ lead out of the run."""
    path = _places(ground, "carried/secret.distcp")
    if (path / "carried").exists():
        (path / "carried").rename(path / "was-carried")
    (path / "carried").symlink_to(ground.outside)
    return path


@attack
def carried_folder_with_a_link_outside(ground: Ground) -> Path:
    """Lets a folder in carried/ lead out of the run, where whoever tidies up would remove what is not needed."""
    path = _places(ground, "carried/x/secret.distcp")
    (path / "carried").mkdir(exist_ok=True)
    (path / "carried" / "x").symlink_to(ground.outside)
    return path


def _beside(ground: Ground, name: str, leads_to: str) -> Path:
    """Return a checkpoint with a link of a name that something will be written under, from it on."""
    path = ground.checkpoint()
    first = path.parent / "step-100"
    save_id = pickle.loads((first / ".metadata").read_bytes()).tailor["save_id"]
    (data, *_) = first.glob("*.distcp")
    link = path / name.replace("ID", save_id).replace("DATA", data.name)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(ground.outside / leads_to if leads_to else ground.outside)
    return path


for _what, (_name, _to) in {
    "the metadata until it is complete": (".metadata.tmp", "secret.distcp"),
    "the metadata until it is complete, to nothing": (".metadata.tmp", "it-ran"),
    "repointed metadata": (".metadata.partial", "secret.distcp"),
    "what is copied": ("carried/ID/DATA.partial", "secret.distcp"),
    "what is carried": ("carried/ID/DATA", "secret.distcp"),
    "what is carried, to nothing": ("carried/ID/DATA", "it-ran"),
    "a stripped checkpoint": (".metadata.pruned", "secret.distcp"),
    "a folder that is removed": ("../.pruned-step-100", ""),
    "a folder that is removed, to nothing": ("../.pruned-step-100", "it-ran"),
    "a compaction": ("../.compact", ""),
    "a compaction's lock": ("../.compact.lock", "it-ran"),
    "a lock of what exists": ("../.compact.lock", "secret.distcp"),
    "a merge that was cut off": ("../.step-300.merge", ""),
    "a lock of a merge that was cut off": ("../.step-300.merge.lock", "it-ran"),
    "a report that was cut off": ("../.0123456789abcdef.tmp", "secret.distcp"),
    "what is a copy's": (".metadata.copying", "secret.distcp"),
}.items():
    attack.add(f"a link by the name of {_what}", f"Leads outside by the name of {_what}, which somebody may write to.",
               lambda ground, n=_name, t=_to: _beside(ground, n, t))  # fmt: skip


@attack
def link_to_a_device(ground: Ground) -> Path:
    """Puts a symbolic link to a device that never ends where a data file should be."""
    path = _places(ground, "link.distcp")
    (path / "link.distcp").symlink_to("/dev/zero")
    return path


@attack
def link_to_itself(ground: Ground) -> Path:
    """Puts a symbolic link that leads to itself where a data file should be."""
    path = _places(ground, "link.distcp")
    (path / "link.distcp").symlink_to("link.distcp")
    return path


@attack
def link_in_every_folder_to_the_run(ground: Ground) -> Path:
    """Makes a run that holds itself, so that whoever walks through it never ends."""
    path = ground.checkpoint()
    for name in ("a", "b", "carried/c"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).symlink_to(path.parent)
    return path


@attack
def pipe_for_a_data_file(ground: Ground) -> Path:
    """Lets a reader wait for ever on a pipe that nobody writes to."""
    path = _places(ground, "pipe.distcp")
    os.mkfifo(path / "pipe.distcp")
    return path


@attack
def pipe_for_the_metadata(ground: Ground) -> Path:
    """Lets a reader wait for ever for the metadata."""
    path = ground.checkpoint()
    (path / ".metadata").unlink()
    os.mkfifo(path / ".metadata")
    return path


@attack
def metadata_that_is_a_link_outside(ground: Ground) -> Path:
    """Makes the metadata a link to a secret, whose bytes an error might tell."""
    path = ground.checkpoint()
    (path / ".metadata").unlink()
    (path / ".metadata").symlink_to(ground.secret)
    return path


@attack
def metadata_that_is_a_device(ground: Ground) -> Path:
    """Makes the metadata a link to a device that never ends."""
    path = ground.checkpoint()
    (path / ".metadata").unlink()
    (path / ".metadata").symlink_to("/dev/zero")
    return path


@attack
def metadata_that_is_a_folder(ground: Ground) -> Path:
    """Makes the metadata a folder."""
    path = ground.checkpoint()
    (path / ".metadata").unlink()
    (path / ".metadata").mkdir()
    return path


@attack
def metadata_of_a_terabyte(ground: Ground) -> Path:
    """Makes the metadata a sparse file that is larger than any memory."""
    path = ground.checkpoint()
    os.truncate(path / ".metadata", 1 << 40)
    return path


@attack
def sibling_checkpoint_that_is_a_link_outside(ground: Ground) -> Path:
    """Puts a checkpoint into the run that is a symbolic link out of it."""
    path = ground.checkpoint()
    (path.parent / "step-150").symlink_to(ground.outside)
    return path


@attack
def files_of_names_that_break_lines(ground: Ground) -> Path:
    """Leaves files in the run whose names move a terminal's cursor."""
    path = ground.checkpoint()
    for name in ("\x1b[2J\x1b[H", "a\nb", "\u202egnp.exe", os.fsdecode(b"\xff\xfe"), "[red]x[/red]", "<script>"):
        (path.parent / name).mkdir(parents=True, exist_ok=True)
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"x")
    return path


# Numbers ----------------------------------------------------------------------------------


def _info(**changed: int) -> Callable[[Ground], Path]:
    def change(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn in (KEY, "train.note"):
                metadata.storage_data[index] = replace(info, **changed)

    return lambda ground: ground.checkpoint(change)


for _what, _changed in {
    "offset beyond the file": {"offset": 1 << 40},
    "offset at the end of 64 bits": {"offset": (1 << 63) - 1},
    "negative offset": {"offset": -1},
    "negative length": {"length": -1},
    "length of a petabyte": {"length": 1 << 50},
    "offset and length that overflow": {"offset": (1 << 63) - 1, "length": (1 << 63) - 1},
    "length of nothing": {"length": 0},
    "length of one byte": {"length": 1},
    "length that cuts the blob off": {"length": 900},
}.items():
    attack.add(_what, f"Claims a blob's place with {_what}.", _info(**_changed))


def _huge(metadata: Any, file: str, size: tuple[int, ...], length: int = 1600) -> None:
    """Make the first tensor a huge one of one chunk in a small file."""
    entry = metadata.state_dict_metadata[KEY]
    chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), torch.Size(size))
    metadata.state_dict_metadata[KEY] = TensorStorageMetadata(entry.properties, torch.Size(size), [chunk])
    for index in [index for index in metadata.storage_data if index.fqn == KEY]:
        info = metadata.storage_data.pop(index)
        place = replace(info, relative_path=file or info.relative_path, length=length if file else info.length)
        metadata.storage_data[MetadataIndex(KEY, torch.Size([0] * len(size)), 0)] = place


for _what, _size in {
    "tensor of 2 to the 60 elements": (1 << 60,),
    "tensor whose product overflows": (1 << 40, 1 << 40),
    "tensor of 2 to the 62 by 4": (1 << 62, 4),
    "tensor of 64 dimensions": (2,) * 60,
    "tensor of many ones": (1,) * 64,
    "tensor without elements, of huge sizes": (1 << 62, 0, 1 << 62),
    "tensor of a terabyte": (1 << 40,),
    "tensor of a gigabyte and a half": (3 << 27,),
}.items():
    attack.add(_what, f"Claims a {_what} in a file of a few bytes.",
               lambda ground, size=_size: ground.checkpoint(lambda m: _huge(m, "", size)))  # fmt: skip


def _chunks(*chunks: tuple[tuple[int, ...], tuple[int, ...]]) -> Callable[[Ground], Path]:
    """Return a builder of a checkpoint whose first tensor, of (4, 3), is in other chunks."""

    def change(metadata: Any) -> None:
        entry = metadata.state_dict_metadata[KEY]
        made = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks]
        entry.chunks = made
        index, info = next((i, info) for i, info in metadata.storage_data.items() if i.fqn == KEY)
        del metadata.storage_data[index]
        for number, chunk in enumerate(made):
            metadata.storage_data[MetadataIndex(KEY, chunk.offsets, number)] = info

    return lambda ground: ground.checkpoint(change)


for _what, _of in {
    "overlapping chunks": [((0, 0), (3, 3)), ((1, 0), (3, 3))],
    "the same chunk twice": [((0, 0), (4, 3)), ((0, 0), (4, 3))],
    "a hole between chunks": [((0, 0), (1, 3)), ((3, 0), (1, 3))],
    "no chunk at all": [],
    "chunks that add up but overlap": [((0, 0), (2, 3)), ((1, 0), (2, 3))],
    "chunk of a million by zero": [((0, 0), (0, 3))],
    "chunk beyond the tensor": [((2, 0), (4, 3))],
    "chunk at the end of 64 bits": [(((1 << 63) - 1, 0), (4, 3))],
    "chunk of other dimensions": [((0,), (12,))],
}.items():
    attack.add(_what, f"Says that a tensor is stored in {_what}.", _chunks(*_of))


@attack
def a_hundred_thousand_chunks_of_nothing(ground: Ground) -> Path:
    """Lets every comparison of chunks with each other take for ever."""
    return _chunks(*[((4, 0), (0, 3))] * 100_000, ((0, 0), (4, 3)))(ground)


@attack
def ten_thousand_chunks_in_one_column(ground: Ground) -> Path:
    """Lets a search for overlaps that sorts by rows compare all chunks with all."""

    def change(metadata: Any) -> None:
        _huge(metadata, "", (4, 20_000))
        entry = metadata.state_dict_metadata[KEY]
        entry.chunks = [ChunkStorageMetadata(torch.Size((0, i)), torch.Size((4, 1))) for i in range(20_000)]
        info = metadata.storage_data.pop(next(i for i in metadata.storage_data if i.fqn == KEY))
        metadata.storage_data.update({MetadataIndex(KEY, c.offsets, n): info for n, c in enumerate(entry.chunks)})

    return ground.checkpoint(change)


def _entry(change: Callable[[Any], Any]) -> Callable[[Ground], Path]:
    return lambda ground: ground.checkpoint(lambda m: change(m.state_dict_metadata[KEY]))


@attack
def another_dtype_of_the_same_size(ground: Ground) -> Path:
    """Claims that floats are integers, so that their bits are taken for numbers."""
    return _entry(lambda entry: setattr(entry.properties, "dtype", torch.int32))(ground)


@attack
def a_dtype_of_quantized_numbers(ground: Ground) -> Path:
    """Claims a dtype that torch.empty cannot make."""
    return _entry(lambda entry: setattr(entry.properties, "dtype", torch.qint8))(ground)


@attack
def a_dtype_of_a_few_bits(ground: Ground) -> Path:
    """Claims a dtype that has no kernels."""
    return _entry(lambda entry: setattr(entry.properties, "dtype", torch.uint4))(ground)


@attack
def a_dtype_of_eight_bits(ground: Ground) -> Path:
    """Claims a dtype that torch stores but does not compute with."""
    return _entry(lambda entry: setattr(entry.properties, "dtype", torch.bits8))(ground)


@attack
def a_dtype_of_two_numbers_in_a_byte(ground: Ground) -> Path:
    """Claims a dtype of which an element is two."""
    return _entry(lambda entry: setattr(entry.properties, "dtype", torch.float4_e2m1fn_x2))(ground)


@attack
def a_sparse_layout(ground: Ground) -> Path:
    """Claims that a dense tensor is sparse."""
    return _entry(lambda entry: setattr(entry.properties, "layout", torch.sparse_coo))(ground)


@attack
def a_tensor_that_is_an_object(ground: Ground) -> Path:
    """Says that an object's bytes are a tensor, and a tensor's an object."""

    def change(metadata: Any) -> None:
        stored = metadata.state_dict_metadata
        stored[KEY], stored["train.note"] = stored["train.note"], stored[KEY]

    return ground.checkpoint(change)


@attack
def every_tensor_in_the_same_bytes(ground: Ground) -> Path:
    """Lets all tensors share one blob."""

    def change(metadata: Any) -> None:
        one = next(info for index, info in metadata.storage_data.items() if index.fqn == KEY)
        metadata.storage_data = dict.fromkeys(metadata.storage_data, one)

    return ground.checkpoint(change)


@attack
def places_of_keys_that_are_not_there(ground: Ground) -> Path:
    """Tells where tensors are that the checkpoint does not have."""

    def change(metadata: Any) -> None:
        info = next(iter(metadata.storage_data.values()))
        metadata.storage_data |= {MetadataIndex(f"ghost.{i}", torch.Size((0,)), 0): info for i in range(1000)}

    return ground.checkpoint(change)


@attack
def keys_without_a_place(ground: Ground) -> Path:
    """Has tensors of which nothing says where they are."""
    return ground.checkpoint(lambda metadata: metadata.storage_data.clear())


@attack
def unknown_transforms(ground: Ground) -> Path:
    """Asks for a decompression that a torch extension would look up by its name."""

    def change(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            metadata.storage_data[index] = replace(info, transform_descriptors=["os.system", "../../evil"])

    return ground.checkpoint(change)


@attack
def decompression_bomb(ground: Ground) -> Path:
    """Stores a blob that torch's own extension would decompress to gigabytes."""
    import zstandard

    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(64 << 20))
    for _ in range(2):
        bomb = zstandard.ZstdCompressor(level=1).compress(bytes(4 << 20) + bomb)

    def change(metadata: Any) -> None:
        index = next(index for index in metadata.storage_data if index.fqn == "train.note")
        metadata.storage_data[index] = _StorageInfo("bomb.distcp", 0, len(bomb), ["zstd"])

    path = ground.checkpoint(change)
    (path / "bomb.distcp").write_bytes(bomb)
    return path


@attack
def paths_of_the_state_dict_that_are_another_checkpoints(ground: Ground) -> Path:
    """Flattens the state dict along other paths, with numbers and empty parts in them."""

    def change(metadata: Any) -> None:
        odd: list[Any] = [(), (0,), (-1,), (1 << 62,), ("__class__",), ("model", 10**9), (None,), "model"]
        metadata.planner_data = {key: odd[i % len(odd)] for i, key in enumerate(metadata.planner_data)}

    return ground.checkpoint(change)


@attack
def names_of_keys_that_contradict_their_paths(ground: Ground) -> Path:
    """Calls every key by the path of the next."""

    def change(metadata: Any) -> None:
        keys = list(metadata.planner_data)
        paths = list(metadata.planner_data.values())
        metadata.planner_data = dict(zip(keys, paths[1:] + paths[:1], strict=True))

    return ground.checkpoint(change)


# The record -------------------------------------------------------------------------------


def _record(change: Callable[[dict[str, Any]], Any]) -> Callable[[Ground], Path]:
    def changed(metadata: Any) -> None:
        made = change(metadata.tailor)
        if isinstance(made, tuple):
            metadata.tailor = made[0]

    return lambda ground: ground.checkpoint(changed)


def _each_unit(units: Any, change: Callable[[Any], Any]) -> Any:
    return [change(unit) for unit in units] if isinstance(units, list) else units


for _what, _change in {
    "record that is no dict": lambda r: (["tailor"],),
    "record of another format": lambda r: r.update(format=10**9),
    "record without anything": lambda r: r.clear(),
    "record of a negative format": lambda r: r.update(format=-1),
    "save id that is a path": lambda r: r.update(save_id="../../../outside"),
    "save id of a million characters": lambda r: r.update(save_id="a" * 1_000_000),
    "save id of control characters": lambda r: r.update(save_id="\x1b[2J\n"),
    "step of a thousand digits": lambda r: r.update(step=10**1000),
    "negative step": lambda r: r.update(step=-(10**30)),
    "step that is no number": lambda r: r.update(step=float("nan")),
    "index of 2 to the 200": lambda r: r.update(index=1 << 200),
    "time that is no number": lambda r: r.update(time=float("nan")),
    "time in the year one billion": lambda r: r.update(time=1e300),
    "infinite time": lambda r: r.update(time=float("inf")),
    "negative time": lambda r: r.update(time=-1e18),
    "policy of markup": lambda r: r.update(policy="<script>alert(1)</script>[red]x[/red]\x1b[31m"),
    "policy that nests": lambda r: r.update(policy="unchanged+" * 100_000 + "full"),
    "policy of alternatives": lambda r: r.update(policy="|".join(["parity"] * 100_000)),
    "policy of a huge number": lambda r: r.update(policy=f"parity:groups=1{'0' * 5000}"),
    "policy of a million groups": lambda r: r.update(policy="parity:groups=1000000000000"),
    "policy that is a path": lambda r: r.update(policy="/etc/passwd"),
    "carry by another way": lambda r: r.update(carry="exec"),
    "parent that is itself": lambda r: r.update(parent=[r["save_id"], 200, "step-200", 1]),
    "parent outside": lambda r: r.update(parent=["0" * 32, 100, "../../../outside", 0]),
    "parent that is absolute": lambda r: r.update(parent=["0" * 32, 100, "/etc", 0]),
    "parent of wrong types": lambda r: r.update(parent=[None, "x", 3, []]),
    "units that are a number": lambda r: r.update(units=5),
    "units without end": lambda r: r.update(units=[["layer", "weight", 0, ["k"]]] * 100_000),
    "ties of everything with itself": lambda r: r.update(ties=[[KEY, KEY, KEY]] * 1000),
    "ties of names that are not there": lambda r: r.update(ties=[["a", "b"], []]),
    "checksums of wrong types": lambda r: r.update(crcs={"f": "x", 3: {}}),
    "checksums of half a row": lambda r: r.update(crcs={"__0_0.distcp": b"12345"}),
    "fingerprints of wrong lengths": lambda r: r.update(fingerprints=dict.fromkeys([KEY], b"x")),
    "sketches of wrong lengths": lambda r: r.update(sketches=dict.fromkeys([KEY], b"\xff" * 33)),
    "marks of files outside": lambda r: r.update(marks={"../../../outside/secret.distcp": [10, 3]}),
    "narrowed to a name that is no dtype": lambda r: r.update(narrowed={KEY: "torch.load"}),
    "narrowed to a dtype of other size": lambda r: r.update(narrowed={KEY: "torch.complex128"}),
    "seconds that are infinite": lambda r: r.update(seconds=float("inf")),
}.items():
    attack.add(_what, f"Carries a {_what.removeprefix('record ')} in our own record." if "record" not in _what else
               f"Has a {_what}.", _record(_change))  # fmt: skip


@attack
def sketches_of_the_right_length_and_wild_numbers(ground: Ground) -> Path:
    """Puts numbers that are none into what drift is estimated from."""
    return _record(lambda r: r.update(sketches=dict.fromkeys([KEY], b"\x7f\xff" * 128)))(ground)


@attack
def two_checkpoints_that_are_each_others_parents(ground: Ground) -> Path:
    """Lets whoever follows the ancestors go round in circles."""
    path = ground.checkpoint()
    folders = {step: path.parent / f"step-{step}" for step in (100, 200)}
    held = {step: pickle.loads((folder / ".metadata").read_bytes()) for step, folder in folders.items()}
    for step, other in ((100, 200), (200, 100)):
        held[step].tailor["parent"] = [held[other].tailor["save_id"], other, f"step-{other}", 0]
        (folders[step] / ".metadata").write_bytes(pickle.dumps(held[step]))
    return path


@attack
def two_checkpoints_of_one_save_id(ground: Ground) -> Path:
    """Says that two folders are one save."""
    path = ground.checkpoint()
    (path.parent / "step-300").mkdir()
    for file in path.iterdir():
        if file.is_file():
            (path.parent / "step-300" / file.name).write_bytes(file.read_bytes())
    return path


@attack
def metadata_of_ten_thousand_layers(ground: Ground) -> Path:
    """Names so many layers that whatever is quadratic in them hangs."""

    def change(metadata: Any) -> None:
        del metadata.tailor
        entry = metadata.state_dict_metadata[KEY]
        info = next(info for index, info in metadata.storage_data.items() if index.fqn == KEY)
        for number in range(10_000):
            fqn = f"model.model.layers.{number}.w"
            metadata.state_dict_metadata[fqn] = entry
            metadata.planner_data[fqn] = ("model", f"model.layers.{number}.w")
            metadata.storage_data[MetadataIndex(fqn, torch.Size((0, 0)), 0)] = info

    return ground.checkpoint(change)
