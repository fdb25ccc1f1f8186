from __future__ import annotations

import policy_runs as made
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.errors import PolicyError
from tailor_dcp.policies import Moments
from tailor_dcp.units import Unit

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


@given(made.runs(), made.moments)
def test_weights_are_fresh_and_moments_within_their_bound(run, policy):
    """From the first save on, whatever was written before."""
    for _ in range(2 * policy.every + 1):
        run.save(policy)
        for unit, staleness in run.staleness().items():
            assert staleness <= (0 if unit.kind == "weight" else policy.every - 1)


@given(made.states(), st.integers(0, 50), made.moments)
def test_after_a_full_save_each_window_writes_all_moments_once(layers, index, policy):
    run = made.Run(layers, index)
    assert run.save(policy) == set(run.units), "nothing was saved before, so all is due"
    saves = [run.save(policy) for _ in range(2 * policy.every)]
    moments = sorted(unit for unit in run.units if unit.kind != "weight")
    for start in range(policy.every):
        window = saves[start : start + policy.every]
        assert sorted(unit for due in window for unit in due if unit.kind != "weight") == moments


@given(made.states(), made.moments)
def test_step_goes_with_the_moments(layers, policy):
    """Else Adam's bias correction would not fit the averages it corrects."""
    run = made.Run(layers)
    for _ in range(2 * policy.every):
        due = run.save(policy)
        for layer in run.layers:
            assert len({unit in due for unit in layer.units if unit.kind != "weight"}) <= 1


def test_only_moments_count_for_balance():
    """A frozen embedding, however large, must not push the head out of its group."""
    frozen = made.Layer("model.embed_tokens", kinds=("weight",), size=10**9)
    cohorts = Moments(every=2).cohorts(made.Run([frozen, made.Layer("lm_head"), made.Layer("norm")]).request())
    assert cohorts == {
        Unit("model.embed_tokens", "weight"): "weights",
        Unit("lm_head", "weight"): "weights",
        Unit("norm", "weight"): "weights",
        **{Unit("lm_head", kind): "0" for kind in ("exp_avg", "exp_avg_sq", "step")},
        **{Unit("norm", kind): "1" for kind in ("exp_avg", "exp_avg_sq", "step")},
    }


@given(
    made.moments,
    st.sampled_from(["weight", "exp_avg", "exp_avg_sq", "momentum_buffer", "step"]),
    st.sampled_from(DTYPES),
)
def test_storing_narrows_or_leaves_alone(policy, kind, dtype):
    stored = policy.storage_dtype(Unit("model.layers.0", kind), dtype)
    assert stored == dtype or (stored.itemsize < dtype.itemsize and stored.is_floating_point)
    if kind == "step" or not dtype.is_floating_point:
        assert stored == dtype


@pytest.mark.parametrize(
    ("kind", "dtype", "stored"),
    [
        ("weight", torch.float32, torch.bfloat16),
        ("weight", torch.float64, torch.bfloat16),
        ("weight", torch.bfloat16, torch.bfloat16),
        ("weight", torch.float16, torch.float16),  # as narrow as bf16 already
        ("weight", torch.float8_e4m3fn, torch.float8_e4m3fn),
        ("weight", torch.int64, torch.int64),  # a buffer that counts batches
        ("exp_avg", torch.float32, torch.float16),
        ("momentum_buffer", torch.float32, torch.float16),
        ("exp_avg", torch.uint8, torch.uint8),  # an 8-bit optimizer's
        ("step", torch.float32, torch.float32),
    ],
)
def test_storage_dtype(kind, dtype, stored):
    policy = Moments(weights="bf16", moments="fp16")
    assert policy.storage_dtype(Unit("model.layers.0", kind), dtype) == stored


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["weight", "exp_avg"])
def test_defaults_store_every_tensor_as_it_is(kind, dtype):
    """Doubles too: nobody asked for them to be rounded."""
    assert Moments().storage_dtype(Unit("model.layers.0", kind), dtype) == dtype


def test_long_names_mean_the_same():
    assert Moments(weights="bfloat16", moments="float16") == Moments(weights="bf16", moments="fp16")
    assert str(Moments(weights="float32", moments="bfloat16")) == "moments:moments=bf16"


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"every": 0}, "a whole number, 1 or more"),
        ({"weights": "int8"}, "one of fp32, bf16, fp16"),
        ({"moments": "BF16"}, "one of fp32, bf16, fp16"),
        ({"moments": torch.bfloat16}, "one of fp32, bf16, fp16"),
    ],
)
def test_bad_options(options, allowed):
    [(name, value)] = options.items()
    with pytest.raises(PolicyError) as caught:
        Moments(**options)
    for part in (f"{name}={value!r}", "'moments'", allowed):
        assert part in str(caught.value)
