"""The Hugging Face Trainer's own DeepSpeed checkpoints, from real runs of it at two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tailor_dcp.converters.convert import convert
from tailor_dcp.converters.options import Options
from tailor_dcp.converters.zero_source import open_source

pytest.importorskip("deepspeed")
pytest.importorskip("accelerate")
_ROOT = Path(__file__).parents[2]


def _run(folder: Path, *arguments: str) -> list[float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(_ROOT / "tests" / "support" / "zero_trainer.py"), str(folder), *arguments]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, cwd=_ROOT, capture_output=True, timeout=300)
    losses: list[float] = json.loads((folder / "losses.json").read_text())
    return losses


@pytest.mark.long
@pytest.mark.parametrize("stage", ["3", "2"])
def test_the_trainer_resumes_from_what_was_converted(stage: str, tmp_path: Path) -> None:
    """Through DCP and back; losses, dropout included, are those of the Trainer's own resume."""
    first = _run(tmp_path / "run", stage, "2")
    source, back = tmp_path / "run" / "checkpoint-2", tmp_path / "back" / "checkpoint-2"
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    convert(source, tmp_path / "dcp", "dcp")
    back.parent.mkdir()
    convert(tmp_path / "dcp", back, f"zero{stage}")
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    expected = _run(tmp_path / "run", stage, "4", str(source))
    found = _run(tmp_path / "back", stage, "4", str(back))
    assert found == expected and len(found) == 4 and found[:2] == first
    # Whole weights are rounded copies of the masters; the scripts are DeepSpeed's.
    left = {"model.safetensors", "zero_to_fp32.py", "zero_to_torch.py"}
    names = {path.name for path in source.iterdir()} - left
    assert names == {path.name for path in back.iterdir()}


@pytest.mark.long
def test_what_is_read_of_it(tmp_path: Path) -> None:
    """Its groups with their own weight decay, ties, progress, and files."""
    _run(tmp_path / "run", "3", "2")
    catalog = open_source(tmp_path / "run" / "checkpoint-2", Options())
    assert [group["weight_decay"] for group in catalog.groups] == [0.1, 0.0]
    assert all("norm" in name for name in catalog.groups[1]["params"])
    assert catalog.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert json.loads(catalog.train["trainer_state"])["global_step"] == catalog.train["step"] == 2
    assert {"config.json", "generation_config.json", "training_args.bin"} <= catalog.files.keys()
