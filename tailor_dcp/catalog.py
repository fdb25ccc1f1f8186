"""The catalog: what a source holds, in the keys of the layout, with no tensor read yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tailor_dcp.errors import ConversionError
from tailor_dcp.layers import LayerMap
from tailor_dcp.names import close, listed, matches
from tailor_dcp.units import WEIGHT

from .tensors import Readable, cast

MODEL = "model."
STATE = "optim.state."
STEP = "step"


@dataclass(frozen=True)
class Catalog:
    """A checkpoint in the layout's terms, wherever its bytes lie.

    Tied weights are under all of their names, which are given one and the same ``Readable`` object:
    whoever writes a format that stores them once can see it.

    Attributes:
        source: the file or folder it was found in.
        format: the format's name, as ``--from`` takes it.
        weights: parameters and persistent buffers by FQN; the fp32 master where training keeps one.
        state: the optimizer's state: FQN, then kind (``exp_avg``, ``step`` as a 0-d fp32 tensor).
        groups: the optimizer's param groups, each with its list of FQNs under ``params``.
        train: everything else, as it goes under ``train.``; plain values and small tensors.
        buffers: which of the weights are buffers, if the source tells.
        frozen: which of the weights are frozen parameters, if the source tells.
        files: files that are carried along and given back (configuration, tokenizer, …), by their name.
        notes: sentences that the user should read.
        dtypes: the dtype that training has what is stored in a narrower one, by FQN and kind.
    """

    source: Path
    format: str
    weights: Mapping[str, Readable] = field(default_factory=dict)
    state: Mapping[str, Mapping[str, Readable]] = field(default_factory=dict)
    groups: tuple[Mapping[str, Any], ...] = ()
    train: Mapping[str, Any] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()
    files: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    dtypes: Mapping[tuple[str, str], torch.dtype] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Readable]:
        """All tensors by key."""
        found = {MODEL + fqn: tensor for fqn, tensor in self.weights.items()}
        for fqn, kinds in self.state.items():
            found |= {f"{STATE}{fqn}.{kind}": tensor for kind, tensor in kinds.items()}
        return found

    @property
    def ties(self) -> dict[str, str]:
        """The other names of tied weights, and the first name of each."""
        first: dict[int, str] = {}
        return {
            fqn: leader for fqn, tensor in self.weights.items() if (leader := first.setdefault(id(tensor), fqn)) != fqn
        }

    @property
    def stored(self) -> dict[str, Readable]:
        """The weights, each under its first name only."""
        ties = self.ties
        return {fqn: tensor for fqn, tensor in self.weights.items() if fqn not in ties}

    @property
    def bytes(self) -> int:
        """The bytes of all tensors, tied ones counted once."""
        return sum(tensor.bytes for tensor in {id(t): t for t in self.tensors.values()}.values())

    @property
    def source_bytes(self) -> int:
        """The bytes of all tensors as the source stores them, tied ones counted once."""
        return sum(t.source.bytes for t in {id(t.source): t for t in self.tensors.values()}.values())


def weights_only(catalog: Catalog) -> Catalog:
    """Leave out the optimizer and everything that belongs to training."""
    zero = catalog.train.get("zero")
    told: Mapping[str, Any] = zero if isinstance(zero, Mapping) else {}
    present = frozenset(catalog.weights)
    return replace(
        catalog,
        state={},
        groups=(),
        train={},
        buffers=catalog.buffers | (frozenset(told.get("buffers") or ()) & present),
        frozen=catalog.frozen | (frozenset(told.get("frozen") or ()) & present),
    )


def only_layers(catalog: Catalog, pattern: str) -> Catalog:
    """Keep the layers that a glob means, weights and optimizer state alike.

    Raises:
        ConversionError: no layer is meant.
    """
    layers = LayerMap()
    names = dict.fromkeys(layers.layer(fqn) for fqn in [*catalog.weights, *catalog.state])
    kept = {name for name in names if matches(name, pattern)}
    if not kept:
        raise ConversionError(
            f"{catalog.source} has no layer that {pattern!r} means; did you mean {listed(close(pattern, names))}?"
        )

    def among(fqns: Iterable[str]) -> list[str]:
        return [fqn for fqn in fqns if layers.layer(fqn) in kept]

    return replace(
        catalog,
        weights={fqn: catalog.weights[fqn] for fqn in among(catalog.weights)},
        state={fqn: catalog.state[fqn] for fqn in among(catalog.state)},
        groups=tuple({**group, "params": among(group["params"])} for group in catalog.groups),
        buffers=frozenset(among(catalog.buffers)),
        frozen=frozenset(among(catalog.frozen)),
    )


def in_training(catalog: Catalog) -> Catalog:
    """Give what is stored narrower than training has it training's dtype; tied weights stay one."""
    known: dict[tuple[int, torch.dtype | None], Readable] = {}

    def wide(fqn: str, kind: str, tensor: Readable) -> Readable:
        dtype = catalog.dtypes.get((fqn, kind))
        return known.setdefault((id(tensor), dtype), cast(tensor, dtype))

    return replace(
        catalog,
        weights={fqn: wide(fqn, WEIGHT, tensor) for fqn, tensor in catalog.weights.items()},
        state={
            fqn: {kind: wide(fqn, kind, tensor) for kind, tensor in kinds.items()}
            for fqn, kinds in catalog.state.items()
        },
        dtypes={},
    )


def in_dtype(catalog: Catalog, dtype: torch.dtype) -> Catalog:
    """Give the weights a dtype; the optimizer's state and what is not of floating point keep their own."""
    converted = {id(tensor): cast(tensor, dtype) for tensor in catalog.weights.values()}
    return replace(catalog, weights={fqn: converted[id(tensor)] for fqn, tensor in catalog.weights.items()})
