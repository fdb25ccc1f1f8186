"""All attacks, module by module."""

from __future__ import annotations

from tests.attacks import byte_entries, metadata, models, names, texts, zero
from tests.attacks.attack import Gallery

GALLERIES: tuple[Gallery, ...] = (
    metadata.attack, names.attack, byte_entries.attack, zero.attack, models.attack, texts.attack,
)  # fmt: skip
