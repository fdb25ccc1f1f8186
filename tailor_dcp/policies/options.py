"""The options of a policy: what each may be, and the sentence that says so."""

from __future__ import annotations

import functools
import reprlib
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import torch
from pydantic import AfterValidator, Field, PydanticUserError, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from tailor_dcp.errors import PolicyError
from tailor_dcp.policies.base import Policy
from tailor_dcp.units import STEP, WEIGHT, Unit

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What tensors may be stored in, by the short names that policies are written with."""

_SHORT_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}


def _short_name(name: str) -> str:
    # One spelling only, so that policies that mean the same are equal.
    short = _SHORT_NAMES.get(name, name)
    if short not in DTYPES:
        raise ValueError(name)
    return short


# A description says what is allowed in the words of the error message, "it must be ...".
Period = Annotated[int, Field(ge=1, description="a whole number, 1 or more")]
Amount = Annotated[int, Field(ge=0, description="a whole number, 0 or more")]
Positive = Annotated[float, Field(gt=0, description="a number above 0")]
Share = Annotated[float, Field(gt=0, le=1, description="a number above 0, 1 at most")]
DtypeName = Annotated[
    str, AfterValidator(_short_name), Field(description=f"one of {', '.join([*DTYPES, *_SHORT_NAMES])}")
]

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = _shortened.maxlong = 80
shown = _shortened.repr
"""Like `repr`, but never longer than a message can bear."""


def narrowed(unit: Unit, dtype: torch.dtype, weights: str, moments: str) -> torch.dtype:
    """Return the narrower of a tensor's own dtype and the one chosen for its kind, by their short names."""
    # Half-precision numbers of steps would stop counting at 256 (bf16) or 2048 (fp16).
    if unit.kind == STEP or not dtype.is_floating_point:
        return dtype
    chosen = DTYPES[weights if unit.kind == WEIGHT else moments]
    # Nobody who left the defaults alone asked for doubles to be rounded.
    if chosen is torch.float32:
        return dtype
    return chosen if chosen.itemsize < dtype.itemsize else dtype


def option_names(policy: type[Policy]) -> list[str]:
    """Return the names of a policy's options, in their order."""
    return [field.name for field in fields(policy) if field.init]  # type: ignore[arg-type]


def checked(policy: type[Policy], option: str, value: object, *, strict: bool) -> Any:
    """Return an option's value as its field's type has it.

    Args:
        policy: the policy's class, a dataclass.
        option: the name of one of its options.
        value: what was given for it.
        strict: False where text may stand for a number, as in a policy's string.

    Returns:
        The value, converted.

    Raises:
        PolicyError: the value is not allowed.
    """
    adapter, allowed = _rule(policy, option)
    try:
        return adapter.validate_python(value, strict=strict)
    except ValidationError as error:
        said = error.errors(include_url=False)[0]["msg"]
        must = f"it must be {allowed}" if allowed else said[:1].lower() + said[1:]
        raise PolicyError(
            f"The option {option}={shown(value)} of the policy {policy.name!r} is not allowed: {must}."
        ) from None
    except UnicodeEncodeError:  # pydantic, of what a command line had that was no text
        raise PolicyError(
            f"The option {option}={shown(value)} of the policy {policy.name!r} is not allowed: it is no text."
        ) from None


def check_options(policy: Policy) -> None:
    """Check all options of a policy that was just made; for its ``__post_init__``.

    Raises:
        PolicyError: a value is not allowed.
    """
    for option in option_names(type(policy)):
        value = checked(type(policy), option, getattr(policy, option), strict=True)
        # The usual way to settle a field of a frozen dataclass.
        object.__setattr__(policy, option, value)


@functools.cache
def _rule(policy: type[Policy], option: str) -> tuple[TypeAdapter[Any], str | None]:
    """Return what checks an option, and what it allows in words (None: pydantic's own words)."""
    try:
        hint = get_type_hints(policy, include_extras=True)[option]
        adapter: TypeAdapter[Any] = TypeAdapter(hint)
    except (NameError, PydanticUserError) as error:
        raise PolicyError(
            f"The option {option} of the policy {policy.name!r} has a type that no text can be turned into "
            f"({type(error).__name__}), so it can only be given in Python."
        ) from error
    described = (extra.description for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, FieldInfo))
    return adapter, next(described, None)
