"""Ranks that do one piece of work together, and succeed or fail together."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

from tailor_dcp.errors import TailorError

_T = TypeVar("_T")


class RankLostError(TailorError):
    """A rank that takes part is gone, or another does not answer."""


class OtherRankError(TailorError):
    """Another rank failed otherwise than by an error of this package's."""


class Ranks:
    """The processes that take part; one alone where ``torch.distributed`` is not initialised.

    Args:
        group: the processes; None for all.
        alone: this process works by itself, whatever there is.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, alone: bool = False) -> None:
        several = not alone and dist.is_available() and dist.is_initialized()
        self._group = group
        self.rank = dist.get_rank(group) if several else 0
        self.count = dist.get_world_size(group) if several else 1

    def first(self, do: Callable[[], _T]) -> _T:
        """Do something on the first rank and give all what came of it.

        Raises:
            Exception: what it raised; on the other ranks too.
            RankLostError: a rank is gone.
        """
        return self.each(do if self.rank == 0 else _nothing)[0]  # type: ignore[return-value]

    def each(self, do: Callable[[], _T]) -> list[_T]:
        """Do something on every rank and give all what came of each.

        Raises:
            Exception: what the first of those that failed raised; on all ranks.
            RankLostError: a rank is gone.
        """
        result: _T | None = None
        problem: Exception | None = None
        try:
            result = do()
        except Exception as error:  # whatever it is, the others wait to hear of it
            if self.count == 1:
                raise
            problem = error
        if self.count == 1:
            return [cast(_T, result)]
        told = self._exchanged((result, None if problem is None else _sendable(problem)))
        failed = next((error for _, error in told if error is not None), None)
        if failed is not None:
            raise failed from problem
        return [cast(_T, one) for one, _ in told]

    def _exchanged(self, mine: tuple[_T | None, Exception | None]) -> list[tuple[_T | None, Exception | None]]:
        told: list[tuple[_T | None, Exception | None]] = [(None, None)] * self.count
        try:
            dist.all_gather_object(told, mine, group=self._group)
        except RuntimeError as error:
            raise RankLostError(
                f"Another of the {self.count} ranks was lost, so that this one stopped too; see what it said, and "
                f"start all of them again."
            ) from error
        return told


def _nothing() -> None:
    """Wait for the first rank."""


def _sendable(error: Exception) -> Exception:
    """Return an error that can be sent to other ranks."""
    if isinstance(error, TailorError):
        try:
            pickle.dumps(error)
        except Exception:  # what it holds besides its sentence can be anything
            return OtherRankError(str(error))
        return error
    return OtherRankError(f"A rank failed: {type(error).__name__}: {error}")
