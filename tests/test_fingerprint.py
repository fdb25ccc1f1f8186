"""Fingerprints against their definition in docs/fingerprints.md, written down here once more in plain integers."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp import fingerprint as module
from tailor_dcp.fingerprint import MODULUS, combine, fingerprint

P = 2**112 - 75
STREAM = hashlib.shake_256(b"tailor_dcp fingerprint 1").digest(8192 * 14)
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.bool,
    torch.complex64,
    torch.complex128,
]
U64 = 2**64 - 1
PINNED = {
    "one": "f0cf2e340c101ba3598f2551263a",
    "floats": "1a56aa19ee2296f16bd092b92815",
    "longs": "46783d926aa757064c78f089a883",
    "bf16": "9485e88562bccbebd4ce657638d7",
}


def splitmix(index: int) -> int:
    x = (index + 1) * 0x9E3779B97F4A7C15 & U64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & U64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & U64
    return x ^ (x >> 31)


def key(place: int) -> int:
    return int.from_bytes(STREAM[14 * place : 14 * place + 14], "little") % P or 1


def weight(block: int) -> int:
    return splitmix(2 * block) & (2**56 - 1) | 1 | (splitmix(2 * block + 1) & (2**55 - 1)) << 56


def factor(byte: int) -> int:
    """What the word that starts at a byte of the whole tensor is multiplied with."""
    return weight(byte // 8192) * key(byte % 8192)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small products gain nothing from threads, and lose much where other work has the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_definition(tensor: torch.Tensor) -> int:
    """The fingerprint of a whole tensor, word by word."""
    width = min(tensor.element_size(), 8)
    raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""
    total = 0
    for at in range(0, len(raw), width):
        digits = [byte - 256 if byte > 127 else byte for byte in raw[at : at + width]]
        total += factor(at) * sum(digit * 256**i for i, digit in enumerate(digits))
    return total % P


def bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A tensor of random bits: NaNs with payloads, infinities, -0.0 and denormal numbers among them."""
    size = torch.empty((), dtype=dtype).element_size()
    draw = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (math.prod(shape) * size,), dtype=torch.uint8, generator=draw)
    return raw.view(dtype).reshape(shape)


def whole(tensor: torch.Tensor) -> int:
    return fingerprint(tensor, [0] * tensor.dim(), tensor.shape)


def boxes(tensor: torch.Tensor, draw: random.Random) -> list[tuple[torch.Tensor, list[int]]]:
    """Cut a tensor into boxes at random, along any dimension, boxes within boxes."""
    found, todo = [], [(tensor, [0] * tensor.dim())]
    while todo:
        box, corner = todo.pop()
        wide = [d for d, length in enumerate(box.shape) if length > 1]
        if not wide or draw.random() < 0.2:
            found.append((box, corner))
            continue
        dim = draw.choice(wide)
        at = draw.randrange(1, box.shape[dim])
        lower = [c + at if d == dim else c for d, c in enumerate(corner)]
        todo += [(box.narrow(dim, 0, at), corner), (box.narrow(dim, at, box.shape[dim] - at), lower)]
    return found


