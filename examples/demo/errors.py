"""What can go wrong in the demo."""

from __future__ import annotations

from pathlib import Path


class DemoError(Exception):
    """The demo cannot go on, or something did not happen as it should have.

    Args:
        message: one sentence for the user.
        log: the file that tells more.
    """

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log
