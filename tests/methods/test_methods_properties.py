"""What merging means, whoever computes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_runs import STOCHASTIC, ours, settings_each, sizes

from tailor_dcp.methods import method_named, method_names

SEEDS = st.integers(0, 2**32)
SHAPES = st.sampled_from([(), (1,), (5,), (3, 4), (4, 1), (2, 3, 4)])
WEIGHTS = st.floats(0.1, 2.0)
EVERYTHING = method_names()


def _tensors(seed, shape, count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def _each(name, count):
    return next(settings_each(name, count))


def _once(name):
    return {"t": 0.4} if name in ("slerp", "nearswap") else {}


def _near(got, want, part=1e-5):
    scale = max(float(want.abs().max()), 1e-6)
    torch.testing.assert_close(got, want, rtol=0, atol=part * scale)


@pytest.mark.parametrize("name", EVERYTHING)
@given(seed=SEEDS, shape=SHAPES)
def test_identical_models_give_the_model_back(name, seed, shape):
    (model,) = _tensors(seed, shape, 1)
    for count, base in sizes(name):
        got = ours(name, [model.clone() for _ in range(count)], base, _each(name, count), _once(name))
        _near(got, model)
        if base is not None and name not in ("linear", "karcher", "slerp", "passthrough"):
            assert torch.equal(got, model), "what no model changed stays, to the bit"


@given(seed=SEEDS, shape=SHAPES, weights=st.lists(WEIGHTS, min_size=1, max_size=4), data=st.data())
def test_linear_knows_no_order(seed, shape, weights, data):
    order = data.draw(st.permutations(range(len(weights))))
    tensors = _tensors(seed, shape, len(weights))
    each = [{"weight": weight} for weight in weights]
    got = ours("linear", [tensors[i] for i in order], None, [each[i] for i in order])
    _near(got, ours("linear", tensors, None, each))


@given(seed=SEEDS, shape=SHAPES, weights=st.lists(WEIGHTS, min_size=1, max_size=4), scale=WEIGHTS)
def test_linear_is_affine(seed, shape, weights, scale):
    *tensors, shift = _tensors(seed, shape, len(weights) + 1)
    each = [{"weight": weight} for weight in weights]
    got = ours("linear", [scale * tensor + shift for tensor in tensors], None, each)
    torch.testing.assert_close(got, scale * ours("linear", tensors, None, each) + shift, rtol=1e-5, atol=1e-5)


@given(seed=SEEDS, shape=SHAPES, base=st.integers(0, 1))
def test_slerp_goes_from_the_base_to_the_other(seed, shape, base):
    tensors = _tensors(seed, shape, 2)
    assert torch.equal(ours("slerp", tensors, base, once={"t": 0}), tensors[base])
    assert torch.equal(ours("slerp", tensors, base, once={"t": 1}), tensors[1 - base])


@given(seed=SEEDS, t=st.floats(0, 1))
def test_arcs_keep_the_length(seed, t):
    first, second = (tensor / tensor.norm() for tensor in _tensors(seed, (6, 7), 2))
    arc = ours("slerp", [first, second], 0, once={"t": t})
    torch.testing.assert_close(arc.norm(), torch.tensor(1.0))
    angle = torch.arccos((first * second).sum())
    torch.testing.assert_close(torch.arccos((first * arc).sum().clamp(max=1)), t * angle, rtol=0, atol=2e-3)
    each = [{"weight": 1 - t}, {"weight": t}]
    _near(ours("nuslerp", [first, second], None, each), arc)


@given(seed=SEEDS, shape=SHAPES)
def test_means_of_two_on_a_sphere_are_the_middle_of_the_arc(seed, shape):
    first, second = _tensors(seed, (5, 6), 2)
    second *= first.norm() / second.norm()
    middle = ours("slerp", [first, second], 0, once={"t": 0.5})
    _near(ours("karcher", [first, second]), middle)
    _near(ours("multislerp", [first, second], None, [{"weight": 1.0}] * 2), middle)


@given(seed=SEEDS)
def test_karcher_means_have_no_pull(seed):
    """The directions to all models, as long as their angles, cancel out at the mean: its definition."""
    units = [t / t.norm() for t in _tensors(seed, (40,), 4, torch.float64)]
    mean = ours("karcher", units, once={"max_iter": 200, "tol": 1e-12})
    mean = mean / mean.norm()
    pull = torch.zeros_like(mean)
    for unit in units:
        cosine = (unit * mean).sum()
        across = unit - cosine * mean
        pull += across / across.norm() * torch.arccos(cosine)
    assert pull.norm() < 1e-6


@given(seed=SEEDS, shape=SHAPES, weight=st.floats(-2, 2), scale=WEIGHTS)
@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties", "dare_ties", "dare_linear", "della"])
def test_one_whole_task_vector_is_task_arithmetic(name, seed, shape, weight, scale):
    tensors = _tensors(seed, shape, 2)
    each = [{}, {"weight": weight, "density": 1.0}]
    once = {"normalize": False, "lambda": scale}
    _near(ours(name, tensors, 0, each, once), ours("task_arithmetic", tensors, 0, each, once))


@given(seed=SEEDS, shape=SHAPES, weight=WEIGHTS)
def test_task_arithmetic_is_what_its_formula_says(seed, shape, weight):
    base, *others = _tensors(seed, shape, 3, torch.float64)
    each = [{}, {"weight": weight}, {"weight": 0.5}]
    want = base + 0.3 * (weight * (others[0] - base) + 0.5 * (others[1] - base))
    _near(ours("task_arithmetic", [base, *others], 0, each, {"lambda": 0.3}), want, 1e-12)


@given(seed=SEEDS, density=st.floats(0.01, 0.99))
def test_ties_changes_the_largest_elements_only(seed, density):
    base, other = _tensors(seed, (8, 9), 2)
    got = ours("ties", [base, other], 0, [{}, {"weight": 1.0, "density": density}])
    changed = (other - base).abs()[got != base]
    assert len(changed) == max(1, int(density * 72))
    assert torch.equal(changed.sort().values, (other - base).abs().flatten().sort().values[-len(changed) :])


@given(seed=SEEDS, density=st.floats(0, 0.99), gamma=st.floats(0, 0.9))
def test_breadcrumbs_lie_in_the_middle(seed, density, gamma):
    base, other = _tensors(seed, (8, 9), 2)
    each = [{}, {"weight": 1.0, "density": density, "gamma": gamma}]
    got = ours("breadcrumbs", [base, other], 0, each)
    sizes = (other - base).abs()
    kept, dropped = sizes[got != base], sizes[got == base]
    assert len(kept) == int(density * 72)
    if len(kept):
        larger = int((dropped > kept.max()).sum())
        assert larger == min(int(gamma * 72), 72 - len(kept))
        assert larger + int((dropped < kept.min()).sum()) == len(dropped)


@given(seed=SEEDS, count=st.integers(2, 4))
def test_model_stock_lies_between_base_and_mean(seed, count):
    """Between models that scatter evenly around their centre it finds the point nearest to that centre."""
    base, *moves = _tensors(seed, (500,), count + 1, torch.float64)
    moves = torch.stack(moves)
    moves = torch.linalg.qr(moves.T).Q.T + moves.mean(dim=0) / 20
    got = ours("model_stock", [base, *(base + move for move in moves)], 0)
    mean = moves.mean(dim=0)
    t = ((got - base) * mean).sum() / mean.square().sum()
    torch.testing.assert_close(got, base + t * mean)
    units = moves / moves.norm(dim=1, keepdim=True)
    cosine = (units @ units.T)[~torch.eye(count, dtype=torch.bool)].mean()
    torch.testing.assert_close(t, count * cosine / (1 + (count - 1) * cosine))


@given(seed=SEEDS, t=st.floats(0, 1))
def test_nearswap_moves_no_further_than_t(seed, t):
    base, other = _tensors(seed, (8, 9), 2)
    got = ours("nearswap", [base, other], 0, once={"t": t})
    moved = (got - base).abs()
    assert torch.all(moved <= t + 1e-5)
    near = (base - other).abs() <= t
    torch.testing.assert_close(got[near], other[near])
    torch.testing.assert_close(moved[~near], torch.full_like(moved[~near], t), rtol=0, atol=1e-5)


@given(seed=SEEDS)
def test_fusion_takes_each_element_from_one_model(seed):
    base, other = _tensors(seed, (20, 30), 2)
    got = ours("arcee_fusion", [base, other], 0)
    taken = (got - other).abs() < 1e-6
    assert torch.equal(got[~taken], base[~taken])
    assert 0 < taken.float().mean() < 0.25


@given(seed=SEEDS, share=st.floats(0.05, 1))
def test_sce_changes_the_share_that_varies_most(seed, share):
    base, *others = _tensors(seed, (8, 9), 3)
    got = ours("sce", [base, *others], 0, once={"select_topk": share})
    changed = got != base
    variance = torch.stack(others).var(dim=0, correction=0)
    assert abs(int(changed.sum()) - 72 * share) <= 1
    if 0 < int(changed.sum()) < 72:
        assert variance[changed].min() >= variance[~changed].max() * (1 - 1e-5)


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_floating_dtype(name, dtype):
    count, base = next(iter(sizes(name)))
    tensors = _tensors(1, (6, 5), count, dtype)
    result = ours(name, tensors, base, _each(name, count), _once(name))
    assert result.dtype == (torch.float32 if dtype.itemsize == 1 else dtype)
    exact = ours(name, [t.double() for t in tensors], base, _each(name, count), _once(name))
    if name not in STOCHASTIC and name != "arcee_fusion":
        _near(result.double(), exact, 8 * torch.finfo(result.dtype).eps)


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_same_models_give_the_same_result(name):
    for count, base in sizes(name):
        tensors = _tensors(2, (30, 20), count)
        first, again = (ours(name, tensors, base, _each(name, count), _once(name), seed=3) for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.isnan(first).any()
        assert method_named(name).paper.partition("https://")[2]


@pytest.mark.parametrize("name", EVERYTHING)
def test_empty_tensors_stay_empty(name):
    count, base = next(iter(sizes(name)))
    result = ours(name, [torch.empty(0, 3)] * count, base, _each(name, count), _once(name))
    assert result.shape == (0, 3)
