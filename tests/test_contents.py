"""Contents: which files a checkpoint may reach, also through a link to its folder."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tailor_dcp import LayerwiseReader, materialize, open_checkpoint, verify
from tailor_dcp.errors import LoadError
from tests.support.runs import L0, Run, due, metadata

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=["link", "reference"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """Two checkpoints, the later with one layer of its own."""
    run = Run(tmp_path / "data" / "run")
    run.save(100)
    run.save(200, due(L0), carry=request.param)
    return run


def test_a_checkpoint_behind_a_link_is_as_good_as_in_its_place(run: Run, tmp_path: Path) -> None:
    """Also what it refers to, which is beside the folder that the link leads to."""
    link = tmp_path / "home" / "ckpt"
    link.parent.mkdir()
    link.symlink_to(run.path(200))
    assert verify(link).state == "good"
    assert torch.equal(open_checkpoint(link)[f"model.{L0}.w"], open_checkpoint(run.path(200))[f"model.{L0}.w"])
    target = run.state(0)
    dcp.load(target, storage_reader=LayerwiseReader(link, verify=True))
    assert torch.equal(target["model"][f"{L0}.w"], open_checkpoint(run.path(200))[f"model.{L0}.w"])
    materialize(link, tmp_path / "whole")
    assert run.steps_of(tmp_path / "whole") == run.steps_of(200)


@pytest.mark.parametrize("way", ["dots", "absolute", "link"])
def test_a_link_to_a_folder_opens_no_way_out_of_that_folders_run(run: Run, tmp_path: Path, way: str) -> None:
    """What is beside the link is within reach as ever; what is elsewhere is not, for the folder behind it neither."""
    secret = tmp_path / "elsewhere" / "secret"
    secret.parent.mkdir()
    secret.write_bytes(bytes(10_000))
    folder = run.path(200)
    (folder / "inner").symlink_to(secret)
    dots = os.path.relpath(secret, folder)
    name = {"dots": dots, "absolute": str(secret), "link": "inner"}[way]
    told = metadata(folder)
    index = next(index for index in told.storage_data if index.fqn == f"model.{L0}.w")
    told.storage_data[index].relative_path = name
    (folder / ".metadata").write_bytes(pickle.dumps(told))
    link = tmp_path / "home" / "ckpt"
    link.parent.mkdir()
    link.symlink_to(folder)
    for path in (folder, link):
        with pytest.raises(LoadError, match="outside of its run"):
            open_checkpoint(path)[f"model.{L0}.w"]
        assert any("lies outside of the run" in one.what for one in verify(path).damaged)
