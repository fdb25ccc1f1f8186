"""Policies from strings: ``parity:groups=4``, ``moments:every=5|filter:every=10``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import MISSING, fields

from tailor_dcp.errors import PolicyError
from tailor_dcp.policies.base import Policy
from tailor_dcp.policies.budget import Budget
from tailor_dcp.policies.drift import Drift
from tailor_dcp.policies.either import Either
from tailor_dcp.policies.filter import Filter
from tailor_dcp.policies.from_callable import FromCallable, Selector
from tailor_dcp.policies.full import Full
from tailor_dcp.policies.moments import Moments
from tailor_dcp.policies.options import checked, option_names, shown
from tailor_dcp.policies.parity import Parity
from tailor_dcp.policies.plugins import PLUGINS
from tailor_dcp.policies.unchanged import Unchanged

# Ours are entry points too, but have to work from a source folder that nobody installed, and
# no other package may put itself in their place.
_OURS: dict[str, type[Policy]] = {policy.name: policy for policy in (Full, Parity, Filter, Moments, Drift, Budget)}


def parse_policy(policy: str | Policy | Selector) -> Policy:
    """Make a policy of whatever users may write for one.

    Args:
        policy: a string such as ``"parity:groups=4"`` or ``"parity|filter:every=10"``; a policy; or
            a function that takes a `SaveRequest` and returns units or (layer, kind) pairs.

    Returns:
        The policy. ``parse_policy(str(p)) == p`` for every policy with a string of its own.

    Raises:
        PolicyError: it makes no sense as a policy.
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, str):
        return _parsed(policy)
    if callable(policy):
        _refuse_class(policy)
        return FromCallable(policy)
    raise PolicyError(
        f"A policy is a string, a Policy or a function of the request, not {shown(policy)} ({type(policy).__name__})."
    )


def _refuse_class(function: object) -> None:
    # A class is callable too, but what it makes of a request is no selection.
    if isinstance(function, type) and issubclass(function, Policy):
        raise PolicyError(f"{function.__name__} is a policy's class, not a policy: pass {function.__name__}() instead.")


def _parsed(text: str) -> Policy:
    if not text.strip():
        raise PolicyError("The policy is an empty string: write its name, for example 'full'.")
    parts = [part.strip() for part in text.split("|")]
    if "" in parts:
        raise PolicyError(f"The policy {shown(text)} has nothing on one side of a '|'.")
    policies = [_single(part) for part in parts]
    return policies[0] if len(policies) == 1 else Either(tuple(policies))


def _single(text: str) -> Policy:
    """Parse ``name``, ``name:option=value,option=value``, or either behind ``unchanged+``."""
    prefix, _, inner = (token.strip() for token in text.partition("+"))
    if prefix == Unchanged.name and inner:
        return Unchanged(_single(inner))
    if text.partition(":")[0].rstrip("+ ") == Unchanged.name:
        raise PolicyError(
            f"The policy {shown(text)} needs another one to say what is due: write 'unchanged+full', "
            "or any other behind the '+'."
        )
    name, colon, rest = (token.strip() for token in text.partition(":"))
    if not name:
        raise PolicyError(f"The policy {shown(text)} has no name before its ':'.")
    policy = _policy_class(name)
    if colon and not rest:
        raise PolicyError(f"The policy {shown(text)} has no options after its ':': {_offered(policy)}.")
    options = _split_options(policy, text, rest) if rest else {}
    values = {option: checked(policy, option, value, strict=False) for option, value in options.items()}
    return _made(policy, values)


def _policy_class(name: str) -> type[Policy]:
    policy = _OURS.get(name) or PLUGINS.find(name)
    if policy is None:
        known = sorted({*_OURS, *PLUGINS.names(), f"{Unchanged.name}+..."})
        raise PolicyError(
            f"There is no policy {shown(name)}{_did_you_mean(name, known)}; the known ones are {', '.join(known)}."
        )
    return policy


def _split_options(policy: type[Policy], text: str, rest: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for pair in rest.split(","):
        option, _, value = (token.strip() for token in pair.partition("="))
        if not option or not value:
            raise PolicyError(
                f"The options of the policy {shown(text)} must be written option=value with commas between, "
                f"not {shown(pair.strip())}."
            )
        if option not in option_names(policy):
            meant = _did_you_mean(option, option_names(policy))
            raise PolicyError(f"The policy {policy.name!r} has no option {shown(option)}{meant}; {_offered(policy)}.")
        if option in options:
            raise PolicyError(f"The policy {shown(text)} gives the option {option} twice.")
        options[option] = value
    return options


def _made(policy: type[Policy], values: dict[str, object]) -> Policy:
    for field in fields(policy):  # type: ignore[arg-type]  # a policy's class is a dataclass
        needed = field.init and field.default is MISSING and field.default_factory is MISSING
        if needed and field.name not in values:
            raise PolicyError(f"The policy {policy.name!r} needs its option {field.name}; {_offered(policy)}.")
    try:
        return policy(**values)
    except PolicyError:
        raise
    except (TypeError, ValueError) as error:  # a plug-in's own checks may raise these
        reason = " ".join(str(error).split())
        raise PolicyError(f"The policy {policy.name!r} refuses its options ({reason}).") from error


def _offered(policy: type[Policy]) -> str:
    names = option_names(policy)
    return f"its options are {', '.join(names)}" if names else "it has no options"


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
