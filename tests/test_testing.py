"""The conformance suite: ours and a third party's policies pass, and each broken rule is caught by its sentence."""

from __future__ import annotations

import importlib.util
import os
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from tailor_dcp.errors import PolicyError, TailorWarning
from tailor_dcp.policies import Full, Policy
from tailor_dcp.testing import PolicyConformance, check_policy
from tailor_dcp.units import Unit

THIRD_PARTY = Path(__file__).parent / "third_party_policy"
OURS = {
    "full": 0,
    "parity": 1,
    "parity:groups=5": 4,
    "filter": 4,
    "filter:head=0,tail=1,every=3,aux=rest": 2,
    "moments": 4,
    "moments:every=3,weights=bf16,moments=fp16": 2,
    "parity|filter:every=4": 1,
    "unchanged+parity": 1,
    "unchanged+moments:every=3,weights=bf16": 2,
}


@pytest.mark.parametrize("text", OURS)
def test_our_own_policies_conform(text):
    check_policy(text, OURS[text])


@pytest.mark.parametrize("text", [text for text, bound in OURS.items() if bound])
def test_a_bound_that_is_too_tight_is_caught(text):
    with pytest.raises(AssertionError, match=f"'no unit is more than {OURS[text] - 1} saves old'"):
        check_policy(text, OURS[text] - 1)


def third_party():
    """Import the third party's module from where it lies."""
    spec = importlib.util.spec_from_file_location("every_other", THIRD_PARTY / "every_other.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["every_other"] = module
    spec.loader.exec_module(module)
    return module


class TestEveryOther(PolicyConformance):
    policy = third_party().EveryOther(offset=1)
    bound = 1

    @pytest.fixture(autouse=True)
    def installed(self, tmp_path, monkeypatch):
        """What pip would leave of the package."""
        project = tomllib.loads((THIRD_PARTY / "pyproject.toml").read_text())["project"]
        info = tmp_path / "every_other_policy-0.3.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.3\n")
        for group, entries in project["entry-points"].items():
            lines = [f"{name} = {value}" for name, value in entries.items()]
            (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]))
        monkeypatch.syspath_prepend(tmp_path)

    def test_the_function_agrees(self):
        check_policy(self.policy, self.bound)
        with pytest.raises(AssertionError, match=r"every_other:offset=1 breaks .* 0 saves old"):
            check_policy(self.policy, 0)


@dataclass(frozen=True)
class Base(Policy):
    """Full, without a string."""

    def select(self, request):
        return Full().select(request)


class NeedsAges(Base):
    def select(self, request):
        return [info.unit for info in request.units if info.age > 0]


class NeedsAStep(Base):
    def select(self, request):
        return list(super().select(request)) if request.step % 200 else []


class NeedsNumbers(Base):
    def cohorts(self, request):
        return {info.unit: str(max(i.number for i in request.units)) for info in request.units}


class Inventive(Base):
    def select(self, request):
        return [*super().select(request), Unit("model.layers.99", "weight")]


class Random(Base):
    def select(self, request):
        return [info.unit for info in request.units if os.urandom(1)[0] % 2]


class Relabelling(Base):
    def cohorts(self, request):
        return {info.unit: os.urandom(8).hex() for info in request.units}


class Meddling(Base):
    def select(self, request):
        for info in request.units[:1]:
            object.__setattr__(info, "age", 5)
        return super().select(request)


class Forgetful(Base):
    def select(self, request):
        return [info.unit for info in request.units if info.layer != "lm_head"]


class ByOneAge(Base):
    """Bounded after a new start, never after another policy's."""

    def select(self, request):
        return [info.unit for info in request.units if info.age in (None, 2)]


class LabelsTheUnknown(Base):
    def cohorts(self, request):
        return {Unit("model.layers.99", "weight"): "all"}


class LabelsWithNumbers(Base):
    def cohorts(self, request):
        return {info.unit: 1 for info in request.units}


class TornCohort(Base):
    def select(self, request):
        return [info.unit for info in request.units if info.is_weight or request.index % 3 == 0]

    def cohorts(self, request):
        return {info.unit: "all" for info in request.units}


