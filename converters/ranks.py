"""Sharing the work: under torchrun every rank does a part of a conversion, alone it does all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch.distributed as dist

from tailor_dcp import rank_state

T = TypeVar("T")


_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and other launchers tell each process."""


def rank() -> int:
    """Return this process's rank, 0 alone."""
    return rank_state.rank_of()


def world() -> int:
    """Return the number of ranks, 1 alone."""
    return rank_state.world_size()


def start() -> bool:
    """Join the other ranks if a launcher such as torchrun started this process; tell whether it did."""
    if not all(name in os.environ for name in _LAUNCHED) or dist.is_initialized():
        return False
    dist.init_process_group("gloo")
    return True


def gather(value: T) -> list[T]:
    """Return every rank's value, on every rank."""
    return rank_state.gather(value)


def together(work: Callable[[], T]) -> T:
    """Do a part of the work on every rank; if it fails on one, it fails on all.

    Raises:
        BaseException: what the first failing rank raised, on every rank.
    """
    failure: BaseException | None = None
    result = None
    try:
        result = work()
    except BaseException as error:
        if world() == 1:
            raise
        failure = error
    failures = [error for error in gather(_portable(failure)) if error is not None]
    if failure is not None:
        raise failure
    if failures:
        raise failures[0]
    return result  # type: ignore[return-value]


def _portable(error: BaseException | None) -> BaseException | None:
    """Return an error without what cannot be sent, such as the traceback's frames."""
    if error is None or isinstance(error, Exception):
        return error
    return RuntimeError(f"another rank was stopped by {type(error).__name__}")


def share(items: Iterable[T], weight: Callable[[T], int], size: int | None = None) -> list[list[T]]:
    """Deal items to ranks so that all have about as much to do; every rank computes the same.

    Args:
        items: what is to be dealt, in an order that all ranks agree on.
        weight: how much work each is.
        size: how many shares; as many as there are ranks by default.
    """
    shares: list[list[T]] = [[] for _ in range(size or world())]
    loads = [0] * len(shares)
    for item in sorted(items, key=weight, reverse=True):
        least = loads.index(min(loads))
        shares[least].append(item)
        loads[least] += weight(item)
    return shares
