"""Sources: which entry of which checkpoint fills each key of a state dict that is being loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import STORAGE_TYPES

from tailor_dcp.base import open_base
from tailor_dcp.contents import Contents
from tailor_dcp.errors import LoadError
from tailor_dcp.layers import Entry, LayerMap
from tailor_dcp.layers import Path as KeyPath
from tailor_dcp.location import METADATA, Location, locate
from tailor_dcp.names import alternatives, below, close, listed, matches
from tailor_dcp.ties import find_ties


@dataclass(frozen=True)
class Wishes:
    """What a caller asks to be loaded.

    Attributes:
        layers: globs of the layers to load; None for everything there is.
        steps: for globs of layers, the step that they come from.
        rename: prefixes of parameter names in the checkpoint, each with the one it fills in the state dict.
    """

    layers: tuple[str, ...] | None = None
    steps: Mapping[str, int] = field(default_factory=dict)
    rename: Mapping[str, str] = field(default_factory=dict)

    @property
    def mixed(self) -> bool:
        """Whether the state differs, after the load, from what the checkpoint holds."""
        return bool(self.layers is not None or self.steps or self.rename)


class Source(NamedTuple):
    """The entry that fills one key."""

    contents: Contents
    key: str

    @property
    def stored(self) -> STORAGE_TYPES:
        """What the checkpoint tells about the entry."""
        return self.contents.base.metadata.state_dict_metadata[self.key]


class Selector(NamedTuple):
    """A name in the caller's wishes that must be met by a layer of the state dict, on one rank at least."""

    option: str
    name: str


@dataclass
class Chosen:
    """What is loaded on this rank.

    Attributes:
        sources: the entry that fills each key that is loaded, in the state dict's order.
        layers: the names of the layers of this rank's state dict.
        met: the selectors that were met here.
    """

    sources: dict[str, Source]
    layers: tuple[str, ...]
    met: set[Selector]


def selectors(wishes: Wishes) -> list[Selector]:
    """Return every name that must be met; each alternative of a glob for itself."""
    named = [("layers", wishes.layers or ()), ("steps", tuple(wishes.steps)), ("rename", tuple(wishes.rename.values()))]
    return [
        Selector(option, name)
        for option, patterns in named
        for pattern in patterns
        for name in ([pattern] if option == "rename" else alternatives(pattern))
    ]


def choose(state: Mapping[str, Any], paths: Mapping[str, KeyPath], contents: Contents, wishes: Wishes) -> Chosen:
    """Find what fills each key of a flattened state dict.

    Args:
        state: the state dict.
        paths: where each key sits in the nested state dict.
        contents: the checkpoint that is being loaded.
        wishes: what the caller asked for.

    Raises:
        LoadError: a key, a layer or a step does not exist where it is asked of.
    """
    return _Chooser(state, paths, contents, wishes).chosen()


