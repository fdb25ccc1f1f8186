"""Our own parser of safetensors, held against the library, and a gallery of attacks on the format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from tailor_dcp.converters.filling import fill, make_file, whole
from tailor_dcp.converters.safetensors_file import layout_of, open_safetensors, shards_of
from tailor_dcp.errors import ConversionError, DamagedSourceError
from tailor_dcp.tensors import Given, Zeros

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.uint16, torch.uint64,
)  # fmt: skip
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8).filter(lambda n: n != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=3)


def tensor_of(dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return torch.randint(0, 2, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype).reshape(shape)


TENSORS = st.dictionaries(NAMES, st.builds(tensor_of, st.sampled_from(DTYPES), SHAPES), max_size=6)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


@given(TENSORS)
def test_what_the_library_writes_is_read(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Any]) -> None:
    """Every dtype, shape and name, bit for bit."""
    path = tmp_path_factory.mktemp("st") / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    opened = open_safetensors(path)
    assert opened.metadata == {"format": "pt"}
    assert opened.tensors.keys() == tensors.keys()
    assert all(same(opened.tensors[name].whole(), tensor) for name, tensor in tensors.items())


@given(TENSORS)
def test_what_we_write_is_what_the_library_writes(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Any]
) -> None:
    """The whole file is the same, byte for byte."""
    folder = tmp_path_factory.mktemp("st")
    save_file(tensors, folder / "theirs", metadata={"format": "pt"})
    layout = layout_of({name: Given(tensor) for name, tensor in tensors.items()}, {"format": "pt"})
    make_file(folder / "ours", layout.size, [(0, layout.header)])
    fill([whole(folder / "ours", layout.places[n], Given(t)) for n, t in tensors.items()], lambda _: None)
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()


def test_the_place_of_every_tensor_is_in_its_file(tmp_path: Path) -> None:
    """Opening reads the header only: it works on a file whose data is not there but for its size."""
    layout = layout_of({"huge": Zeros(torch.Size([1 << 20, 1 << 12]), torch.bfloat16)}, {})
    make_file(tmp_path / "sparse", layout.size, [(0, layout.header)])
    huge = open_safetensors(tmp_path / "sparse").tensors["huge"]
    assert huge.bytes == 8 << 30
    assert huge.read(0, 4).tolist() == [0, 0, 0, 0]


def written(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape: Any, start: Any, stop: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


ATTACKS: dict[str, tuple[Any, bytes]] = {
    "out of range": ({"a": entry([2], 0, 8)}, bytes(4)),
    "far out of range": ({"a": entry([1 << 40], 0, 1 << 42)}, bytes(4)),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "the same bytes twice": ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)),
    "gap at the start": ({"a": entry([1], 4, 8)}, bytes(8)),
    "gap inside": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "bytes left over": ({"a": entry([1], 0, 4)}, bytes(8)),
    "backwards": ({"a": entry([1], 4, 0)}, bytes(4)),
    "negative offsets": ({"a": entry([1], -4, 0)}, bytes(4)),
    "negative shape": ({"a": entry([-1, -1], 0, 4)}, bytes(4)),
    "shape and offsets disagree": ({"a": entry([3], 0, 8)}, bytes(8)),
    "product that overflows to zero": ({"a": entry([1 << 32, 1 << 32, 0], 0, 0)}, b""),
    "true as a number": ({"a": entry([True], 0, 4)}, bytes(4)),
    "fraction as a number": ({"a": entry([1.0], 0, 4)}, bytes(4)),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, bytes(4)),
    "unknown field": ({"a": entry([1], 0, 4) | {"path": "/etc/passwd"}}, bytes(4)),
    "missing field": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "metadata that are no texts": ({"__metadata__": {"a": 1}}, b""),
    "metadata that are no table": ({"__metadata__": []}, b""),
    "a list": ([1, 2], b""),
    "no JSON": (b"{'a': 1}", b""),
    "space before it": (b' {"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "no UTF-8": (b'{"\xff": 1}', b""),
    "not a number": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
    "a number of many digits": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', bytes(4)),
    "nested without end": (b"[" * 100_000, b""),
    "a name twice": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_header_is_refused(tmp_path: Path, name: str) -> None:
    """Each with one sentence that names the file."""
    path = written(tmp_path / "evil.safetensors", *ATTACKS[name])
    with pytest.raises(DamagedSourceError, match=r"evil\.safetensors"):
        open_safetensors(path)


@given(st.lists(st.tuples(st.integers(0, 160), st.integers(0, 255)), min_size=1, max_size=3))
def test_what_the_library_refuses_is_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    """Bytes are changed anywhere in a file; nothing but our own errors comes of it."""
    path = tmp_path_factory.mktemp("st") / "changed"
    save_file({"a": torch.ones(2), "b": torch.ones(3, dtype=torch.bfloat16)}, path)
    data = bytearray(path.read_bytes())
    for place, value in changes:
        data[place % len(data)] = value
    path.write_bytes(data)
    try:
        with safe_open(path, "pt") as opened:
            theirs = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError:
        with pytest.raises(ConversionError):
            open_safetensors(path)
        return
    try:
        ours = open_safetensors(path).tensors
    except ConversionError:
        return  # a dtype that torch has not, metadata that are not metadata: stricter is right
    assert ours.keys() == theirs.keys()
    assert all(same(ours[name].whole(), tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("length", [0, 1, 1000, 1 << 40, (1 << 64) - 1])
def test_a_length_that_is_not_the_headers_is_refused(tmp_path: Path, length: int) -> None:
    """Nothing is allocated for it either."""
    path = written(tmp_path / "evil.safetensors", {"a": entry([1], 0, 4)}, bytes(4), length)
    with pytest.raises(DamagedSourceError):
        open_safetensors(path)


@pytest.mark.parametrize("size", [0, 3, 8, 40])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, size: int) -> None:
    """In its length, its header or its data."""
    save_file({"a": torch.ones(4)}, tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:size])
    with pytest.raises(DamagedSourceError, match="cut"):
        open_safetensors(tmp_path / "cut")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-1])
    with pytest.raises(DamagedSourceError, match="cut"):
        open_safetensors(tmp_path / "cut")


def test_a_dtype_that_torch_has_not_is_named(tmp_path: Path) -> None:
    """It is not damage."""
    path = written(tmp_path / "model.safetensors", {"a": entry([2], 0, 1, "F4")}, bytes(1))
    with pytest.raises(ConversionError, match="a as F4"):
        open_safetensors(path)


def test_a_dtype_that_the_format_has_not_is_named() -> None:
    """Before anything is written."""
    with pytest.raises(ConversionError, match=r"a is of torch\.complex128"):
        layout_of({"a": Zeros(torch.Size([1]), torch.complex128)}, {})


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 120))
def test_shards_are_those_of_the_hub_library(counts: list[int], most: int) -> None:
    """The same tensors in the same files."""
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = {f"t{n}": torch.zeros(count, dtype=torch.uint8) for n, count in enumerate(counts)}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    theirs = split_torch_state_dict_into_shards(tensors, max_shard_size=most).filename_to_tensors
    ours = shards_of({name: Given(tensor) for name, tensor in tensors.items()}, most)
    assert [list(shard) for shard in ours if shard] == [names for names in theirs.values() if names]


def test_a_file_with_nothing_in_it(tmp_path: Path) -> None:
    """Is a file like any other."""
    save_file({}, tmp_path / "empty")
    assert not open_safetensors(tmp_path / "empty").tensors
    assert not load_file(tmp_path / "empty")
