"""Reading LLMTailor's plans: every key is checked, and what its tool ignores without a word is refused."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tailor_dcp.location import is_url
from tailor_dcp.names import close, listed
from tailor_dcp.recipes.documents import Document, Place
from tailor_dcp.recipes.errors import RecipeError

LISTS = ("pre_weights", "post_weights")
METHOD = "passthrough"
_TOP = ("slices", *LISTS, "merge_method", "base_model", "dtype", "out_dtype", "tokenizer_source")
_MERGEKIT = ("models", "modules", "parameters", "chat_template", "tokenizer")
_DTYPES = ("bfloat16", "float16", "float32")
_OWN = "llmtailor"
_CHECKPOINT = re.compile(r"(?:.*/)?checkpoint-\d+/*")


class Slice(NamedTuple):
    """Layers ``start`` to before ``stop``; if both are the same, the unit of that number.

    Attributes:
        place: where it is in the document.
        model: the checkpoint.
        start: the first layer.
        stop: the one after the last.
    """

    place: Place
    model: str
    start: int
    stop: int

    @property
    def empty(self) -> bool:
        """Whether it has no length."""
        return self.start == self.stop


class Weight(NamedTuple):
    """An entry of ``pre_weights`` or ``post_weights``; in which of the two makes no difference.

    Attributes:
        place: where it is in the document.
        name: the weight's FQN.
        model: the checkpoint.
    """

    place: Place
    name: str
    model: str


@dataclass(frozen=True)
class Plan:
    """A plan as it is written.

    Attributes:
        slices: in their order.
        weights: of both lists.
        base_model: the checkpoint that it names as such, if any.
    """

    slices: tuple[Slice, ...]
    weights: tuple[Weight, ...]
    base_model: str | None


def is_plan(data: Any) -> bool:
    """Tell an LLMTailor plan from mergekit's: by keys that only it has, or by both of its habits together.

    These are paths that all end in ``checkpoint-<step>``, and slices of no length, which in mergekit's plans mean
    something else. A passthrough plan that has only one of them is mergekit's.
    """
    if not isinstance(data, Mapping):
        return False
    if any(key in LISTS or _is_own(key) for key in data):
        return True
    sources = list(_sources(data))
    return (
        data.get("merge_method") == METHOD
        and bool(sources)
        and all(isinstance(source.get("model"), str) and _CHECKPOINT.fullmatch(source["model"]) for source in sources)
        and any(_is_range(source.get("layer_range")) and len({*source["layer_range"]}) == 1 for source in sources)
    )


def read_plan(document: Document) -> Plan:
    """Return what a plan says.

    Raises:
        RecipeError: a key is unknown or missing, or a value makes no sense; it names the line.
    """
    return _Reader(document).plan()


class _Reader:
    def __init__(self, document: Document) -> None:
        self.document = document

    def plan(self) -> Plan:
        top = self._mapping((), self.document.data, _TOP, ("slices", "merge_method"))
        if top["merge_method"] != METHOD:
            raise self._error(
                ("merge_method",),
                f"a plan that moves optimizer state can only be passthrough, not {top['merge_method']}: moments "
                f"cannot be merged like weights. Without pre_weights, post_weights and slices of no length it is "
                f"mergekit's plan, with every method",
            )
        for name in ("dtype", "out_dtype"):
            if top.get(name) not in (None, *_DTYPES):
                raise self._error((name,), f"{name} {top[name]!r} is unknown; use {listed(_DTYPES)}")
        base = None if top.get("base_model") is None else self._path(("base_model",), top["base_model"])
        self._check_tokenizer(top, base)
        return Plan(tuple(self._slices(top)), tuple(self._weights(top)), base)

    def _slices(self, top: Mapping[str, Any]) -> Iterator[Slice]:
        for number, item in enumerate(self._list(("slices",), top["slices"])):
            place: Place = ("slices", number)
            sources = self._list((*place, "sources"), self._mapping(place, item, ("sources",), ("sources",))["sources"])
            if len(sources) != 1:
                raise self._error(
                    (*place, "sources"), f"a slice has one source in a passthrough plan, and this has {len(sources)}"
                )
            yield self._slice((*place, "sources", 0), sources[0])

    def _slice(self, place: Place, item: Any) -> Slice:
        keys = ("model", "layer_range")
        source = self._mapping(place, item, keys, keys)
        held = source["layer_range"]
        if not _is_range(held) or not 0 <= held[0] <= held[1]:
            raise self._error(
                (*place, "layer_range"),
                f"layer_range {held!r} is no range; write [first, last + 1], counted from 0, as [0, 16]",
            )
        return Slice(place, self._path((*place, "model"), source["model"]), *held)

    def _weights(self, top: Mapping[str, Any]) -> Iterator[Weight]:
        for key in LISTS:
            if top.get(key) in (None, []):
                continue
            for number, item in enumerate(self._list((key,), top[key])):
                place: Place = (key, number)
                entry = self._mapping(place, item, ("name", "model"), ("name", "model"))
                if not isinstance(entry["name"], str) or not entry["name"]:
                    raise self._error((*place, "name"), f"{entry['name']!r} is no name of a weight")
                yield Weight(place, entry["name"], self._path((*place, "model"), entry["model"]))

    def _check_tokenizer(self, top: Mapping[str, Any], base: str | None) -> None:
        told = top.get("tokenizer_source")
        if told in (None, "base") or (isinstance(told, str) and base == _normal(told)):
            return
        raise self._error(
            ("tokenizer_source",),
            f"tokenizer_source {told!r} is not taken, as the tokenizer comes with the base; name its checkpoint as "
            f"base_model and leave this out",
        )

    # Values ------------------------------------------------------------------------------

    def _mapping(self, place: Place, value: Any, known: tuple[str, ...], needed: tuple[str, ...]) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self._error(place, f"there should be {listed(known).replace(' or ', ' and ')}, not {_short(value)}")
        for key in value:
            if key not in known:
                raise self._unknown((*place, key), key, known)
        for key in needed:
            if value.get(key) is None:
                raise self._error(place, f"there is no {key!r} here; write it")
        return value

    def _list(self, place: Place, value: Any) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise self._error(place, f"{place[-1]!r} is a list of at least one entry, not {_short(value)}")
        return value

    def _path(self, place: Place, value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise self._error(place, f"a checkpoint is named by its path, not by {_short(value)}")
        return _normal(value)

    def _unknown(self, place: Place, key: Any, known: tuple[str, ...]) -> RecipeError:
        if _is_own(key):
            return self._error(
                place,
                f"{key!r} does nothing: LLMTailor's README names such keys and its code reads none. Leave it out: "
                f"optimizer state comes with its weights, and pre_weights, post_weights and slices of no length say "
                f"where norm, lm_head and embeddings come from",
            )
        if key in _MERGEKIT:
            return self._error(
                place,
                f"the key {key!r} is mergekit's and has no meaning in a plan over training checkpoints, which puts "
                f"whole layers together; leave it out",
            )
        near = close(str(key), known, 1)[0]
        return self._error(place, f"the key {key!r} is unknown; did you mean {near!r}? There are {listed(known)}")

    def _error(self, place: Place, problem: str) -> RecipeError:
        return self.document.error(place, f"{problem}.")


def _is_own(key: Any) -> bool:
    return isinstance(key, str) and key.partition(".")[0].lower() == _OWN


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(end) is int for end in value)


def _normal(path: str) -> str:
    return path if is_url(path) else os.path.normpath(path)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}…"


def _sources(data: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the sources of all slices, as far as there are any."""
    slices = data.get("slices")
    for item in slices if isinstance(slices, list) else ():
        held = item.get("sources") if isinstance(item, Mapping) else None
        yield from (source for source in (held if isinstance(held, list) else ()) if isinstance(source, Mapping))
