"""CRC-32 of what is written, without reading the bytes a second time.

``torch.save`` computes the CRC of the tensor's bytes for the zip archive that it writes. The
CRC of the whole blob follows from it by arithmetic, so checksums cost next to nothing.
"""

from __future__ import annotations

import io
from collections import defaultdict, deque
from typing import IO, Any, NamedTuple

from torch.serialization import get_crc32_options

from tailor_dcp.zip_directory import entries

try:  # several times as fast as zlib's; the extra `fast`
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

_POLYNOMIAL = 0xEDB88320
_LARGE = 1 << 16  # below this, computing is cheaper than looking up


def _multiply(a: int, b: int) -> int:
    """Multiply two polynomials modulo the CRC's, bits reversed as CRC-32 has them."""
    product, bit = 0, 1 << 31
    while True:
        if a & bit:
            product ^= b
            if not a & (bit - 1):
                return product
        bit >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1


def _powers() -> list[int]:
    """Return x**(2**k) for k from 0 to 31; from there on they repeat."""
    powers = [1 << 30]
    for _ in range(31):
        powers.append(_multiply(powers[-1], powers[-1]))
    return powers


_POWERS = _powers()


def combine(first: int, second: int, length: int) -> int:
    """Return the CRC of two stretches of bytes from the CRC of each.

    Args:
        first: CRC of the first stretch.
        second: CRC of the second.
        length: bytes in the second.
    """
    shift, k = 1 << 31, 3  # a byte is eight bits
    while length:
        if length & 1:
            shift = _multiply(_POWERS[k & 31], shift)
        length >>= 1
        k += 1
    return (_multiply(shift, first) if first else 0) ^ second


class _Checked(NamedTuple):
    """A large piece whose checksum had to be computed at once."""

    size: int
    crc: int


_Piece = bytes | memoryview | _Checked


class ChecksumStream(io.RawIOBase):
    """Passes bytes on to a file and notes the CRC of each blob that DCP's writer puts there.

    DCP flushes the stream after each blob; that is where one ends. ``blobs`` maps the offset
    of each to its CRC.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        super().__init__()
        self._raw = raw
        self._start = 0
        self._pieces: list[_Piece] = []
        self.blobs: dict[int, int] = {}

    def writable(self) -> bool:
        """Say that this stream can be written."""
        return True

    def write(self, data: Any) -> int:
        """Write all of ``data``."""
        view = memoryview(data).cast("B")
        if len(view) >= _LARGE:
            # The view is the tensor itself, which outlives its blob: no copy is made of it. Where torch computes
            # no CRC of it this is the time to do so, as what else is pickled may not live as long.
            self._pieces.append(view if get_crc32_options() else _Checked(len(view), crc32(view)))
        elif view:
            self._pieces.append(bytes(view))
        self._raw.write(view)
        return len(view)

    def tell(self) -> int:
        """Return the position in the file."""
        return self._raw.tell()

    def fileno(self) -> int:
        """Return the file's descriptor."""
        return self._raw.fileno()

    def flush(self) -> None:
        """End a blob."""
        if self._pieces:
            self.blobs[self._start] = _crc_of(self._pieces)
            self._start += sum(map(_size, self._pieces))
            self._pieces = []
        if not self._raw.closed:
            self._raw.flush()


def _size(piece: _Piece) -> int:
    return piece.size if isinstance(piece, _Checked) else len(piece)


def _crc_of(pieces: list[_Piece]) -> int:
    known = _known(pieces)
    crc = 0
    for piece in pieces:
        if isinstance(piece, _Checked):
            crc = combine(crc, piece.crc, piece.size)
        elif isinstance(piece, memoryview) and known[len(piece)]:
            crc = combine(crc, known[len(piece)].popleft(), len(piece))
        else:
            crc = crc32(piece, crc)
    return crc


def _known(pieces: list[_Piece]) -> dict[int, deque[int]]:
    """Return the CRCs that ``torch.save`` computed of the large pieces, by size and in order."""
    known: defaultdict[int, deque[int]] = defaultdict(deque)
    sizes = [len(piece) for piece in pieces if isinstance(piece, memoryview)]
    if sizes:
        for entry in entries(b"".join(p for p in pieces if isinstance(p, bytes))):
            if _LARGE <= entry.size < 0xFFFFFFFF:
                known[entry.size].append(entry.crc)
    for size in known:
        if sizes.count(size) != len(known[size]):  # a record in several pieces: no telling which is which
            known[size].clear()
    return known
