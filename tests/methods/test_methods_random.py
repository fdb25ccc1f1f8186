"""The methods that draw: by statistics over seeds, beside mergekit's and beside what their papers say."""

from __future__ import annotations

import pytest
import torch
from method_runs import STOCHASTIC, ours, theirs

# As a merge has them: hashes, not neighbours.
SEEDS = [index * 0x9E3779B97F4A7C15 % 2**63 for index in range(1, 301)]
EACH = [{}, {"weight": 0.6, "density": 0.4}, {"weight": 0.4, "density": 0.7}]


def _models(shape=(24, 30), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def _moments(results):
    stacked = torch.stack([result.float() for result in results])
    return stacked.mean(dim=0), stacked.var(dim=0)


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("once", [{}, {"rescale": False, "normalize": False}, {"normalize": True, "lambda": 0.5}])
@pytest.mark.parametrize("shape", [(24, 30), (400,), (6, 10, 7)])
def test_mean_and_variance_are_mergekits(name, once, shape):
    models = _models(shape)
    torch.manual_seed(11)
    mean, variance = _moments([ours(name, models, 0, EACH, once, seed) for seed in SEEDS])
    their_mean, their_variance = _moments([theirs(name, models, 0, EACH, once) for _ in SEEDS])
    # Differences in standard errors: normally distributed.
    errors = (mean - their_mean) / ((variance + their_variance) / len(SEEDS)).sqrt().clamp(min=1e-6)
    assert errors.abs().max() < 5
    assert 0.85 < errors.std() < 1.15
    assert errors.mean().abs() < 0.2
    torch.testing.assert_close(variance.mean(), their_variance.mean(), rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_the_share_and_the_expectation(density):
    base, other, _ = _models((40, 50))
    each = [{}, {"weight": 1.0, "density": density}]
    results = [ours("dare_linear", [base, other], 0, each, seed=seed) for seed in SEEDS[:200]]
    kept = torch.stack([(result != base).float().mean() for result in results])
    assert abs(float(kept.mean()) - density) < 4 * (density * (1 - density) / 2000 / 200) ** 0.5
    mean, variance = _moments(results)
    errors = (mean - other) / (variance / 200).sqrt()
    assert errors.mean().abs() < 0.1
    assert abs(float(errors.std()) - 1) < 0.1
    # What is left has the length in the l1 norm that there was.
    for result in results[:5]:
        torch.testing.assert_close((result - base).abs().sum(), (other - base).abs().sum(), rtol=1e-4, atol=0)


def test_della_keeps_large_elements_more_often():
    base, other, _ = _models((20, 100))
    each = [{}, {"weight": 1.0, "density": 0.5, "epsilon": 0.3}]
    once = {"rescale": False, "normalize": False}
    kept = torch.stack([ours("della_linear", [base, other], 0, each, once, seed) != base for seed in SEEDS])
    chance = kept.float().mean(dim=0).gather(1, (other - base).abs().argsort(dim=1)).mean(dim=0)
    torch.testing.assert_close(chance, torch.linspace(0.2, 0.8, 100), rtol=0, atol=4 * 0.5 / (20 * len(SEEDS)) ** 0.5)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_seeds(name):
    models = _models()
    torch.manual_seed(1)
    first = ours(name, models, 0, EACH, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(ours(name, models, 0, EACH, seed=5), first)
    assert torch.equal(torch.get_rng_state(), state), "the process's own generator is not ours to use"
    assert not torch.equal(ours(name, models, 0, EACH, seed=6), first)
    # Models must not lose the same elements.
    base, other, _ = models
    same = [{}, {"weight": 1.0, "density": 0.5}, {"weight": 1.0, "density": 0.5}]
    result = ours(name, [base, other, other], 0, same, {"rescale": False, "normalize": False})
    double = (result - base) / (other - base)
    assert {0, 1, 2} == set(double.round().int().flatten().tolist())


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_mask(name, threads):
    models = _models((300, 400))
    before = torch.get_num_threads()
    first = ours(name, models, 0, EACH, {"rescale": False}, seed=5)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(ours(name, models, 0, EACH, {"rescale": False}, seed=5), first)
    finally:
        torch.set_num_threads(before)
