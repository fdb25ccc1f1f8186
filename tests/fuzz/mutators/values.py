"""What mutators put in place of what is there: numbers at the edges, and texts that have led readers astray."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

Mutate = Callable[[bytes, Random], bytes]

NUMBERS = (
    0, 1, -1, 2, 7, 255, 256, 4096, 65535, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 53) + 1,
    (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63), 10**30,
)  # fmt: skip
TEXTS = (
    "", "w", "a.b", "..", "../x", "/etc/passwd", "a\0b", "\x1b[2J", "\n", "é", "\udc80", "x" * 300, "9" * 40,
    "9" * 4400, "{", "}", "{a,b}", "*", "[", "torch.float32", "layers.0", "model.layers.3.weight", "step-7",
    "https://x/y",
)  # fmt: skip
