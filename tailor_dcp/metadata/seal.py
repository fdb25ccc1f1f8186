"""The seal of a ``.metadata`` file: the checksum of its bytes, within the pickle that it is.

It stands before the last instruction as a value that is put on the stack and dropped again, so that every unpickler
reads past it. Whatever bit of the file changes, the seal does not fit any more.
"""

from __future__ import annotations

from typing import IO, Any

from tailor_dcp.crc import crc32

_HEAD = b"(C\x0bcrc-32:"  # MARK, a bytes object of eleven bytes
_TAIL = b"1."  # POP_MARK, STOP
LENGTH = len(_HEAD) + 4 + len(_TAIL)
"""Bytes of a seal, the last instruction included."""


class SealedStream:
    """Passes on what a pickler writes, all but its last instruction.

    Args:
        raw: the file.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._crc = raw, 0

    def write(self, data: Any) -> int:
        """Write some of the pickle."""
        self._crc = crc32(data, self._crc)
        self._raw.write(data)
        return len(data)

    def end(self) -> None:
        """Write the seal and the pickle's last instruction."""
        self.write(_HEAD)
        self._raw.write(self._crc.to_bytes(4, "little") + _TAIL)


def is_intact(data: bytes) -> bool | None:
    """Tell whether the bytes of a file are those that were sealed; None if it has no seal."""
    seal = memoryview(data)[-LENGTH:]
    if seal[: len(_HEAD)] != _HEAD or seal[-len(_TAIL) :] != _TAIL:
        return None
    told = int.from_bytes(seal[len(_HEAD) : -len(_TAIL)], "little")
    return crc32(memoryview(data)[: -4 - len(_TAIL)]) == told
