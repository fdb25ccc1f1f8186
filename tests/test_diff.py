"""How far units moved, against sums done by hand with numpy over what stock torch loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import save_file
from typer.testing import CliRunner

from tailor_dcp import diff, forget
from tailor_dcp.cli import app
from tailor_dcp.diff import NoArithmeticError, NothingInCommonError
from tailor_dcp.errors import NoCheckpointError, TailorError
from tests.support.runs import HEAD, L0, L1, LAYERS, Run, due

pytestmark = pytest.mark.filterwarnings("error::tailor_dcp.TailorWarning")

VALUES = arrays.arrays(
    np.float32,
    arrays.array_shapes(max_dims=2, max_side=5),
    elements=st.floats(-1e6, 1e6, width=32),
)


def saved(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    forget()
    dcp.save({"model": weights}, checkpoint_id=folder)
    return folder


@given(a=VALUES, data=st.data())
def test_one_unit_is_what_numpy_says(a: np.ndarray[Any, Any], data: st.DataObject, tmp_path_factory: Any) -> None:
    """Relative change, cosine and share of changed elements of any two tensors, also in two dtypes."""
    folder = tmp_path_factory.mktemp("diff")
    b = data.draw(arrays.arrays(np.float32, a.shape, elements=st.floats(-1e6, 1e6, width=32)) | st.just(a))
    narrow = data.draw(st.booleans())
    second = torch.from_numpy(b.copy()).bfloat16() if narrow else torch.from_numpy(b.copy())
    one = saved(folder / "a", {"layers.0.w": torch.from_numpy(a.copy())})
    other = saved(folder / "b", {"layers.0.w": second})
    (unit,) = diff(one, other).units
    x, y = a.astype(np.float64).ravel(), second.double().numpy().ravel()
    assert (unit.layer, unit.kind, unit.elements) == ("layers.0", "weight", a.size)
    assert unit.changed == np.count_nonzero(x != y) / a.size
    if not x.any():
        assert unit.relative == (None if y.any() else 0.0)
    else:
        assert unit.relative == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-9, abs=1e-12)
    if x.any() and y.any():
        assert unit.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-9)
    else:
        assert unit.cosine is None


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.save(100)
    run.save(200, due(L1))
    return run


def test_what_is_carried_is_not_read(run: Run, tmp_path: Path) -> None:
    """The records say which units are one save's bytes; of these nothing is read."""
    found = diff(run.path(100), run.path(200))
    assert found.steps == (100, 200)
    assert {unit.layer for unit in found.units} == set(LAYERS)
    for unit in found.units:
        assert unit.carried == (unit.layer != L1)
        assert (unit.changed > 0) == (unit.layer == L1)
        assert unit.cosine == 1.0 or not unit.carried
    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy)  # which breaks the links
    value = run.load(100)[f"model.{L0}.w"].numpy().tobytes()
    changed = [path for path in copy.glob("step-200/carried/*/*") if value in path.read_bytes()]
    for path in changed:
        path.write_bytes(path.read_bytes().replace(value, bytes(len(value))))
    assert changed
    assert diff(copy / "step-100", copy / "step-200").units == found.units


def test_units_add_up_their_tensors(run: Run) -> None:
    """All tensors of a layer and kind are one vector; a run's step may be named by RUN@STEP."""
    run.save(300, "full")
    found = {(u.layer, u.kind): u for u in diff(f"{run.folder}@100", f"{run.folder}@300").units}
    before, after = run.load(100), run.load(300)
    for layer in LAYERS:
        for kind in ("exp_avg", "exp_avg_sq"):
            x = before[f"optim.state.{layer}.w.{kind}"].double()
            y = after[f"optim.state.{layer}.w.{kind}"].double()
            assert found[layer, kind].relative == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-9)
    assert ("lm_head", "step") not in found


def test_other_formats_and_other_models(tmp_path: Path) -> None:
    """A Hugging Face folder against a DCP checkpoint; names and shapes that only one has are told."""
    values = {"model.layers.0.w": torch.randn(3, 2), "model.norm.w": torch.ones(3), "lm_head.w": torch.ones(2)}
    one = saved(tmp_path / "dcp", values)
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    changed = {**values, "lm_head.w": torch.ones(3), "extra.w": torch.ones(1)}
    changed.pop("model.norm.w")
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    found = diff(one, folder)
    assert [(u.layer, u.changed, u.relative) for u in found.units] == [("model.layers.0", 0.0, 0.0)]
    assert (found.only_a, found.only_b, found.reshaped) == (("model.norm.w",), ("extra.w",), ("lm_head.w",))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite(tmp_path: Path, value: float) -> None:
    """Numbers that are none are never written to JSON; equal ones have not changed."""
    one = saved(tmp_path / "a", {"w": torch.tensor([1.0, value])})
    other = saved(tmp_path / "b", {"w": torch.tensor([2.0, value])})
    (unit,) = diff(one, other).units
    assert (unit.changed, unit.relative, unit.cosine) == (0.5, None, None)


def test_refusals(run: Run, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", {"w": torch.ones(2)})
    with pytest.raises(NothingInCommonError, match="compare checkpoints of one model"):
        diff(run.path(100), other)
    with pytest.raises(NoCheckpointError, match="is a run, not a checkpoint"):
        diff(run.folder, run.path(100))
    bits = [torch.ones(4, dtype=torch.uint8).mul(value).view(torch.float4_e2m1fn_x2) for value in (1, 2)]
    with pytest.raises(NoArithmeticError, match="float4_e2m1fn_x2 cannot be compared"):
        diff(*(saved(tmp_path / f"bits-{n}", {"w": tensor}) for n, tensor in enumerate(bits)))


def test_the_command(run: Run, tmp_path: Path) -> None:
    """A table, the same as JSON, and a picture."""
    words = ["diff", str(run.path(100)), str(run.path(200))]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert f"{L0} " in shown.output
    assert "carried" in shown.output
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    assert told == json.loads(json.dumps(diff(run.path(100), run.path(200)).to_dict()))
    pytest.importorskip("matplotlib")
    picture = tmp_path / "moved.png"
    assert CliRunner().invoke(app, [*words, "--plot", str(picture)]).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    failed = CliRunner().invoke(app, [*words, "--plot", str(tmp_path / "moved.txt")])
    assert isinstance(failed.exception, TailorError)
    assert HEAD in shown.output
