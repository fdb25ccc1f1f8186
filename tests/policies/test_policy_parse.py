from __future__ import annotations

import policy_runs as made
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tailor_dcp.errors import PolicyError
from tailor_dcp.policies import Either, Filter, Full, Moments, Parity, Policy, parse_policy


@given(made.policies)
def test_round_trip(policy):
    assert parse_policy(str(policy)) == policy


@given(st.data(), made.policies)
def test_white_space_around_tokens_is_tolerated(data, policy):
    """Also line breaks, which YAML leaves in folded strings."""
    spaces = st.text(" \t\n", max_size=2)
    spaced = [data.draw(spaces) + c + data.draw(spaces) if c in ":,=|" else c for c in str(policy)]
    text = data.draw(spaces) + "".join(spaced) + data.draw(spaces)
    assert parse_policy(text) == policy


words = ["full", "parity", "filter", "moments", "either", "groups", "every", "aux", "rest", "bf16"]
signs = [":", ",", "=", "|", "+", " ", "\n", "\x00", "é", "0", "-1", "2", "9" * 5000]
tokens = st.sampled_from([*words, *signs])


@given(st.one_of(st.text(), st.lists(tokens, max_size=10).map("".join)))
@example("parity:groups=\u0661")  # an Arabic 1
def test_any_text_is_a_policy_or_one_sentence(text):
    try:
        policy = parse_policy(text)
    except PolicyError as error:
        _assert_sentence(str(error))
    else:
        assert parse_policy(str(policy)) == policy


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("full", Full()),
        ("parity", Parity()),
        ("parity:groups=4", Parity(groups=4)),
        ("filter:head=2,tail=2,every=5", Filter()),
        ("filter:head=1,tail=0,every=5,aux=rest", Filter(head=1, tail=0, aux="rest")),
        ("moments:every=5,weights=bf16,moments=bf16", Moments(weights="bf16", moments="bf16")),
        ("moments:moments=bfloat16", Moments(moments="bf16")),
        ("parity|filter:every=10", Either((Parity(), Filter(every=10)))),
        (" full | parity : groups = 3 | moments ", Either((Full(), Parity(3), Moments()))),
    ],
)
def test_strings(text, policy):
    assert parse_policy(text) == policy


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (Full(), "full"),
        (Parity(groups=2), "parity"),
        (Filter(every=10, aux="rest"), "filter:every=10,aux=rest"),
        (Parity(3) | Moments(every=2), "parity:groups=3|moments:every=2"),
    ],
)
def test_only_what_differs_from_the_defaults_is_written(policy, text):
    assert str(policy) == text


@pytest.mark.parametrize("policy", [Full(), Parity(3), Full() | Parity()])
def test_a_policy_stays_as_it_is(policy):
    assert parse_policy(policy) is policy


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["empty string"]),
        (" \n", ["empty string"]),
        ("partiy", ["no policy 'partiy'", "did you mean 'parity'?", "filter, full, moments, parity"]),
        ("Parity", ["did you mean 'parity'?"]),
        ("FULL", ["did you mean 'full'?"]),
        ("xyz", ["no policy 'xyz';", "filter, full, moments, parity"]),
        ("full||parity", ["'full||parity'", "one side of a '|'"]),
        ("|full", ["one side of a '|'"]),
        ("full|", ["one side of a '|'"]),
        ("full|nonesuch", ["no policy 'nonesuch'"]),
        (":groups=2", ["no name before its ':'"]),
        ("parity:", ["'parity:'", "no options after its ':'", "its options are groups"]),
        ("full:", ["it has no options"]),
        ("parity:groups", ["option=value", "'groups'"]),
        ("parity:groups=", ["option=value", "'groups='"]),
        ("parity:=2", ["option=value", "'=2'"]),
        ("parity:groups=2,", ["option=value", "''"]),
        ("parity:groups=2,groups=3", ["gives the option groups twice"]),
        ("parity:group=2", ["no option 'group'", "did you mean 'groups'?", "its options are groups"]),
        ("filter:first=2", ["no option 'first';", "its options are head, tail, every, aux"]),
        ("full:groups=2", ["'full' has no option 'groups'", "it has no options"]),
        ("parity:groups=zero", ["groups='zero'", "'parity'", "a whole number, 1 or more"]),
        ("parity:groups=0", ["groups=", "0", "'parity'", "a whole number, 1 or more"]),
        ("parity:groups=2=3", ["groups='2=3'", "a whole number, 1 or more"]),
        ("parity:groups=2.5", ["groups='2.5'", "a whole number, 1 or more"]),
        ("filter:aux=never", ["aux='never'", "'always' or 'rest'"]),
        ("moments:weights=int8", ["weights='int8'", "one of fp32, bf16, fp16"]),
        ("either", ["no policy 'either'"]),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(text, parts):
    with pytest.raises(PolicyError) as caught:
        parse_policy(text)
    _assert_sentence(str(caught.value))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("thing", [None, 3, b"full", ["full"], {"policy": "full"}])
def test_other_things_are_no_policies(thing):
    with pytest.raises(PolicyError, match=f"function of the request, not .*{type(thing).__name__}"):
        parse_policy(thing)


def test_a_policys_class_is_not_taken_for_a_function():
    with pytest.raises(PolicyError, match=r"pass Parity\(\) instead"):
        parse_policy(Parity)


def test_error_is_also_a_value_error():
    """So that argument parsers report it as a bad value."""
    with pytest.raises(ValueError, match="nonesuch"):
        parse_policy("nonesuch")


def test_result_is_a_policy_with_a_hash():
    """Policies are compared and used as keys."""
    assert isinstance(parse_policy("full"), Policy)
    assert len({parse_policy("parity"), parse_policy("parity:groups=2"), Parity()}) == 1


def _assert_sentence(message: str) -> None:
    assert message.endswith(".")
    assert "\n" not in message
    assert "Traceback" not in message
    assert "pydantic" not in message
