"""Every deterministic method beside mergekit's own."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from method_runs import DETERMINISTIC, VECTORS, ours, settings_each, settings_once, sizes, theirs

from tailor_dcp.recipes.errors import RecipeError

SHAPES = ((1,), (), (7,), (3, 1), (24, 18), (4, 6, 10))
# Weights depend on lengths and angles, which mergekit computes in bf16 where that is the dtype. Ours are those that it
# has when it is told to compute in fp32.
IN_FP32 = ("linear", "slerp", "nuslerp", "multislerp", "karcher", "model_stock", "nearswap")


def _random(shape, count, spread, dtype=torch.float32):
    start = torch.randn(shape)
    return [(start + spread * torch.randn(shape)).to(dtype) for _ in range(count)]


def _close(got, want, tensors, step):
    """Compare within a step, given as a function of the tensors' scale."""
    scale = max(float(t.float().abs().max()) for t in (want, *tensors))
    assert got.shape == want.shape
    assert got.dtype == tensors[0].dtype
    torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=step(scale), equal_nan=True)


def _fp32(scale):
    return 1e-4 * scale


def _bf16(scale):
    """One rounding step at that scale: eight bits, the first of them implied."""
    return 2.0 ** (math.floor(math.log2(scale)) - 7) if scale else 0


def _each_case(name):
    for count, base in sizes(name):
        for each in settings_each(name, count):
            for once in settings_once(name):
                yield count, base, each, once


@pytest.mark.parametrize("spread", [1.0, 0.05])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_fp32(name, spread):
    torch.manual_seed(1)
    for index, (count, base, each, once) in enumerate(_each_case(name)):
        for shape in (SHAPES[index % len(SHAPES)], (24, 18))[: 1 + (index % 3 == 0)]:
            # In a single number, directions cancel out in all but rounding.
            if name == "multislerp" and math.prod(shape) < 7:
                continue
            tensors = _random(shape, count, spread)
            before = [tensor.clone() for tensor in tensors]
            got, want = (merge(name, tensors, base, each, once) for merge in (ours, theirs))
            _close(got, want, tensors, _fp32)
            assert all(map(torch.equal, before, tensors)), "the inputs are not ours to change"


def _distinct(shape, count):
    """Return a base of zeros and tensors whose elements all differ in magnitude, so that no sort has ties."""
    values = torch.arange(0x3E00, 0x4080, dtype=torch.int16).view(torch.bfloat16)
    number = math.prod(shape)
    others = [values[torch.randperm(len(values))[:number]].reshape(shape) for _ in range(count - 1)]
    return [torch.zeros(shape, dtype=torch.bfloat16)] + [t * torch.randint(0, 2, shape).mul(2).sub(1) for t in others]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_bf16(name):
    torch.manual_seed(2)
    told = {"dtype": torch.float32, "out_dtype": torch.bfloat16} if name in IN_FP32 else {}
    for index, (count, base, each, once) in enumerate(_each_case(name)):
        if base not in (None, 0) or once.get("select_topk") in (0.1, 0.7):
            continue
        shape = ((24, 18), (4, 6, 10), (7,))[index % 3]
        tensors = _distinct(shape, count) if name in VECTORS else _random(shape, count, 0.05, torch.bfloat16)
        got = ours(name, tensors, base, each, once)
        # mergekit's factors that rescale are rounded to bf16, ours are exact: that decides votes that are nearly even.
        if once.get("rescale") and name in ("ties", "breadcrumbs_ties"):
            continue
        slack = 2 if once.get("rescale") else 1
        want = theirs(name, tensors, base, each, once, **told)
        _close(got, want, tensors, lambda scale, slack=slack: slack * _bf16(scale))


