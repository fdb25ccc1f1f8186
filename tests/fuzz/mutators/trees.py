"""Changing plain data, as JSON has it."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import Any

from tests.fuzz.mutators.values import NUMBERS, TEXTS, Mutate

_ODD = (None, True, False, 1.5, -0.0, float("inf"), float("nan"))
_CONTAINERS = ("[]", "{}", "[[]]", '{"": null}', "[{}]", "[0,0]", "[null]", "[" * 30 + "]" * 30)


def jsons(words: Sequence[str]) -> Mutate:
    """Return a mutator of JSON documents."""

    def mutate(data: bytes, random: Random) -> bytes:
        made = change_tree(copy.deepcopy(_loaded(data)), random, words)
        return json.dumps(made, separators=(",", ":")).encode()

    return mutate


def change_tree(tree: Any, random: Random, words: Sequence[str]) -> Any:
    """Change a tree in a few places."""
    for _ in range(random.choice((1, 1, 2, 4))):
        places = _places(tree) if isinstance(tree, dict | list) else []
        if not places:
            return {random.choice(words): _leaf(random, words)}
        held, key = random.choice(places)
        _change(held, key, random, words)
    return tree


def _change(held: Any, key: Any, random: Random, words: Sequence[str]) -> None:
    match random.randrange(7):
        case 0:
            del held[key]
        case 1 | 2:
            held[key] = _leaf(random, words)
        case 3 if isinstance(held, dict):
            held[random.choice(words)] = copy.deepcopy(held[key])
        case 3:
            held.insert(key, copy.deepcopy(held[key]))
        case 4 if isinstance(held, list):
            held.insert(key, _leaf(random, words))
        case 5:
            held[key] = [held[key]]
        case _:
            held[key] = {random.choice(words): held[key]}


def _leaf(random: Random, words: Sequence[str]) -> Any:
    match random.randrange(8):
        case 0:
            return random.choice(NUMBERS)
        case 1:
            return random.choice(TEXTS)
        case 2:
            return random.choice(_ODD)
        case 3:
            return json.loads(random.choice(_CONTAINERS))
        case 4:
            return random.randrange(-3, 70)
        case _:
            return random.choice(words)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Return each container in the tree with each of its keys or indexes."""
    found, stack = [], [tree]
    while stack:
        held = stack.pop()
        for key, value in held.items() if isinstance(held, dict) else enumerate(held):
            found.append((held, key))
            if isinstance(value, dict | list):
                stack.append(value)
    return found


@lru_cache(maxsize=256)
def _loaded(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
