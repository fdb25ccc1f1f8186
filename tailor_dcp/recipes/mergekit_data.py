"""A plan of mergekit's as plain data: what is merged from where, whichever of its forms it was written in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from tailor_dcp.recipes.mergekit_parameters import Settings


@dataclass(frozen=True)
class PlanSource:
    """One model's share of a slice.

    Attributes:
        model: the model, as the plan writes it.
        layers: the first of its layers and the one after the last; None for all of them.
        parameters: what the plan says for it alone.
        where: what a sentence about it begins with: the file and the line.
    """

    model: str
    layers: tuple[int, int] | None = None
    parameters: Settings = field(default_factory=dict)
    where: str = "the plan"


@dataclass(frozen=True)
class PlanSlice:
    """Layers of the result that are made of as many layers of one or several models.

    Attributes:
        sources: the models, in the plan's order.
        base: the base model, if there is one.
        parameters: what the plan says for the slice.
        where: what a sentence about it begins with.
    """

    sources: tuple[PlanSource, ...]
    base: str | None = None
    parameters: Settings = field(default_factory=dict)
    where: str = "the plan"


@dataclass(frozen=True)
class Plan:
    """A merge plan.

    Attributes:
        method: the merge method's name.
        slices: its slices, in the order of the result's layers. A plan that lists models has one, of all layers.
        base: the base model of slices that name none.
        parameters: what the plan says for the module and for everything, the more special first.
        dtype: what inputs are cast to before they are merged.
        out_dtype: what results are cast to.
        tokenizer: the model whose tokenizer the result has; None for the base model's, or the first.
        chat_template: the chat template's text, or ``auto`` for the one that most models have.
        optimizer: what becomes of moments, where the plan says it; this is our own key.
        name: what the plan is called in messages.
        text: the plan as it was written, for model cards.
    """

    method: str
    slices: tuple[PlanSlice, ...]
    base: str | None = None
    parameters: tuple[Settings, ...] = ()
    dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    optimizer: str | None = None
    name: str = "the plan"
    text: str = ""

    @property
    def models(self) -> tuple[str, ...]:
        """All models that have to be opened, each once, those that are merged first."""
        return tuple(dict.fromkeys(self._models()))

    @property
    def leader(self) -> str:
        """The model that the result's configuration is taken from: the base model, else the first."""
        return self.base or self.slices[0].sources[0].model

    def scopes(self, of: PlanSlice, source: PlanSource | None) -> list[Mapping[str, object]]:
        """Return what is said of parameters, the more special first.

        Args:
            of: the slice.
            source: the model, for what is taken for each.
        """
        own = [] if source is None else [source.parameters]
        return [*own, of.parameters, *self.parameters]

    def _models(self) -> Iterator[str]:
        for one in self.slices:
            yield from (source.model for source in one.sources)
        yield from (one.base for one in self.slices if one.base)
        yield from [self.base] if self.base else []
