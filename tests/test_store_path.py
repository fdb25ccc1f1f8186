"""Store paths: what they are called, what they ask a store for, and how they fail."""

from __future__ import annotations

import pickle
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailor_dcp.location import is_within, locate, same_folder
from tailor_dcp.store_path import StorePath, StoreUnavailableError, is_url, place
from tests.support.s3_proxy import Fault, kinds
from tests.support.stores import S3, memory_run, s3_run

NAMES = st.lists(st.sampled_from(["a", "b c", "step-1", ".x"]), min_size=1, max_size=4)


@given(NAMES, NAMES)
def test_names_are_those_of_pathlib(above: list[str], below: list[str]) -> None:
    """Parent, name, parts and relations agree with a POSIX path of the same key."""
    path, plain = place("memory://" + "/".join(above)), PurePosixPath(*above)
    here, there = path / "/".join(below), plain.joinpath(*below)
    assert isinstance(here, StorePath)
    assert (here.name, here.suffix, here.key) == (there.name, there.suffix, str(there))
    assert [p.key for p in here.parents] == ["" if str(p) == "." else str(p) for p in there.parents]
    assert here.relative_to(path) == there.relative_to(plain)
    assert here.is_relative_to(path) and path.is_relative_to(here) == plain.is_relative_to(there)
    assert pickle.loads(pickle.dumps(here)) == here and hash(place(str(here))) == hash(here)


def test_what_is_local_stays_pathlib(tmp_path: Path) -> None:
    assert type(place(str(tmp_path))) is type(tmp_path) and place(f"file://{tmp_path}") == tmp_path
    assert not is_url(f"file://{tmp_path}") and is_url("s3://bucket/x")


def test_one_folder_has_one_name() -> None:
    run = place("memory://bucket/run")
    assert same_folder(place("memory:///bucket/run/"), run) and same_folder(run / "x/.././y/..", run)
    assert run / "/other/key" == place("memory://other/key")
    assert is_within(run / "../run/step-1/file", run) and not is_within(run / "../runs", run)
    assert not is_within(run / "/bucket/running", run) and not is_within(Path("/bucket/run/x"), run)


def test_step_run_and_series_of_a_url() -> None:
    here = locate("memory://bucket/run/checkpoint-200/optimizer_0")
    assert (str(here.run), here.step, here.series) == ("memory://bucket/run", 200, "optimizer_0")
    assert here.name == "checkpoint-200/optimizer_0"
    assert locate("memory://bucket/run/best").step is None


@pytest.mark.parametrize("url", ["nonsuch://x/y", "simplecache::memory://x"])
def test_no_such_store(url: str) -> None:
    with pytest.raises(StoreUnavailableError) as caught:
        place(url)
    assert url in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [memory_run, s3_run])
def test_files_and_folders(s3: S3, make: object) -> None:
    """An object is a file, a prefix of keys is a folder, and what is not there is nothing."""
    run = place(make())  # type: ignore[operator]
    for name in ("step-1/.metadata", "step-1/a.distcp", "step-2/.metadata"):
        (run / name).write_bytes(name.encode())
    file = run / "step-1/a.distcp"
    assert file.read_bytes() == b"step-1/a.distcp" and file.stat().st_size == 15 and file.is_file()
    assert run.is_dir() and not run.is_file() and not (run / "step-3").exists() and not (run / "step").exists()
    assert [path.name for path in run.iterdir()] == ["step-1", "step-2"]
    assert [path.parent.name for path in run.glob("*/.metadata")] == ["step-1", "step-2"]
    assert sorted(path.name for path in run.rglob("*")) == [".metadata", ".metadata", "a.distcp"]
    before = file.stat()
    file.write_bytes(b"other bytes!!!!")
    assert file.stat().st_ino != before.st_ino and file.stat().st_size == before.st_size
    file.unlink()
    file.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        file.read_bytes()


def test_each_call_costs_one_request(s3: S3) -> None:
    path = place(s3_run()) / "x"
    with s3.proxy.counted() as noted:
        path.write_bytes(b"x")
        path.stat()
    assert kinds(noted) == {"PUT": 1, "HEAD": 1}


def test_what_a_store_says_becomes_one_sentence(s3: S3) -> None:
    path = place(s3_run()) / "x"
    with s3.proxy.failing(Fault("PUT", "/x", "503")), pytest.raises(OSError, match="reduce") as caught:
        path.write_bytes(b"x")
    assert caught.value.filename == str(path) and "\n" not in str(caught.value.strerror)


def test_only_what_begins_with_a_scheme_is_a_url(tmp_path: Path) -> None:
    """A name may have anything in it; and what fsspec calls ``local`` has symbolic links, which only pathlib sees."""
    assert place(f"local://{tmp_path}") == place(f"{tmp_path}") == tmp_path
    for name in (f"{tmp_path}/a://b", "://x", "runs/a%20b c"):
        assert not is_url(name) and place(name) == Path(name)


def test_a_bucket_that_is_a_checkpoint_is_its_own_run(s3: S3) -> None:
    """What lies beside it are other people's buckets."""
    for bucket in (place("s3://bucket"), place("s3://step-100")):
        here = locate(bucket)
        assert here.run == bucket and here.name == bucket.name
        assert not is_within(bucket / "/other/key", here.run) and is_within(bucket / "key", here.run)


def test_a_url_without_a_store_of_its_own_is_found_again() -> None:
    """To fsspec a web server's whole URL is the key."""
    pytest.importorskip("aiohttp")
    path = place("http://127.0.0.1:9/run/step-1")
    assert str(path) == "http://127.0.0.1:9/run/step-1" and place(str(path)) == path
    assert str(locate(path).run) == "http://127.0.0.1:9/run"