class _Chooser:
    def __init__(
        self, state: Mapping[str, Any], paths: Mapping[str, KeyPath], contents: Contents, wishes: Wishes
    ) -> None:
        self.state, self.contents, self.wishes = state, contents, wishes
        tensors = {key for key, value in state.items() if isinstance(getattr(value, "dtype", None), torch.dtype)}
        self.entries = LayerMap().classify({key: paths.get(key, (key,)) for key in state}, tensors)
        self.other_steps: dict[int, Contents] = {}
        self.met: set[Selector] = set()

    def chosen(self) -> Chosen:
        self._check_rename()
        layers = {key: self._layer(key) for key in self.state}
        names = tuple(dict.fromkeys(layer for layer in layers.values() if layer is not None))
        loaded = {name: self._step_of(name) for name in names if self._is_wanted(name)}
        sources = {}
        for key, layer in layers.items():
            if layer in loaded or (layer is None and self.wishes.layers is None):
                step = loaded[layer] if layer is not None else None
                sources[key] = self._source(key, self.contents if step is None else self._at(step))
        self._check_ties(sources)
        return Chosen(sources, names, self.met)

    def _layer(self, key: str) -> str | None:
        """Return a key's layer, called as the checkpoint calls it where it has that key."""
        entry = self.entries.get(key)
        return self.contents.layer(key) or (entry.unit.layer if entry else None)

    def _is_wanted(self, layer: str) -> bool:
        return self.wishes.layers is None or bool(self._meets("layers", layer, self.wishes.layers))

    def _meets(self, option: str, layer: str, patterns: Sequence[str]) -> list[str]:
        """Return the patterns that mean a layer, and remember which of their alternatives did."""
        self.met |= {Selector(option, g) for p in patterns for g in alternatives(p) if matches(layer, g)}
        return [pattern for pattern in patterns if matches(layer, pattern)]

    def _step_of(self, layer: str) -> int | None:
        """Return the step that a layer is asked from, None for the checkpoint that is being loaded."""
        wanted = self._meets("steps", layer, tuple(self.wishes.steps))
        exact = [pattern for pattern in wanted if pattern == layer]
        steps = {self.wishes.steps[pattern] for pattern in exact or wanted}
        if len(steps) > 1:
            raise LoadError(
                f"steps= asks for {layer} from the steps {listed(sorted(map(str, steps)))}; name the layer itself "
                f"in steps= to say which."
            )
        return steps.pop() if steps else None

    def _at(self, step: int) -> Contents:
        if step not in self.other_steps:
            here = self.contents.base.location
            own = step == here.step
            self.other_steps[step] = self.contents if own else Contents(open_base(folder_at(here, step)))
        return self.other_steps[step]

    def _source(self, key: str, contents: Contents) -> Source:
        stored = contents.base.metadata.state_dict_metadata
        wanted = self._renamed(key, contents)
        if wanted in stored:
            return Source(contents, wanted)
        layer = self._layer(key)
        what = f"{wanted} of layer {layer}" if layer else wanted
        asked = f" (to fill {key})" if wanted != key else ""
        way_out = "name another step in steps=" if contents is not self.contents else "load less with layers="
        raise LoadError(
            f"{contents.folder} has no {what}{asked}; the closest that it has is {listed(close(wanted, stored, 1))}: "
            f"take the key out of the state dict, or {way_out}."
        )

    def _renamed(self, key: str, contents: Contents) -> str:
        """Return what a key of the state dict is called in a checkpoint."""
        entry = self.entries.get(key)
        if entry is None or not self.wishes.rename:
            return key
        filled = [(new, old) for old, new in self.wishes.rename.items() if below(entry.fqn, new)]
        if not filled:
            return key
        self.met |= {Selector("rename", new) for new, _ in filled}
        new, old = max(filled, key=lambda names: len(names[0]))
        return _called(key, entry, old + entry.fqn[len(new) :], contents)

    def _check_rename(self) -> None:
        targets = list(self.wishes.rename.values())
        for name in targets:
            if targets.count(name) > 1:
                raise LoadError(f"rename= fills {name} from more than one layer; give each layer of yours one source.")
        fqns = {entry.fqn for entry in self.contents.entries.values()} if targets else set()
        for old in self.wishes.rename:
            if not any(below(fqn, old) for fqn in fqns):
                raise LoadError(
                    f"rename= takes from {old!r}, which {self.contents.folder} does not have; "
                    f"did you mean {listed(close(old, self.contents.layers))}?"
                )

    def _check_ties(self, sources: Mapping[str, Source]) -> None:
        """Parameters that share storage cannot be as of two steps; whichever were read last would win."""
        if not self.other_steps:
            return
        for tie in find_ties({key: self.state[key] for key in sources}):
            other = next((key for key in tie if sources[key].contents is not sources[tie[0]].contents), None)
            if other is not None:
                raise LoadError(
                    f"{tie[0]} and {other} share one storage but are asked from two steps; name both layers, "
                    f"{self._layer(tie[0])} and {self._layer(other)}, with one step in steps=."
                )


def _called(key: str, entry: Entry, fqn: str, contents: Contents) -> str:
    """Return the key of a parameter's weight or state in a checkpoint."""
    head, found, tail = key.rpartition(entry.fqn)
    alike = head + fqn + tail if found else fqn
    keys = contents.by_name.get((fqn, entry.unit.kind), [])
    # A checkpoint may hold several models, such as a moving average beside the trained one.
    return keys[0] if len(keys) == 1 and alike not in keys else alike


def folder_at(here: Location, step: int) -> Path:
    """Return the committed checkpoint of a step in the run and the series of another.

    Raises:
        LoadError: there is none, or several and none that is called like ``here``.
    """
    found: dict[int, list[Path]] = {}
    for child in sorted(here.run.iterdir()):
        other = locate(child / here.series if here.series else child)
        if other.step is not None and other.series == here.series and (other.folder / METADATA).exists():
            found.setdefault(other.step, []).append(other.folder)
    folders = found.get(step, [])
    style = re.sub(r"\d+", str(step), here.name.partition("/")[0])
    alike = [folder for folder in folders if folder.relative_to(here.run).parts[0] == style]
    if len(alike or folders) == 1:
        return (alike or folders)[0]
    if folders:
        names = listed([str(folder) for folder in folders])
        raise LoadError(f"Step {step} may be {names}; give one of them the name that the others of the run have.")
    nearest = sorted(found, key=lambda other: abs(other - step))[:3]
    of = f" of {here.series}" if here.series else ""
    raise LoadError(
        f"{here.run} has no committed checkpoint{of} of step {step}; "
        + (f"the nearest steps that it has are {', '.join(map(str, sorted(nearest)))}." if nearest else "it has none.")
    )