shapes = st.one_of(
    st.sampled_from([(), (1,), (0,), (3, 0), (8192,), (8193,), (64, 128), (3, 8192), (2, 4096, 3)]),
    st.lists(st.integers(1, 24), min_size=1, max_size=3).map(tuple),
    st.tuples(st.integers(1, 40), st.integers(1, 300)),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_what_the_definition_says(dtype: torch.dtype) -> None:
    for shape in [(), (5,), (37, 90), (3, 2, 1000)]:
        assert whole(bits(shape, dtype)) == by_definition(bits(shape, dtype))


def test_pinned_values() -> None:
    """They are kept in records: these numbers must never change."""
    assert whole(torch.zeros(3)) == 0
    assert f"{whole(torch.tensor(1.0)):x}" == PINNED["one"]
    assert f"{whole(torch.arange(10000, dtype=torch.float32).view(100, 100)):x}" == PINNED["floats"]
    assert f"{whole(torch.arange(10000, dtype=torch.int64)):x}" == PINNED["longs"]
    assert f"{whole(torch.arange(10000, dtype=torch.float32).bfloat16()):x}" == PINNED["bf16"]


@given(shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 10**6))
def test_any_cut_into_boxes_gives_the_same(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    tensor = bits(shape, dtype, seed)
    cut = boxes(tensor, random.Random(seed))
    assert combine(fingerprint(box, corner, shape) for box, corner in cut) == whole(tensor) == by_definition(tensor)


@pytest.mark.parametrize(
    ("shape", "columns"),
    [((300, 4096), 2048), ((60, 3003), 1001), ((3000, 3), 1), ((7, 50, 90), 30), ((3, 40, 2000), 999)],
)
@pytest.mark.parametrize("pays", [0, 1 << 60])
def test_narrow_columns(shape: tuple[int, ...], columns: int, pays: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows may be read group by group or with zeros between them: both give the same."""
    monkeypatch.setattr(module, "_PAYS", pays)
    monkeypatch.setattr(module, "_PIECE", 1 << 18)
    tensor = bits(shape, torch.float32)
    parts = []
    for start in range(0, shape[-1], columns):
        box = tensor.narrow(-1, start, min(columns, shape[-1] - start))
        parts.append(fingerprint(box, [0] * (len(shape) - 1) + [start], shape))
    assert combine(parts) == whole(tensor)


def test_more_rows_than_doubles_can_add_up() -> None:
    """Extreme bytes over many blocks: every intermediate sum stays exact."""
    worst = torch.full((8192 * 5000,), -128, dtype=torch.int8)
    block = sum(map(key, range(8192))) * -128
    assert whole(worst) == block * sum(map(weight, range(5000))) % P


def test_strides_do_not_matter() -> None:
    tensor = bits((61, 37, 20), torch.float32)
    for view in (
        tensor.permute(2, 0, 1),
        tensor[::3, :, 1::2],
        tensor[:, 0],
        tensor[0, 0, 0],
        tensor[:1].expand(9, 37, 20),
    ):
        assert whole(view) == whole(view.contiguous()) == by_definition(view)
    complex_ = bits((50, 3), torch.complex64)
    assert whole(complex_.conj()) == whole(complex_.conj().resolve_conj())


def test_the_bits_count_and_not_the_dtype() -> None:
    tensor = bits((50, 60), torch.float32)
    assert whole(tensor) == whole(tensor.view(torch.int32))
    assert whole(torch.tensor([0.0])) != whole(torch.tensor([-0.0]))
    nans = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert whole(nans[:1]) != whole(nans[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_flipped_bit_is_seen_wherever_it_is(dtype: torch.dtype) -> None:
    tensor = bits((11, 500), dtype)
    known, raw, draw = whole(tensor), tensor.view(torch.uint8), random.Random(0)
    seen = set()
    for _ in range(60):
        row, at = draw.randrange(raw.shape[0]), draw.randrange(raw.shape[1])
        bit = 1 if dtype == torch.bool else 1 << draw.randrange(8)
        raw[row, at] ^= bit
        seen.add(whole(tensor))
        raw[row, at] ^= bit
    assert whole(tensor) == known
    assert known not in seen
    assert len(seen) > 50


@given(data=st.data(), dtype=st.sampled_from(DTYPES[:-4]))
def test_two_swapped_elements_are_seen(data: st.DataObject, dtype: torch.dtype) -> None:
    tensor = bits((5000,), dtype, data.draw(st.integers(0, 99)))
    a, b = data.draw(st.integers(0, 4999)), data.draw(st.integers(0, 4999))
    swapped = tensor.clone()
    swapped[a], swapped[b] = tensor[b].clone(), tensor[a].clone()
    same = bytes(tensor.view(torch.uint8).tolist()) == bytes(swapped.view(torch.uint8).tolist())
    assert (whole(swapped) == whole(tensor)) == same


@given(
    places=st.sets(st.integers(0, 2**20 - 1), min_size=2, max_size=6),
    bit=st.sampled_from([0, 22, 31]),
)
def test_equal_changes_in_several_places_are_seen(places: set[int], bit: int) -> None:
    """Signs alone, lowest bits alone: a sum modulo 2**64 is blind to two flipped top bits."""
    total = sum(factor(4 * place) * (random.Random(place).choice([-1, 1]) << bit) for place in places)
    assert total % P


def test_blocks_are_told_apart() -> None:
    tensor = bits((6, 2048), torch.float32)
    assert len({whole(tensor.roll(i, 0)) for i in range(6)}) == 6


def test_no_key_is_zero_and_none_is_used_twice() -> None:
    keys = [key(place) for place in range(8192)]
    assert 0 not in keys
    assert len(set(keys)) == 8192
    assert MODULUS == P
    assert all(pow(a, P - 1, P) == 1 for a in (2, 3, 5, 7, 11))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="no part of"):
        fingerprint(torch.zeros(3), [2], [4])
    with pytest.raises(ValueError, match="no part of"):
        fingerprint(torch.zeros(3), [0, 0], [4, 4])


@given(rows=st.integers(1, 50), start=st.integers(0, 60), length=st.integers(1, 200), place=st.integers(0, 8192 - 200))
def test_what_is_padded_for_a_gpu_adds_nothing(rows: int, start: int, length: int, place: int) -> None:
    data = bits((rows, 300), torch.int8)[:, start : start + length]
    assert (module._sums_on_gpu(data, place, 4) == module._sums(data, place, 4)).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_gives_the_same(dtype: torch.dtype) -> None:
    for shape in [(), (5,), (37, 90), (3000, 1024), (1001, 77, 3)]:
        tensor = bits(shape, dtype)
        cut = boxes(tensor, random.Random(1))
        parts = [fingerprint(box.cuda(), corner, shape) for box, corner in cut]
        assert combine(parts) == whole(tensor) == whole(tensor.cuda())
