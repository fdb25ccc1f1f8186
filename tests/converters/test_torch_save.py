"""tailor-convert: torch.save files to and from DCP, against torch's own reading of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tailor_dcp import LayerwisePlanner
from tests.support.world import Model, Param, flat, load, save, state

MODEL = Model((Param("model.layers.0.w", (4, 3)), Param("model.layers.1.w", (5,)), Param("lm_head.w", (2, 2))))


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tailor_dcp.converters.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.filterwarnings("ignore")
def test_a_composite_becomes_one_file_with_every_value_of_its_origin(tmp_path: Path) -> None:
    """What torch.load gives equals what stock dcp.load gives, carried units included."""
    for step in (10, 20, 30):
        save(None, MODEL, step, str(tmp_path / f"step-{step}"), "parity")
    done = run(tmp_path / "step-30", tmp_path / "all.pt", "--to", "torch", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] == (tmp_path / "all.pt").stat().st_size
    converted = flat(torch.load(tmp_path / "all.pt", weights_only=True))
    for key, value in load(None, MODEL, str(tmp_path / "step-30")).items():
        assert torch.equal(torch.as_tensor(converted[key]), torch.as_tensor(value)), key


@pytest.mark.filterwarnings("ignore")
def test_a_file_becomes_a_checkpoint_that_can_be_carried_from(tmp_path: Path) -> None:
    """Stock dcp.load reads it, and a later save with it as base writes less."""
    torch.save(state(MODEL, 10, None), tmp_path / "all.pt")
    done = run(tmp_path / "all.pt", tmp_path / "step-10", "--to", "dcp")
    assert done.returncode == 0, done.stderr
    assert load(None, MODEL, str(tmp_path / "step-10"))["train.step"] == 10
    planner = LayerwisePlanner("parity", base=tmp_path / "step-10")
    dcp.save(state(MODEL, 20, None), checkpoint_id=tmp_path / "step-20", planner=planner)
    assert (tmp_path / "step-20" / "carried").exists()


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, sentinel: str) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.sentinel,))


@pytest.mark.filterwarnings("ignore")
def test_code_in_a_file_or_in_an_entry_is_not_run(tmp_path: Path) -> None:
    """Both directions refuse in one sentence, leave no output, and do nothing that the input asks for."""
    sentinel = tmp_path / "attacked"
    torch.save({"model": Attack(str(sentinel))}, tmp_path / "bad.pt")
    dcp.save({"model": {"layers.0.w": torch.ones(2)}, "x": Attack(str(sentinel))}, checkpoint_id=tmp_path / "step-1")
    for source, target, to in (("bad.pt", "out", "dcp"), ("step-1", "out.pt", "torch")):
        done = run(tmp_path / source, tmp_path / target, "--to", to)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "safe" in done.stderr
        assert not (tmp_path / target).exists()
    assert not sentinel.exists()


def test_wrong_usage_is_one_sentence(tmp_path: Path) -> None:
    """A target that exists, a source that does not, and nothing to convert are each said."""
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    (tmp_path / "there").mkdir()
    for source, target, to, words in (
        ("a.pt", "there", "dcp", "exists already"),
        ("a.pt", "b.pt", "torch", "nothing to convert"),
        ("none.pt", "new", "dcp", "none.pt"),
    ):
        done = run(tmp_path / source, tmp_path / target, "--to", to)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr
