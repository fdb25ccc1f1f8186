"""Converted ZeRO checkpoints and live engines' own DCP saves: each is loaded by the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tailor_dcp.converters.convert import convert
from tailor_dcp.converters.options import Options
from tests.support.zero_cases import check_same
from tests.support.zero_engines import Setup

pytest.importorskip("deepspeed")


@pytest.mark.parametrize(("before", "after"), [(3, 3), (2, 3), (3, 2)])
def test_an_engine_loads_what_was_converted(before: int, after: int, tmp_path: Path) -> None:
    """DeepSpeed saves, the converter makes it a DCP checkpoint, EngineState loads that."""
    setup = Setup(before, 2, groups=2, family="odd")
    trained = setup.call("train_and_save", str(tmp_path / "run"))[0]
    convert(tmp_path / "run", tmp_path / "step-2", "dcp", "zero")
    found = Setup(after, 2, groups=2, family="odd").call("load_state", str(tmp_path / "step-2"))[0]
    check_same(found["saved"], trained["saved"])
    if before == after:
        assert found["losses"] == trained["losses"]


@pytest.mark.parametrize(("stage", "family"), [(3, "tied_llama"), (2, "tied_llama"), (2, "odd")])
def test_deepspeed_loads_what_an_engine_saved_with_dcp(stage: int, family: str, tmp_path: Path) -> None:
    """EngineState saves, the converter makes it a ZeRO checkpoint, DeepSpeed loads that."""
    setup = Setup(stage, 2, groups=2, family=family)
    trained = setup.call("save_state", str(tmp_path / "step-2"))[0]
    # The number of ranks is known from their generators; what the engine computes in is not.
    convert(tmp_path / "step-2", tmp_path / "run", f"zero{stage}", "dcp", Options(dtype=torch.bfloat16))
    found = setup.call("load_and_train", str(tmp_path / "run"))[0]
    check_same(found["saved"], trained["saved"])
    assert found["losses"] == trained["losses"]
