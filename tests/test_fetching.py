"""Fetching: whatever is asked for, in whatever order, arrives where it should."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tailor_dcp import fetching
from tailor_dcp.errors import DamagedSourceError
from tailor_dcp.fetching import Fetch, fetch
from tailor_dcp.open_files import close_files, read_all_into

SIZE = 20_000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / "a", folder / "b"]
    for number, path in enumerate(paths):
        path.write_bytes(random.Random(number).randbytes(SIZE))
    return paths


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(st.tuples(st.integers(0, 1), st.integers(0, SIZE), st.integers(0, 3000)), max_size=40),
    threads=st.integers(1, 3),
    little=st.sampled_from([0, SIZE]),
)
def test_everything_arrives(
    files: list[Path], asked: list[tuple[int, int, int]], threads: int, little: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_PIECE", 1000)
    monkeypatch.setattr(fetching, "_LITTLE", little)
    monkeypatch.setattr(fetching, "_ANNOUNCED", 3)
    wanted = [(files[n], start, min(length, SIZE - start)) for n, start, length in asked]
    memory = [bytearray(length) for _, _, length in wanted]
    fetch([Fetch(path, start, memoryview(m)) for (path, start, _), m in zip(wanted, memory, strict=True)], threads)
    for (path, start, length), held in zip(wanted, memory, strict=True):
        assert held == path.read_bytes()[start : start + length]


def test_short_reads_go_on(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel may give less than was asked for, and stop in the middle of any buffer."""
    import os

    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, into, at: real(f, [into[0][:7]], at))
    memory = [bytearray(10), bytearray(0), bytearray(25)]
    read_all_into(files[0], 5, [memoryview(m) for m in memory])
    assert b"".join(memory) == files[0].read_bytes()[5:40]


@pytest.mark.parametrize("little", [0, SIZE])
def test_a_file_that_ends_before(
    files: list[Path], tmp_path: Path, little: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever thread meets it."""
    monkeypatch.setattr(fetching, "_LITTLE", little)
    path = tmp_path / "short"
    path.write_bytes(b"123")
    with pytest.raises(DamagedSourceError, match="short ends before byte 10"):
        fetch([Fetch(path, 0, memoryview(bytearray(10)))], 2)
    with pytest.raises(DamagedSourceError, match="cannot be opened"):
        fetch([Fetch(tmp_path / "none", 0, memoryview(bytearray(1))), Fetch(path, 0, memoryview(bytearray(3)))], 2)
    close_files()