class Widening(Base):
    def storage_dtype(self, unit, dtype):
        return torch.float32 if dtype.is_floating_point else dtype


class RoundsCounters(Base):
    def storage_dtype(self, unit, dtype):
        return torch.bfloat16 if dtype.itemsize > 2 else dtype


class Integers(Base):
    def storage_dtype(self, unit, dtype):
        return torch.int8


class NoDtype(Base):
    def storage_dtype(self, unit, dtype):
        return "bf16"


class Undecided(Base):
    asked: ClassVar[list[int]] = [0]

    def storage_dtype(self, unit, dtype):
        self.asked[0] += 1
        return torch.bfloat16 if dtype is torch.float32 and self.asked[0] % 2 else dtype


@dataclass(frozen=True)
class HoldsAFunction(Base):
    function: object = lambda: None


class ForgetsWhenPickled(Base):
    def __init__(self, one=True):
        object.__setattr__(self, "one", one)

    def __reduce__(self):
        return ForgetsWhenPickled, (False,)

    def select(self, request):
        return super().select(request) if self.one else []


@dataclass(frozen=True)
class Uninstalled(Base):
    name: ClassVar[str] = "uninstalled"


@dataclass(frozen=True)
class Impostor(Base):
    name: ClassVar[str] = "full"


class Speechless(Base):
    def __str__(self):
        raise RuntimeError("no words")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("policy", "rule", "words"),
    [
        (NeedsAges(), "it answers every request", "select raised TypeError"),
        (NeedsAStep(), "it answers every request", "without a step: select raised TypeError"),
        (NeedsNumbers(), "it answers every request", "cohorts raised TypeError"),
        (Inventive(), "select returns existing units only", "model.layers.99/weight"),
        (Random(), "equal requests get equal answers", "asked twice, it differed about"),
        (Relabelling(), "equal requests get equal answers", "differently"),
        (Meddling(), "requests are not modified", "model.embed_tokens/weight"),
        (Forgetful(), "no unit is more than 2 saves old", "lm_head/exp_avg, lm_head/exp_avg_sq, lm_head/weight"),
        (ByOneAge(), "no unit is more than 2 saves old", "had last been written"),
        (LabelsTheUnknown(), "cohorts label existing units", "model.layers.99/weight"),
        (LabelsWithNumbers(), "cohorts label existing units", "more is not a string"),
        (TornCohort(), "units of one cohort are due together", "in the cohort 'all', "),
        (Widening(), "storage_dtype narrows floating-point dtypes only", "torch.float32, which is wider"),
        (RoundsCounters(), "storage_dtype narrows floating-point dtypes only", "only floating-point tensors may be"),
        (Integers(), "storage_dtype narrows floating-point dtypes only", "which is not floating-point"),
        (NoDtype(), "storage_dtype narrows floating-point dtypes only", "'bf16', which is no dtype"),
        (Undecided(), "storage_dtype narrows floating-point dtypes only", "asked again"),
        (HoldsAFunction(), "it can be pickled", "pickle said"),
        (ForgetsWhenPickled(), "it can be pickled", "its copy differs about"),
        (Uninstalled(), "its string is read back as the same policy", "There is no policy 'uninstalled'"),
        (Impostor(), "its string is read back as the same policy", "was read as Full()"),
        (Speechless(), "its string is read back as the same policy", "str() raised RuntimeError: no words"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Policy) else "",
)
def test_a_broken_policy_is_caught_in_one_sentence(policy, rule, words):
    with pytest.raises(AssertionError) as caught:
        check_policy(policy, 2)
    sentence = str(caught.value)
    assert sentence.startswith("The policy ")
    assert f"breaks the rule '{rule}'" in sentence
    assert words in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert not sentence.endswith("..")


def weights_only(request):
    """A function is a policy, too."""
    return [info for info in request.units if info.is_weight]


def test_a_policy_without_a_string_conforms_and_that_is_said():
    with pytest.warns(TailorWarning, match="weights_only has no string"):
        check_policy(weights_only)
    with pytest.warns(TailorWarning, match="no string"):
        check_policy(Base())


def test_what_is_no_policy_is_refused():
    with pytest.raises(PolicyError, match="nonesuch"):
        check_policy("nonesuch")
