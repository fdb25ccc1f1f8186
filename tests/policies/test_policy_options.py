from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, field
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field

from tailor_dcp.errors import PolicyError
from tailor_dcp.policies import Filter, Full, Moments, Parity, Policy
from tailor_dcp.policies.options import check_options, checked, option_names, shown


class Socket:
    """A type that pydantic can make nothing of."""


@dataclass(frozen=True)
class Foreign(Policy):
    """A policy of somebody else's, with annotations of all sorts."""

    name: ClassVar[str] = "foreign"

    ratio: float = 0.5
    deep: bool = False
    stale: int | None = None
    mode: Literal["a", "b"] = "a"
    share: Annotated[float, Field(gt=0, description="a fraction above 0")] = 1.0
    sock: Socket | None = None
    ghost: NoSuchType | None = None  # noqa: F821 - imported for type checkers only, people do
    derived: int = field(default=0, init=False)

    def select(self, request):
        return []


@dataclass(frozen=True)
class Plain(Policy):
    name: ClassVar[str] = "plain"

    ratio: float = 0.5
    deep: bool = False
    stale: int | None = None
    mode: Literal["a", "b"] = "a"
    share: Annotated[float, Field(gt=0, description="a fraction above 0")] = 1.0
    sock: Socket | None = None

    def select(self, request):
        return []


@pytest.mark.parametrize(
    ("policy", "names"),
    [
        (Full, []),
        (Parity, ["groups"]),
        (Filter, ["head", "tail", "every", "aux"]),
        (Moments, ["every", "weights", "moments"]),
        (Foreign, ["ratio", "deep", "stale", "mode", "share", "sock", "ghost"]),
    ],
)
def test_names(policy, names):
    assert option_names(policy) == names


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [("ratio", "2e-2", 0.02), ("deep", "True", True), ("stale", "3", 3), ("mode", "b", "b")],
)
def test_text_becomes_what_the_field_holds(option, text, value):
    assert checked(Plain, option, text, strict=False) == value


@pytest.mark.parametrize(
    ("option", "text", "allowed"),
    [
        ("ratio", "much", "valid number"),
        ("deep", "perhaps", "valid boolean"),
        ("mode", "c", "'a' or 'b'"),
        ("share", "0", "it must be a fraction above 0."),
    ],
)
def test_the_sentence_names_option_value_and_what_is_allowed(option, text, allowed):
    with pytest.raises(PolicyError) as caught:
        checked(Plain, option, text, strict=False)
    message = str(caught.value)
    assert f"{option}='{text}' of the policy 'plain'" in message
    assert allowed in message
    assert "\n" not in message
    assert "pydantic" not in message


@pytest.mark.parametrize(("policy", "option"), [(Plain, "sock"), (Foreign, "ghost")])
def test_a_type_that_no_text_can_become(policy, option):
    with pytest.raises(PolicyError, match=f"option {option} of the policy .* can only be given in Python"):
        checked(policy, option, "x", strict=False)


def test_in_python_text_is_no_number():
    """`Parity(groups="2")` would otherwise differ from what its string says."""
    with pytest.raises(PolicyError, match="groups='2'"):
        checked(Parity, "groups", "2", strict=True)
    assert checked(Parity, "groups", " 2 ", strict=False) == 2


def test_check_options_settles_values_in_frozen_policies():
    policy = Moments(weights="bfloat16")
    check_options(policy)
    assert policy.weights == "bf16"
    with pytest.raises(FrozenInstanceError):
        policy.weights = "fp16"


def test_long_values_are_shortened():
    assert len(shown("x" * 10**6)) < 100
    with pytest.raises(PolicyError) as caught:
        checked(Parity, "groups", "9" * 10**5, strict=False)
    assert len(str(caught.value)) < 250
