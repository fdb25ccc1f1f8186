"""How much memory a piece of work holds: anonymous memory beyond what was there at its start, sampled."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

_EVERY = 0.005  # seconds


class Watch:
    """Samples this process's anonymous memory while its ``with`` block runs.

    Attributes:
        peak: the most bytes that were held beyond those at the start.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        self._before = _anonymous()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(_EVERY):
            self.peak = max(self.peak, _anonymous() - self._before)


def _anonymous() -> int:
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
