"""Workers with DeepSpeed live as long as the tests do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.zero_engines import close_fleets


@pytest.fixture(scope="session", autouse=True)
def _fleets_end() -> Iterator[None]:
    """Stop the workers that were started."""
    yield
    close_fleets()
