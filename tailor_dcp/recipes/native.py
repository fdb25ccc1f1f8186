"""The native recipe: which layers come from where, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

DROP = "drop"
KEEP = "keep"
AVERAGE = "average"


@dataclass(frozen=True)
class Take:
    """Layers that come from a source other than the base.

    Attributes:
        layers: a glob of layers' names in the result; ``{8,9}`` gives alternatives. A layer's own name goes before
            a glob. The name of a block also means those of its parts that are layers, as experts can be; a part's own
            goes before it. What has no ``*`` also adds layers that only the source has.
        source: a checkpoint, ``run@300``, a ZeRO folder or a Hugging Face folder.
        kinds: which of their kinds (``weight``, ``exp_avg``, …); None for all. ``step`` goes with the moments.
    """

    layers: str
    source: str
    kinds: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Recipe:
    """What a merge that computes no value puts together.

    All names of layers are those of the result, with one exception: the left side of ``rename``.

    Attributes:
        base: the source of everything that is not said to come from elsewhere.
        takes: layers from other sources.
        rename: for a layer as its source calls it, the layers of the result that it fills. A layer of the result
            that nothing fills is filled by the one of its own name.
        drop: globs of layers that the result does not have.
        train: the source of everything that belongs to no layer; None for the base, ``drop`` for nothing.
        optimizer: ``keep`` for moments that come with their weights, ``drop`` for none, ``average`` (for averages of
            models alone), or the source that all of them come from.
        max_stale_steps: how many steps a layer may be older than the result; None for any number.
        name: what the recipe is called in messages: its file.
        text: the recipe as it was written, for model cards.
    """

    base: str
    takes: tuple[Take, ...] = ()
    rename: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    train: str | None = None
    optimizer: str = KEEP
    max_stale_steps: int | None = None
    name: str = "the recipe"
    text: str = ""
