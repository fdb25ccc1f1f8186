"""A policy's string: what is accepted is written as it can be read, and any record's policy can be put into words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint

from tailor_dcp import plugins
from tailor_dcp.policies.parse import parse_policy
from tailor_dcp.policies.words import in_words
from tests.fuzz.mutators.texts import texts
from tests.fuzz.target import Target

_INSTALLED = list(plugins.entry_points(group="tailor_dcp.policies"))


def _offered(group: str, name: str | None = None) -> list[EntryPoint]:
    return [entry for entry in _INSTALLED if name is None or entry.name == name]


@contextmanager
def _what_is_installed() -> Iterator[None]:
    """Let what is installed stay the same: to look for it takes a thousand times as long as to parse a policy."""
    before = plugins.entry_points
    plugins.entry_points = _offered  # type: ignore[assignment]
    try:
        yield
    finally:
        plugins.entry_points = before


@_what_is_installed()
def parse(data: bytes) -> None:
    """Parse it, write it, parse that."""
    text = data.decode("utf-8", "surrogateescape")
    assert in_words(text)
    policy = parse_policy(text)
    again = parse_policy(str(policy))
    assert again == policy and str(again) == str(policy), "a policy is another one after it was written"


def seeds() -> Iterator[bytes]:
    """Policies of each kind, and slips."""
    yield from (
        b"full", b"parity:groups=4", b"filter:head=2,tail=1,every=10,aux=always", b"moments:every=5,weights=bf16",
        b"drift:threshold=0.01,max_stale=5,exact=true", b"budget:fraction=0.1,first=weights", b"budget:bytes=100000",
        b"budget:seconds=1.5", b"unchanged+full", b"parity|filter:every=10", b"unchanged+moments:moments=fp16",
        b"merge", b"parity:groups=0", b"paritiy", b"full:", b"|", b"parity:groups=4,groups=5", b"drift:threshold=nan",
        b"budget:fraction=1e-320", b"unchanged+unchanged+full", b"parity:groups=1_0",
    )  # fmt: skip


_WORDS = (
    "full", "parity", "filter", "moments", "drift", "budget", "unchanged", "groups", "head", "tail", "every", "aux",
    "rest", "always", "threshold", "states", "half_life", "exact", "max_stale", "fraction", "bytes", "seconds",
    "first", "weights", "moments", "bf16", "fp16", "fp32", "true", "false", "nan", "inf", "1e-300", "1_0", "none",
    "float16", "+", "|", ":", "=", ",",
)  # fmt: skip
TARGET = Target(parse, seeds, texts(_WORDS), tuple(word.encode() for word in _WORDS), longest=256)
