"""Fixtures shared by all tests, and how hard Hypothesis tries."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tailor_dcp import lineage
from tests.support.fleet import Fleet
from tests.support.stores import S3, empty_memory, memory_run, s3_run

_LONG = bool(os.environ.get("TAILOR_TEST_LONG"))
settings.register_profile(
    "tailor",
    deadline=None,  # machines are noisy, and saving is I/O
    max_examples=200 if _LONG else 25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    print_blob=True,
)
settings.load_profile("tailor")


@pytest.fixture(autouse=True)
def _no_past() -> None:
    """Let no test see what an earlier one saved or loaded."""
    lineage.forget()


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    """Four processes that save."""
    workers = Fleet(4)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def stock_fleet() -> Iterator[Fleet]:
    """Two processes that know only stock torch: importing tailor_dcp fails in them."""
    workers = Fleet(2, stock=True)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """An S3 server of our own, which fsspec is configured to use."""
    server = S3()
    yield server
    server.close()


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that everybody can write to; pytest's own are for one user alone."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    subprocess.run(["chmod", "-R", "u+rwX", folder], check=True)
    shutil.rmtree(folder)


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an empty folder in a store."""
    if request.param == "memory":
        empty_memory()
        yield memory_run()
    else:
        request.getfixturevalue("s3")
        yield s3_run()
