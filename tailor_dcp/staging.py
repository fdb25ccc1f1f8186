"""Staging: memory that values pass through on their way to tensors that no file can be read into."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch

_ALIGNED = 64
_BUFFERS = 2
"""One is filled from files while a device still takes over what is in the other."""

_T = TypeVar("_T")


class Sent(Protocol):
    """A mark in a device's work: waiting for it waits for all copies before it."""

    def synchronize(self) -> None:
        """Wait until the device has come this far."""


Send = Callable[[Sequence[tuple[torch.Tensor, torch.Tensor]]], Sequence[Sent]]


def send(copies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Sequence[Sent]:
    """Copy each second tensor into the first; a device goes on copying by itself.

    Returns:
        What to wait for before the second tensors' memory is used again: one mark a device, none for the CPU, which
        has then done its copies.
    """
    for target, value in copies:
        target.copy_(value, non_blocking=True)
    return [_mark(device) for device in {target.device for target, _ in copies} if device.type != "cpu"]


def _mark(device: torch.device) -> Sent:
    module = torch.get_device_module(device)
    mark: Sent = module.Event()
    mark.record(module.current_stream(device))  # type: ignore[attr-defined]
    return mark


class Staging:
    """Two stretches of memory that are used in turn, pinned where a device copies from them.

    Use as a context: its end waits for the last copies, also after an error.

    Args:
        size: bytes of each; more if one value alone needs more.
        send: what starts the copies; see ``tailor_dcp.staging.send``.
    """

    def __init__(self, size: int, send: Send = send) -> None:
        self._size, self._send = size, send
        self._memory: list[torch.Tensor] = [torch.empty(0, dtype=torch.uint8)] * _BUFFERS
        self._under_way: list[Sequence[Sent]] = [()] * _BUFFERS
        self._turn = 0

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        for turn in range(_BUFFERS):
            self._wait(turn)

    def room(self, sizes: Sequence[int], devices: Iterable[torch.device]) -> list[torch.Tensor]:
        """Return memory for values of so many bytes that go to these devices, when nobody uses it any more."""
        self._turn = (self._turn + 1) % _BUFFERS
        self._wait(self._turn)
        needed = sum(map(_aligned, sizes))
        pinned = any(device.type == "cuda" for device in devices)
        memory = self._memory[self._turn]
        if memory.numel() < needed or (pinned and not memory.is_pinned()):
            # Twice the size would be held if the old memory lived on while the new is made.
            self._memory[self._turn] = torch.empty(0, dtype=torch.uint8)
            del memory
            memory = torch.empty(needed, dtype=torch.uint8, pin_memory=pinned)
            self._memory[self._turn] = memory
        return list(_cut(memory, sizes))

    def send(self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Start copies out of what ``room`` returned last: each second tensor into the first."""
        self._under_way[self._turn] = self._send(copies)

    def _wait(self, turn: int) -> None:
        for sent in self._under_way[turn]:
            sent.synchronize()
        self._under_way[turn] = ()


def batches(items: Iterable[_T], size: int, size_of: Callable[[_T], int]) -> Iterator[list[_T]]:
    """Yield as many items together as have ``size`` bytes, at least one."""
    batch: list[_T] = []
    held = 0
    for item in items:
        here = _aligned(size_of(item))
        if batch and held + here > size:
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += here
    if batch:
        yield batch


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _cut(memory: torch.Tensor, sizes: Sequence[int]) -> Iterator[torch.Tensor]:
    start = 0
    for size in sizes:
        yield memory[start : start + size]
        start += _aligned(size)
