"""Findings: what is wrong with a checkpoint, or could not be checked, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["good", "damaged", "unverifiable"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or that nothing tells whether it is right.

    Attributes:
        checkpoint: the checkpoint's name: its path in what was verified.
        state: ``damaged`` or ``unverifiable``.
        what: what it is, as a sentence.
        file: the file, as the checkpoint calls it; None where it is none's fault.
        layer: the layer that it concerns; None for what belongs to no layer, and for whole files.
        kind: of what of that layer: ``weight`` or the optimizer state's name.
        key: the entry of the state dict; None for several.
        chunk: where in that tensor its chunk begins, one number a dimension.
        blobs: stretches of files that it concerns.
        bytes: how many bytes these have.
        undecided: of what is unverifiable, whether it may well be damaged: it could not be read, or it contradicts
            something else and nothing tells which of the two is right. What merely has no checksum is not that.
    """

    checkpoint: str
    state: State
    what: str
    file: str | None = None
    layer: str | None = None
    kind: str | None = None
    key: str | None = None
    chunk: tuple[int, ...] | None = None
    blobs: int = 0
    bytes: int = 0
    undecided: bool = False


@dataclass(frozen=True)
class Verdict:
    """What came of one checkpoint.

    Attributes:
        name: its path in what was verified; of a checkpoint that was verified alone, its name in its run.
        path: its folder.
        step: its step.
        save_id: the save that made it.
        time: when it was saved, seconds since the epoch.
        state: ``damaged`` if anything is, else ``unverifiable`` if anything is that, else ``good``.
        files: data files that it refers to.
        blobs: stretches of these that it needs.
        bytes: bytes of these.
        unverifiable_bytes: of how many of these nothing tells whether they are right.
    """

    name: str
    path: str
    step: int | None
    save_id: str
    time: float
    state: State
    files: int
    blobs: int
    bytes: int
    unverifiable_bytes: int


@dataclass(frozen=True)
class Verification:
    """What ``verify`` found.

    Attributes:
        path: the checkpoint, or the run.
        checkpoints: the verdict on each, in the order in which they were saved.
        findings: what is wrong, and what could not be checked.
        notes: what is right, but not as it was made: copies that were links, folders with other names.
        files: data files, each once, whatever it is called.
        blobs: stretches of them that were checked, each once.
        bytes: bytes that were read.
        seconds: how long it took.
    """

    path: str
    checkpoints: tuple[Verdict, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    files: int
    blobs: int
    bytes: int
    seconds: float

    @property
    def state(self) -> State:
        """The worst of all checkpoints' states, and of what could not be looked into."""
        return worst([*(one.state for one in self.checkpoints), *(one.state for one in self.findings)])

    @property
    def damaged(self) -> tuple[Finding, ...]:
        """What is wrong."""
        return tuple(finding for finding in self.findings if finding.state == "damaged")

    @property
    def unverifiable(self) -> tuple[Finding, ...]:
        """What could not be checked."""
        return tuple(finding for finding in self.findings if finding.state == "unverifiable")

    @property
    def undecided(self) -> tuple[Finding, ...]:
        """What may be damaged, and could not be read or not be told from what is right."""
        return tuple(finding for finding in self.findings if finding.undecided)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain builtins, for ``--json``."""
        return {"state": self.state, **asdict(self)}


def worst(states: Sequence[State]) -> State:
    """Return the worst of several states; of none, ``good``."""
    order: tuple[State, ...] = ("damaged", "unverifiable")
    return next((state for state in order if state in states), "good")
