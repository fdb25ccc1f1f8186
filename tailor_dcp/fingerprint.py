"""Fingerprints: a number for all the bits of a tensor, the same however the tensor is cut over ranks.

A fingerprint is a sum over the tensor's words (a word is an element, or half of a complex128) of

    W(block) * K(place in the block) * (the word's value)      modulo the prime P = 2**112 - 75

in the row-major order of the global tensor, in blocks of 8192 bytes. As it is a sum, every rank adds up
what it holds, and the parts are added; how the tensor was sharded leaves no trace. The exact definition
and what it can miss are in ``docs/fingerprints.md``; in short, for a change that does not depend on the keys:

- a single changed element is always seen (for complex128: a single changed real or imaginary part);
- any other change is missed with a probability of at most 2**-108, whichever bits it touches. Unlike
  sums modulo a power of two there are no weak bits: a sign is worth as much as the lowest bit.

The keys are constants, so that fingerprints of different runs, machines and versions can be compared. They
are no secret: this finds what training leaves alone, it is no defence against a forger.

It is fast because a key is kept as 16 digits of 7 bits: adding up a block is then a product of two int8
matrices, one pass over the data, and everything after that works on one row of 16 numbers per block.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from numpy.typing import NDArray

MODULUS = 2**112 - 75
BLOCK = 8192
"""Bytes that share one table of keys. Block sums stay below 2**26: 8192 bytes times 128 times a digit of 64."""

_DIGITS, _DIGIT = 16, 7
_WEIGHT_DIGITS, _WEIGHT_DIGIT = 8, 14
# Block sums times digits of weights, added up over this many rows, stay below 2**52, where doubles are exact.
_ROWS = 4096
_PIECE = 8 << 20  # bytes at a time: bounds the scratch of what is not contiguous
_PAYS = 300_000  # bytes that are read in the time that one more call for a few rows takes
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SEED = b"tailor_dcp fingerprint 1"


def fingerprint(shard: torch.Tensor, offsets: Sequence[int], size: Sequence[int]) -> int:
    """Return what one chunk adds to its tensor's fingerprint.

    Args:
        shard: the chunk's elements, of any dtype, on any device, with any strides.
        offsets: where the chunk starts in the whole tensor.
        size: the whole tensor's size.

    Returns:
        A number below ``MODULUS``. A chunk of zero bits adds 0.

    Raises:
        ValueError: the chunk does not fit in there.
    """
    shard = shard.detach().resolve_conj().resolve_neg()
    if not len(offsets) == len(size) == shard.dim() or any(
        start < 0 or start + length > whole for start, length, whole in zip(offsets, shard.shape, size, strict=True)
    ):
        raise ValueError(f"A chunk of {tuple(shard.shape)} at {tuple(offsets)} is no part of {tuple(size)}.")
    if not shard.numel():
        return 0
    if shard.device.type not in ("cpu", "cuda"):
        shard = shard.cpu()
    # As integers, which are copied bit by bit whatever the dtype.
    shard = shard.view(_INTEGERS.get(shard.element_size(), shard.dtype))
    return sum(_piece(piece, corner, size) for piece, corner in _pieces(shard, list(offsets))) % MODULUS


def combine(parts: Iterable[int]) -> int:
    """Return a tensor's fingerprint from those of its chunks, each element in exactly one of them."""
    return sum(parts) % MODULUS


# --- cutting a chunk into rows -----------------------------------------------------------------------------


