"""Sketches: the same samples however a tensor is cut, and an estimate that is as good as is said."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.sketch import FEWEST, MOST, ONE_IN, Taken, assemble, count, moved, pack, places, relative, take, unpack

shapes = st.lists(st.integers(1, 12), min_size=0, max_size=3).map(tuple)


def sketch(tensor: torch.Tensor, name: str = "w") -> np.ndarray:
    size = tuple(tensor.shape)
    return assemble(take({(name, (0,) * len(size)): (tensor, size)}).items(), {name: size})[name]


def boxes(
    tensor: torch.Tensor, draw: random.Random, offsets: tuple[int, ...]
) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """Cut a tensor into boxes, as shardings of any mesh and of other programs would."""
    dims = [d for d, length in enumerate(tensor.shape) if length > 1]
    if not dims or draw.random() < 0.3:
        return [(offsets, tensor)]
    dim = draw.choice(dims)
    at = draw.randint(1, tensor.shape[dim] - 1)
    later = tuple(o + at * (d == dim) for d, o in enumerate(offsets))
    low, high = tensor.narrow(dim, 0, at), tensor.narrow(dim, at, tensor.shape[dim] - at)
    return boxes(low, draw, offsets) + boxes(high, draw, later)


@given(shape=shapes, seed=st.integers(0, 999))
def test_how_a_tensor_is_cut_leaves_no_trace(shape, seed):
    """Also where the boxes are views with strides, and where several ranks hold one of them."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    draw = random.Random(seed)
    parts = boxes(tensor, draw, (0,) * len(shape))
    ranks = [take({("w", at): (box, shape)}) for at, box in [*parts, *parts[:1]]]
    found = assemble([item for rank in ranks for item in rank.items()], {"w": shape})
    assert np.array_equal(found["w"], sketch(tensor))


@given(numel=st.one_of(st.integers(0, 100), st.integers(1, 10**9)))
def test_places_are_few_distinct_and_spread_evenly(numel):
    found = places(numel)
    assert len(found) == count(numel) <= max(MOST, FEWEST)
    assert len(set(found.tolist())) == len(found)
    if numel:
        stretches = found * len(found) // numel
        assert (np.abs(stretches - np.arange(len(found))) <= 1).all()
        assert 0 <= found.min() <= found.max() < numel
    if numel >= FEWEST * ONE_IN:
        assert count(numel) <= numel / ONE_IN


@given(seed=st.integers(0, 10**6), size=st.sampled_from([1 << 17, 1 << 19, 1 << 21]), change=st.floats(1e-4, 10))
def test_the_estimate_is_as_good_as_its_samples_are_many(seed, size, change):
    """Five standard deviations: 1 / sqrt(2 n) for each of the two norms."""
    draw = torch.Generator().manual_seed(seed)
    before = torch.randn(size, generator=draw) * 0.02
    now = before + change * 0.02 * torch.randn(size, generator=draw)
    exact = ((now - before).norm() / before.norm()).item()
    estimate = relative([moved(sketch(before), sketch(now), size)])
    assert abs(estimate / exact - 1) < 5 / math.sqrt(count(size))


def test_a_layer_adds_up_its_tensors_by_their_sizes():
    """A large matrix that stood still outweighs a vector that moved far, though both have samples."""
    matrix, vector = torch.ones(512, 512), torch.ones(64)
    still = moved(sketch(matrix), sketch(matrix), matrix.numel())
    far = moved(sketch(vector), sketch(vector * 3), vector.numel())
    exact = math.sqrt(4 * 64 / (512 * 512 + 64))
    assert relative([still, far]) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
    ("before", "now", "drift"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [1.0, 0.0], math.inf),
        ([1.0, 1.0], [math.nan, 1.0], math.inf),
        ([math.nan, 1.0], [1.0, 1.0], math.inf),
        ([1.0, 1.0], [math.inf, 1.0], math.inf),
        ([3.0, 4.0], [3.0, 9.0], 1.0),
    ],
)
def test_zeros_and_what_is_no_number(before, now, drift):
    values = [torch.tensor(v) for v in (before, now)]
    assert relative([moved(sketch(values[0]), sketch(values[1]), 2)]) == drift


def test_what_is_missing_or_torn_has_no_sketch():
    whole = take({("w", (0,)): (torch.arange(40.0), (80,))})
    assert assemble(whole.items(), {"w": (80,)}) == {}
    one = {("w", (0,)): Taken(np.arange(4), np.arange(4, dtype=np.float32))}
    other = {("w", (0,)): Taken(np.arange(4), np.arange(4, dtype=np.float32) + 1)}
    assert set(assemble([*one.items(), *one.items()], {"w": (4,)})) == {"w"}
    assert assemble([*one.items(), *other.items()], {"w": (4,)}) == {}


@given(st.lists(st.floats(width=32), max_size=20))
def test_packing_keeps_every_bit(values):
    samples = np.array(values, np.float32)
    assert unpack(pack(samples)).tobytes() == samples.tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    tensor = torch.randn(100, 7).to(dtype)
    assert np.array_equal(sketch(tensor), sketch(tensor.float()))


def test_a_large_model_keeps_within_a_thousandth_of_its_weights():
    """Llama-3-8B's shapes, and the 1.7 million parameters of the demo: sketches of weights and both moments."""
    from benchmarks.harness import LLAMA_8B, llama_shapes

    for shapes in (LLAMA_8B, llama_shapes(8, 128, 256, wide=341)):
        numels = [math.prod(shape) for shape in shapes.values()]
        assert 3 * sum(map(count, numels)) <= 0.001 * sum(numels)
