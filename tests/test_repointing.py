"""Re-pointing: whatever version wrote a checkpoint, nothing is said of it afterwards that was not known before."""

from __future__ import annotations

import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest

from tailor_dcp import prune
from tailor_dcp.compact_plan import Move, Plan
from tailor_dcp.repointing import repoint
from tests.golden import write

WRITERS = ["format-1", "format-1-first", "format-2", "format-2-digest"]


@pytest.fixture(params=WRITERS)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The runs that a version wrote."""
    with tarfile.open(Path(write.__file__).parent / f"{request.param}.tar.xz") as tar:
        tar.extractall(tmp_path / request.param, filter="data")
    return tmp_path / request.param


def metadata(folder: Path) -> Any:
    """Return a checkpoint's metadata as stock pickle sees it."""
    return pickle.loads((folder / ".metadata").read_bytes())


def test_what_had_no_digest_gets_none(written: Path) -> None:
    """What nothing tells of as whole is not told to be whole by a compaction."""
    run = written / "copy"
    before = {path.parent: metadata(path.parent) for path in run.glob("*/.metadata")}
    assert any(one.why_not is None for one in prune(run, compact=0.0).rewrites)
    changed = 0
    for folder, old in before.items():
        new = metadata(folder)
        changed += new.storage_data != old.storage_data
        differ = {key for key in new.tailor if new.tailor[key] != old.tailor.get(key)}
        assert differ <= ({"digest", "sealed"} if "digest" in old.tailor else set())
    assert changed


def test_checksums_keep_their_form(written: Path, tmp_path: Path) -> None:
    """A version that reads format 1 knows them only as dicts."""
    folder = written / "layerwise" / "step-30"
    old = metadata(folder)
    name = next(name for name in old.tailor["crcs"] if "/" not in name)
    live = sorted({(i.offset, i.length) for i in old.storage_data.values() if i.relative_path == name}, reverse=True)
    data = (folder / name).read_bytes()
    new_name = f"{name.removesuffix('.distcp')}-0a1b2c3d.distcp"
    (tmp_path / new_name).write_bytes(b"".join(data[start : start + length] for start, length in live))
    plan = Plan(moves=(Move(new=new_name, old=(f"step-30/{name}",), live=tuple(live)),))
    repoint(folder, folder.parent, tmp_path, plan)
    new = metadata(folder)
    sums, before = new.tailor["crcs"][new_name], old.tailor["crcs"][name]
    assert type(sums) is type(before)
    assert len(sums) == len(before)
    if isinstance(sums, dict):
        for info in new.storage_data.values():
            if info.relative_path == new_name:
                stretch = (folder / new_name).read_bytes()[info.offset : info.offset + info.length]
                assert sums[info.offset] == zlib.crc32(stretch)
