"""Computed tensors: made once, read in windows by threads, and dropped."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.merging.value_tensors import Bench, Computed, Largest, Mean
from tailor_dcp.tensors import Given


class Maker:
    """Makes a tensor, counts how often, and knows whether any of its results still lives."""

    def __init__(self, count: int) -> None:
        self.count, self.made = count, 0
        self.results: list[weakref.ref[Any]] = []

    def __call__(self) -> torch.Tensor:
        self.made += 1
        array = np.arange(self.count, dtype=np.float32)  # the tensor's memory, which can be watched
        self.results.append(weakref.ref(array))
        return torch.from_numpy(array)

    @property
    def alive(self) -> int:
        return sum(result() is not None for result in self.results)


def computed(count: int, bench: Bench) -> tuple[Computed, Maker]:
    maker = Maker(count)
    return Computed(torch.Size([count]), torch.float32, maker, bench), maker


@given(st.integers(1, 50), st.integers(1, 50))
def test_windows_of_one_computation(count: int, window: int) -> None:
    """A tensor is made when it is first read, and dropped when its last element was read."""
    tensor, maker = computed(count, Bench())
    for turn in range(2):
        parts = [tensor.read(start, min(start + window, count)) for start in range(0, count, window)]
        assert torch.equal(torch.cat(parts), torch.arange(count, dtype=torch.float32))
        assert maker.made == turn + 1


def test_threads_wait_for_one_computation() -> None:
    """Windows that several threads read come of one computation."""
    tensor, maker = computed(1000, Bench())
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda start: tensor.read(start, start + 10), range(0, 1000, 10)))
    assert torch.equal(torch.cat(parts), torch.arange(1000, dtype=torch.float32))
    assert maker.made == 1


def test_few_results_are_held() -> None:
    """Tensors that were begun and left are let go, and made anew when somebody comes back to them."""
    bench = Bench()
    tensors = [computed(10, bench) for _ in range(9)]
    for tensor, _ in tensors:
        tensor.read(0, 5)
    assert 1 <= sum(maker.alive for _, maker in tensors) <= 4
    for tensor, _ in tensors:
        assert torch.equal(tensor.read(5, 10), torch.arange(5.0, 10.0))
    done, maker = computed(10, bench)
    done.read(0, 10)
    assert maker.alive == 0


def test_errors_reach_the_reader() -> None:
    """What goes wrong in a method is told to whoever reads."""

    def fail() -> torch.Tensor:
        raise ValueError("no mean")

    tensor = Computed(torch.Size([2]), torch.float32, fail, Bench())
    for _ in range(2):
        with pytest.raises(ValueError, match="no mean"):
            tensor.whole()


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_means_and_largest(dtype: torch.dtype) -> None:
    """Both are element by element, whatever the stretch."""
    values = [
        torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=dtype),
        torch.tensor([[5.0, 2.0], [-1.0, 0.0]], dtype=dtype),
    ]
    checks: list[tuple[Callable[..., Mean | Largest], torch.Tensor]] = [
        (lambda tensors: Mean(tensors, (0.25, 0.75)), (values[0] + 3 * values[1]) / 4),
        (Largest, torch.maximum(*values)),
    ]
    for make, want in checks:
        tensor = make([Given(value) for value in values])
        assert torch.equal(tensor.whole(), want.to(dtype))
        assert torch.equal(tensor.read(1, 3), want.to(dtype).reshape(-1)[1:3])