def _pieces(shard: torch.Tensor, corner: list[int]) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Cut a chunk into boxes that are small enough to be copied."""
    bytes_ = shard.numel() * shard.element_size()
    if bytes_ <= _PIECE:
        yield shard, corner
        return
    dim = next(d for d, length in enumerate(shard.shape) if length > 1)
    step = max(1, shard.shape[dim] * _PIECE // bytes_)
    if shard.is_contiguous() and step > 1:
        # Cut where a block starts, if the outermost rows let us, so that no piece has odd ends.
        whole = BLOCK * shard.shape[dim] // math.gcd(BLOCK * shard.shape[dim], bytes_)
        step = step // whole * whole or step
    for start in range(0, shard.shape[dim], step):
        inner = corner.copy()
        inner[dim] += start
        yield from _pieces(shard.narrow(dim, start, min(step, shard.shape[dim] - start)), inner)


def _piece(piece: torch.Tensor, corner: Sequence[int], size: Sequence[int]) -> int:
    """Add up a box that fits in memory twice: as rows of bytes that follow each other in the whole tensor."""
    width = piece.element_size()
    word = min(width, 8)
    strides = [width * math.prod(size[dim + 1 :]) for dim in range(piece.dim())]
    split = piece.dim()
    while split and (split == piece.dim() or piece.shape[split] == size[split]):
        split -= 1  # dimensions after this one are whole, so rows run on through them
    rows = math.prod(piece.shape[:split])
    lead = next((dim for dim, length in enumerate(piece.shape) if length > 1), 0)
    places = min(rows, BLOCK // math.gcd(BLOCK, *strides[lead:split]))
    if places > 1 and piece.shape[lead] * strides[lead] <= places * _PAYS:
        return _among_zeros(piece, corner, size, lead)
    starts = np.array([sum(c * stride for c, stride in zip(corner, strides, strict=True))], np.int64)
    for length, stride in zip(piece.shape[:split], strides, strict=False):
        starts = (starts[:, None] + np.arange(length) * stride).reshape(-1)
    data = piece.contiguous().reshape(-1).view(torch.int8).reshape(rows, -1)
    if places == 1:
        return _rows(data, int(starts[0] % BLOCK), starts // BLOCK, word)
    found, group = np.unique(starts % BLOCK, return_inverse=True)
    order, ends = np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))
    total = 0
    for place, mine in zip(found, np.split(order, ends[:-1]), strict=True):
        chosen = data[torch.from_numpy(mine).to(data.device)]
        total += _rows(chosen, int(place), starts[mine] // BLOCK, word)
    return total


def _among_zeros(piece: torch.Tensor, corner: Sequence[int], size: Sequence[int], lead: int) -> int:
    """Add up a box by filling the gaps between its rows with zeros, which add nothing, and reading on through them."""
    length, wide = piece.shape[lead], size[lead + 1 :]
    if length > 1 and length * math.prod(wide) * piece.element_size() > 2 * _PIECE:
        half = length // 2
        lower = [c + half if dim == lead else c for dim, c in enumerate(corner)]
        upper_part, lower_part = piece.narrow(lead, 0, half), piece.narrow(lead, half, length - half)
        return _piece(upper_part, corner, size) + _piece(lower_part, lower, size)
    filled = torch.zeros([1] * lead + [length, *wide], dtype=piece.dtype, device=piece.device)
    box = [slice(None)] * (lead + 1) + [
        slice(c, c + n) for c, n in zip(corner[lead + 1 :], piece.shape[lead + 1 :], strict=True)
    ]
    filled[tuple(box)] = piece
    return _piece(filled, [*corner[: lead + 1], *[0] * len(wide)], size)


def _rows(data: torch.Tensor, place: int, blocks: NDArray[np.int64], word: int) -> int:
    """Add up rows of bytes that all start at one place of a block: a head, whole blocks, a tail."""
    length = data.shape[1]
    head = min(BLOCK - place, length) if place else 0
    count = (length - head) // BLOCK
    tail = head + count * BLOCK
    total = 0
    if head:
        total += _weighed(_sums(data[:, :head], place, word), blocks)
        blocks = blocks + 1
    if count:
        body = data[:, head:tail].reshape(-1, BLOCK)
        total += _weighed(_sums(body, 0, word), (blocks[:, None] + np.arange(count)).reshape(-1))
    if tail < length:
        total += _weighed(_sums(data[:, tail:], 0, word), blocks + count)
    return total


# --- arithmetic --------------------------------------------------------------------------------------------


def _sums(data: torch.Tensor, place: int, word: int) -> NDArray[np.int32]:
    """Return, for each row of bytes, the sum of bytes times keys, digit by digit of the keys."""
    if data.is_cuda:
        try:
            return _sums_on_gpu(data, place, word)
        except RuntimeError:  # no int8 products on this GPU, or no memory left for the scratch
            data = data.cpu()
    sums: NDArray[np.int32] = torch._int_mm(data, _keys(word, data.device)[place : place + data.shape[1]]).numpy()
    return sums


def _sums_on_gpu(data: torch.Tensor, place: int, word: int) -> NDArray[np.int32]:
    """Do the same within what cuBLAS allows: more than 16 rows, multiples of 8, aligned addresses."""
    rows, end = data.shape[0], place + data.shape[1]
    low, high = place // 16 * 16, -(-end // 16) * 16
    if (low, high) != (place, end) or rows < 32 or data.data_ptr() % 16 or data.stride(0) % 16:
        data = F.pad(data, (place - low, high - end, 0, max(0, 32 - rows))).clone()
    sums: NDArray[np.int32] = torch._int_mm(data, _keys(word, data.device)[low:high])[:rows].cpu().numpy()
    return sums


def _weighed(sums: NDArray[np.int32], blocks: NDArray[np.int64]) -> int:
    """Put the digits together and add up the blocks, each times its own weight."""
    total = 0
    for first in range(0, len(sums), _ROWS):
        chosen = slice(first, first + _ROWS)
        products = sums[chosen].T.astype(np.float64) @ _weights(blocks[chosen])
        total += sum(
            int(product) << (_DIGIT * i + _WEIGHT_DIGIT * j)
            for i, row in enumerate(products.tolist())
            for j, product in enumerate(row)
        )
    return total


def _weights(blocks: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the digits of each block's weight: odd and below 2**111, so never 0 modulo the prime."""
    digits = []
    for half in (0, 1):
        mixed = _mixed(2 * blocks.astype(np.uint64) + np.uint64(half))
        digits += [(mixed >> np.uint64(_WEIGHT_DIGIT * i)) & np.uint64(0x3FFF) for i in range(4)]
    digits[0] |= np.uint64(1)
    digits[-1] &= np.uint64(0x1FFF)
    return np.stack(digits, axis=1).astype(np.float64)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the outputs of the generator SplitMix64, by their index."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=16)
def _keys(word: int, device: torch.device) -> torch.Tensor:
    """Return the digits of what each byte of a block is multiplied with, words being ``word`` bytes.

    Digits run from -64 to 63. With 8 bits, int8 products on processors without VNNI would saturate.
    """
    stream = hashlib.shake_256(_SEED).digest(14 * BLOCK)
    lift = 64 * (2**112 - 1) // 127  # 64 in every digit
    lifted = bytearray()
    for place in range(0, BLOCK, word):
        key = int.from_bytes(stream[14 * place : 14 * place + 14], "little") % MODULUS or 1
        for _ in range(word):
            centred = key if key + lift < 2**112 else key - MODULUS
            lifted += (centred + lift).to_bytes(14, "little")
            key = key * 256 % MODULUS
    bits = np.unpackbits(np.frombuffer(lifted, np.uint8), bitorder="little").reshape(BLOCK, _DIGITS, _DIGIT)
    digits = (bits << np.arange(_DIGIT, dtype=np.uint8)).sum(axis=2).astype(np.int16) - 64
    # Digit by digit in memory, which is what the matrix product reads fastest.
    return torch.from_numpy(np.ascontiguousarray(digits.astype(np.int8).T)).to(device).T
