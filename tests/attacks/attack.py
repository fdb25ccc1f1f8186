"""An attack: a hostile file or folder, the sentence that says what it tries, and what takes such files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.attacks.ground import Ground

Build = Callable[[Ground], Path]


@dataclass(frozen=True)
class Attack:
    """One hostile file or folder.

    Attributes:
        name: what it is called.
        tries: what it tries, in one sentence.
        kind: what it is taken for: a key of ``entries.ENTRIES``.
        build: makes it in a folder of its own, and returns what the product is given.
    """

    name: str
    tries: str
    kind: str
    build: Build


@dataclass
class Gallery:
    """The attacks of one module."""

    group: str
    kind: str
    attacks: list[Attack] = field(default_factory=list)

    def __call__(self, build: Build) -> Build:
        """Hang up a builder: its name is the attack's, the first line of its docstring the sentence."""
        self.add(build.__name__.replace("_", " "), (build.__doc__ or "").splitlines()[0], build)
        return build

    def add(self, name: str, tries: str, build: Build, kind: str | None = None) -> None:
        """Hang up an attack that is one of a family."""
        self.attacks.append(Attack(name, tries, kind or self.kind, build))

    def of(self, kind: str) -> Callable[[Build], Build]:
        """Hang up a builder of another kind of file."""

        def hang(build: Build) -> Build:
            self.add(build.__name__.replace("_", " "), (build.__doc__ or "").splitlines()[0], build, kind)
            return build

        return hang