@pytest.mark.parametrize("name", ["linear", "slerp", "nearswap"])
def test_bf16_as_mergekit_has_it_by_itself(name):
    torch.manual_seed(3)
    for count, base, each, once in _each_case(name):
        tensors = _random((24, 18), count, 0.05, torch.bfloat16)
        got, want = (merge(name, tensors, base, each, once) for merge in (ours, theirs))
        _close(got, want, tensors, _bf16)


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_only_ties_in_a_sort_differ(name):
    """In bf16 many elements are equal, and which of them are kept is anybody's choice."""
    torch.manual_seed(4)
    base = torch.randn(60, 50).bfloat16()
    other = (base + 0.02 * torch.randn(60, 50)).bfloat16()
    each = [{}, {"weight": 1.0, "density": 0.4, "gamma": 0.1}]
    if name == "ties":
        del each[1]["gamma"]
    got, want = (merge(name, [base, other], 0, each, {"normalize": False}) for merge in (ours, theirs))
    sizes = (other - base).abs()
    differ = got != want
    limits = sizes[differ].unique()
    assert len(limits) <= (1 if name == "ties" else 2)
    assert int((got != base).sum()) == int((want != base).sum())
    assert int(differ.sum()) <= int(torch.isin(sizes, limits).sum())


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("case", ["zeros", "identical", "base and others"])
def test_nothing_to_choose_from(name, case):
    torch.manual_seed(5)
    for count, base, each, once in _each_case(name):
        same = torch.zeros(5, 4) if case == "zeros" else torch.randn(5, 4)
        tensors = [same.clone() for _ in range(count)]
        if case == "base and others" and base is not None:
            tensors[base] = torch.randn(5, 4)
        unchanged = base is not None and case != "base and others"
        if name == "multislerp" and len(tensors) - (base is not None) > 2 and (unchanged or case == "zeros"):
            continue  # mergekit refuses what no model changed, see below
        want = theirs(name, tensors, base, each, once)
        _close(ours(name, tensors, base, each, once), want, tensors, _fp32)


def test_multislerp_refuses_what_cancels_out():
    turns = [torch.tensor([math.cos(a), math.sin(a)]) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    with pytest.raises(RecipeError, match=r"The directions of layer\.weight in the models cancel out"):
        ours("multislerp", turns, None, [{"weight": 1.0}] * 3)


def test_multislerp_leaves_what_no_model_changed():
    torch.manual_seed(10)
    same, each = [torch.randn(3, 4)] * 4, [{"weight": 1.0}] * 4
    assert torch.equal(ours("multislerp", same, 0, each), same[0])
    with pytest.raises(ValueError, match="antipodal"):
        theirs("multislerp", same, 0, each)


@pytest.mark.parametrize("name", ["multislerp", "nuslerp", "slerp", "karcher"])
def test_opposite_models(name):
    torch.manual_seed(6)
    one = torch.randn(6, 8)
    each = [{"weight": 0.25}, {"weight": 0.25}]
    base = 0 if name == "slerp" else None
    once = {"t": 0.5} if name == "slerp" else {}
    got, want = (merge(name, [one, -one], base, each, once) for merge in (ours, theirs))
    _close(got, want, [one], _fp32)


def test_dtypes_mix_as_in_mergekit():
    torch.manual_seed(7)
    for dtypes in ((torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16), (torch.float64, torch.float32)):
        tensors = [torch.randn(9, 5).to(dtype) for dtype in dtypes]
        each = [{"weight": 0.3}, {"weight": 0.9}]
        for name in ("linear", "ties", "karcher"):
            got, want = (merge(name, tensors, 0, each, {}) for merge in (ours, theirs))
            assert got.dtype == want.dtype == torch.promote_types(*dtypes)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "ties", "nuslerp", "model_stock", "sce", "arcee_fusion", "nearswap"])
def test_tensors_larger_than_a_block(name, monkeypatch):
    """Work is done a stretch at a time: its length does not show."""
    torch.manual_seed(8)
    count, base = next((c, b) for c, b in sizes(name) if c > 1)
    tensors = _random((37, 29), count, 0.1)
    each = next(settings_each(name, count))
    cases = list(settings_once(name))
    whole = [ours(name, tensors, base, each, once) for once in cases]
    for module in ("blocks", "spans", "thinning", "arcee_fusion"):
        monkeypatch.setattr(import_module(f"tailor_dcp.methods.{module}"), "BLOCK", 50)
    for once, want in zip(cases, whole, strict=True):
        torch.testing.assert_close(ours(name, tensors, base, each, once), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "ties", "karcher", "nuslerp", "sce", "model_stock"])
def test_tensors_that_are_not_contiguous(name):
    torch.manual_seed(9)
    count, base = next((c, b) for c, b in sizes(name) if c > 1)
    tensors = [tensor.T for tensor in _random((8, 11), count, 0.1)]
    each = next(settings_each(name, count))
    for once in settings_once(name):
        got, want = (merge(name, tensors, base, each, once) for merge in (ours, theirs))
        _close(got, want, tensors, _fp32)
