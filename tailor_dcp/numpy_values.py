"""NumPy's arrays and scalars in pickles, made without what numpy itself lets a pickle do.

To admit ``numpy.ndarray`` and ``numpy.dtype`` as they are is not safe: a pickle may then call
``ndarray((1,), dtype("O"), b"AAAAAAAA")``, whose element is whatever lies at that address, or give a dtype fields that
its memory does not have. Here the names stand for others, which do what numpy's own pickles ask for and nothing else.
"""

from __future__ import annotations

import re
from pickle import UnpicklingError
from typing import Any

import numpy as np

_CODE = re.compile(r"[?bBhHiIlLqQefdFDSU]\d{0,9}|[biuf][1248]|c8|c16")
_ORDERS = ("<", ">", "=", "|")


class Dtype:
    """A dtype, not made before it is known to be of numbers or text."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if type(code) is not str or not _CODE.fullmatch(code):
            raise UnpicklingError("a numpy dtype is of neither numbers nor text")
        self._code, self._order = code, "="

    def __setstate__(self, state: Any) -> None:
        """Take over the byte order, all that a dtype of numbers or text keeps besides its code."""
        plain = type(state) is tuple and len(state) >= 5 and state[2:5] == (None, None, None)
        if not plain or type(state[1]) is not str or state[1] not in _ORDERS:
            raise UnpicklingError("a numpy dtype has fields")
        self._order = state[1]

    @property
    def made(self) -> np.dtype[Any]:
        """The real one."""
        return np.dtype(self._code).newbyteorder(self._order)  # type: ignore[arg-type]


class Array(np.ndarray[Any, Any]):
    """An array that a pickle may fill, but not make."""

    def __new__(cls, *_: Any, **__: Any) -> Array:
        """Refuse: numpy's constructor takes any memory for any type."""
        raise UnpicklingError("a numpy array is made unusually")

    def __setstate__(self, state: Any) -> None:
        """Take over shape, dtype and bytes, which numpy compares with each other."""
        if type(state) is not tuple or len(state) != 5 or type(state[2]) is not Dtype or type(state[4]) is not bytes:
            raise UnpicklingError("a numpy array holds neither numbers nor text")
        _, shape, dtype, fortran, raw = state
        super().__setstate__((1, shape, dtype.made, fortran, raw))


def _reconstruct(kind: Any, shape: Any, code: Any) -> np.ndarray[Any, Any]:
    if kind is not Array or shape != (0,) or code not in (b"b", "b"):
        raise UnpicklingError("a numpy array is made unusually")
    return np.ndarray.__new__(Array, (0,), np.int8)


def _scalar(dtype: Any, raw: Any = b"") -> Any:
    if type(dtype) is not Dtype or type(raw) is not bytes:
        raise UnpicklingError("a numpy scalar is neither a number nor text")
    return np._core.multiarray.scalar(dtype.made, raw)  # type: ignore[attr-defined]


NAMES: tuple[tuple[Any, str], ...] = (
    (Array, "numpy.ndarray"),
    (Dtype, "numpy.dtype"),
    *((_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("_core", "core")),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
)
"""What to build for the names in numpy's pickles, those of numpy 1 included."""


def real(value: Any) -> Any:
    """Return numpy's own array or dtype in the place of one of this module; any other value itself."""
    if isinstance(value, Array):
        return np.array(value, subok=False)
    return value.made if isinstance(value, Dtype) else value
