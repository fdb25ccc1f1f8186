"""Documents: YAML as plain data that remembers its lines, so that an error can point at one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tailor_dcp.recipes.errors import RecipeError

Place = tuple[str | int, ...]
"""Keys and indexes from the top of a document to a value."""

_LARGEST = 4 << 20
_MOST_VALUES = 100_000
"""PyYAML takes seconds for so many, and aliases make a small file stand for more than memory holds."""


@dataclass(frozen=True)
class Document:
    """A YAML document.

    Attributes:
        name: what it is called in messages: its file.
        data: its content, of plain builtins.
        text: what was read.
        lines: the line of each value, counted from 1.
    """

    name: str
    data: Any
    text: str = ""
    lines: Mapping[Place, int] = field(default_factory=dict, repr=False)

    def line(self, place: Place) -> int | None:
        """Return the line of a value, or of the innermost one around it; None for what was given as plain data."""
        for end in range(len(place), -1, -1):
            here = place[:end]
            for known in (here, (*here[:-1], str(here[-1]))) if here else (here,):  # keys may be numbers
                if known in self.lines:
                    return self.lines[known]
        return None

    def where(self, place: Place) -> str:
        """Return the words that a sentence about a value begins with: the file and the line."""
        line = self.line(place)
        return f"{self.name}, line {line}" if line else self.name

    def error(self, place: Place, problem: str) -> RecipeError:
        """Return the error that says what is wrong with a value."""
        return RecipeError(f"{self.where(place)}: {problem}")


def load(path: Path) -> Document:
    """Read a YAML file; nothing in it is executed.

    Raises:
        RecipeError: it cannot be read, is no YAML, has a key twice, or is too large to be a recipe.
    """
    try:
        text = read(path, _LARGEST, "recipe", "a recipe's YAML file").decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text, so it is no recipe.") from error
    return parse(text, str(path))


def read(path: Path, largest: int, kind: str, wanted: str) -> bytes:
    """Return all that a file holds.

    Args:
        path: the file.
        largest: bytes that it may have.
        kind: what it is, for sentences.
        wanted: what to name instead, for sentences.

    Raises:
        RecipeError: it cannot be read, or is too large.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise RecipeError(f"{path} is no regular file; name {wanted}.")  # a pipe would be waited for
    try:
        with path.open("rb") as stream:
            raw = stream.read(largest + 1)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}; name {wanted}.") from error
    if len(raw) > largest:
        raise RecipeError(f"{path} is larger than {largest >> 20} MiB, so it is no {kind}.")
    return raw


def parse(text: str, name: str) -> Document:
    """Parse YAML text.

    Raises:
        RecipeError: see ``load``.
    """
    try:
        loader = _Loader(text, name)
        node = loader.get_single_node()
        lines = _Lines(name)
        lines.walk(node, ())
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{name}{line}: this is no YAML ({error.problem or error.context}).") from error
    except RecipeError:
        raise
    except Exception as error:  # a tag that does not fit its value, as !!bool x, leads PyYAML to almost anything
        why = f"{error} ".splitlines()[0].strip()
        raise RecipeError(f"{name} is no YAML that can be read: {why}.") from error
    return Document(name, data, text, lines.found)


class _Loader(yaml.SafeLoader):
    """Stops where a file has more values than a recipe would."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self._document = name
        self._count = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Make a node of what is read next."""
        self._count += 1
        if self._count > _MOST_VALUES:
            raise _too_many(self._document)
        return super().compose_node(parent, index)


def _too_many(name: str) -> RecipeError:
    return RecipeError(f"{name} stands for more than {_MOST_VALUES} values, so it is no recipe.")


class _Lines:
    """Notes the line of each value of a tree of nodes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.found: dict[Place, int] = {}
        self._count = 0

    def walk(self, node: yaml.Node | None, place: Place, line: int | None = None) -> None:
        if node is None:
            raise RecipeError(f"{self.name} is empty; write what the merge shall do, at least a base.")
        self._count += 1
        if self._count > _MOST_VALUES:
            raise _too_many(self.name)
        self.found[place] = node.start_mark.line + 1 if line is None else line
        if isinstance(node, yaml.MappingNode):
            self._walk_mapping(node, place)
        elif isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                self.walk(item, (*place, number))

    def _walk_mapping(self, node: yaml.MappingNode, place: Place) -> None:
        seen: set[str] = set()
        for key, value in node.value:
            here = key.start_mark.line + 1
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else repr(key.tag)
            if name in seen and name != "<<":
                raise RecipeError(f"{self.name}, line {here}: {name!r} is there twice; leave one.")
            seen.add(name)
            self.walk(value, (*place, name), here)
