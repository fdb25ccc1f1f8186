"""Simulated bytes against real runs', and arithmetic against what was worked out by hand or published."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict import get_state_dict
from typer.testing import CliRunner

from tailor_dcp import LayerwisePlanner, LayerwiseWriter, forget, inspect, simulate
from tailor_dcp.cli import app
from tailor_dcp.intervals import Prices, daly, wasted, young
from tailor_dcp.model_states import NoModelError
from tailor_dcp.simulate import SimulationError
from tests.support.hf_models import hf

pytestmark = pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
CONFIG: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1024,
}  # fmt: skip
POLICIES = (
    "parity", "filter:head=1,tail=1,every=3", "moments:every=3", "moments:every=2,weights=bf16,moments=bf16",
)  # fmt: skip
LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return a configuration's folder, and what a real training of it has in memory."""
    made = hf.LlamaForCausalLM(hf.LlamaConfig(**CONFIG, tie_word_embeddings=True))
    folder = tmp_path_factory.mktemp("config")
    made.config.save_pretrained(folder)
    optimizer = torch.optim.AdamW(made.parameters())
    made(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    weights, states = get_state_dict(made, optimizer)
    return folder, {"model": weights, "optim": states}


@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_are_those_of_a_real_run(model: tuple[Path, dict[str, Any]], policy: str, tmp_path: Path) -> None:
    """Each save within 2 %, and the disk in use at the end, by either writer."""
    config, state = model
    for number, writer in enumerate((LayerwiseWriter, dcp.FileSystemWriter)):
        forget()
        run = tmp_path / str(number)
        for step in range(10, 70, 10):
            target: Any = writer(run / f"step-{step}")
            dcp.save(state, storage_writer=target, planner=LayerwisePlanner(policy))
        told = simulate(config, policy, every=10, steps=60)
        for step, expected in zip(range(10, 70, 10), told.saves, strict=True):
            assert inspect(run / f"step-{step}").written == pytest.approx(expected, rel=0.02)
        files = {f.stat().st_ino: f.stat().st_size for f in run.rglob("*.distcp")}
        assert sum(files.values()) == pytest.approx(sum(told.saves), rel=0.02)
        last = {f.stat().st_ino: f.stat().st_size for f in (run / "step-60").rglob("*.distcp")}
        one = simulate(config, policy, every=10, steps=60, keep_last=1)
        assert sum(last.values()) == pytest.approx(one.disk if number == 0 else one.disk_stock, rel=0.02)


def test_a_checkpoint_is_as_good_as_a_configuration(model: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """With the optimizer's state as it is, or with weights alone."""
    config, state = model
    forget()
    dcp.save(state, checkpoint_id=tmp_path / "run" / "step-1", planner=LayerwisePlanner("full"))
    dcp.save({"model": state["model"]}, checkpoint_id=tmp_path / "weights", planner=LayerwisePlanner("full", base=None))
    expected = simulate(config, "parity", steps=4)
    for path in (tmp_path / "run" / "step-1", tmp_path / "weights"):
        assert simulate(path, "parity", steps=4).saves == pytest.approx(expected.saves, rel=1e-3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(LLAMA_31_8B))
    return folder


@pytest.mark.parametrize(
    ("policy", "times"),
    [
        ("parity", 2.0),
        ("filter:every=5", 2.55),
        ("filter:every=5,aux=rest", 3.49),
        ("filter:every=8,aux=rest", 4.54),
    ],
)
def test_what_was_worked_out_for_llama_8b(llama: Path, policy: str, times: float) -> None:
    """The factors follow from the shapes; a whole number of cycles, as a policy's saves differ within one."""
    found = simulate(llama / "config.json", policy, steps=41)
    assert found.parameters == 8_030_261_248
    assert found.full / found.later == pytest.approx(times, rel=0.01)


def test_what_rests_costs_nothing(llama: Path) -> None:
    """A LoRA run's base, or frozen layers, are written once; they have no optimizer's state."""
    found = simulate(llama, "unchanged+full", steps=3, frozen=["model.layers.*", "model.embed_tokens"])
    assert found.full == pytest.approx(4 * 8_030_261_248 + 8 * (128256 * 4096 + 4096), rel=1e-3)
    assert found.later == pytest.approx(12 * (128256 * 4096 + 4096), rel=1e-3)


@given(ranks=st.integers(1, 64))
def test_ranks_only_add_frames(ranks: int, model: tuple[Path, dict[str, Any]]) -> None:
    one, many = (simulate(model[0], "full", steps=1, ranks=number) for number in (1, ranks))
    assert 0 <= many.full - one.full <= 1600 * (ranks - 1) * 3 * 39


def test_refusals(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="1 or more"):
        simulate(llama, "full", every=10, steps=5)
    with pytest.raises(NoModelError, match="adamw, adam"):
        simulate(llama, "full", optimizer="adamx")
    with pytest.raises(NoModelError, match="neither a checkpoint nor a model"):
        simulate(tmp_path, "full")
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    with pytest.raises(NoModelError, match="describes no model"):
        simulate(tmp_path, "full")


# Intervals ---------------------------------------------------------------------------------


@given(save=st.floats(1, 600), mtbf=st.floats(3600, 3600 * 24 * 30))
def test_the_best_interval_is_the_best(save: float, mtbf: float) -> None:
    """Found again by trying: nowhere on a fine grid is less time wasted, but for what the first order leaves out."""
    tried = [wasted(mtbf * 2 ** (-n / 8), save, mtbf) for n in range(-8, 160)]
    assert wasted(daly(save, mtbf), save, mtbf) <= min(tried) * 1.02
    assert young(save, mtbf) == pytest.approx(math.sqrt(2 * save * mtbf))


def test_daly_by_hand() -> None:
    """C = 5 min, M = 6 h: sqrt(2CM) = 60 min; times 1 + sqrt(300/43200)/3 + (300/43200)/9, less 5 min: 56.71 min."""
    assert daly(300, 6 * 3600) / 60 == pytest.approx(60 * (1 + 0.083333 / 3 + 0.0069444 / 9) - 5, rel=1e-4)
    assert daly(300, 100) == 100


def test_money_by_hand() -> None:
    """A tenth of the time of 8 GPUs at 2 an hour, and 500 GB at 0.02 a month."""
    assert Prices(8, 2.0, 0.02).yearly(0.1, 500e9) == pytest.approx(0.1 * 8 * 2 * 8760 + 500 * 0.02 * 12)


def test_the_command(llama: Path) -> None:
    words = ["simulate", "--model", str(llama), "--policy", "moments:every=5,weights=bf16,moments=bf16"]
    words += ["--every", "100", "--steps", "2000", "--ranks", "8", "--keep-last", "2", "--bandwidth", "4"]
    words += ["--step-seconds", "3", "--mtbf-hours", "12", "--gpus", "64", "--gpu-hour", "2", "--gb-month", "0.02"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "8,030,261,248 parameters, 20 saves, one every 100 steps" in shown.output
    assert "a year saved" in shown.output
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    full, ours = told["full"], told["moments:every=5,weights=bf16,moments=bf16"]
    assert full["save_seconds"] == pytest.approx(full["full"] / 4e9)
    assert full["wasted"] > ours["wasted"]
    assert ours["best_every"] < full["best_every"]
    failed = CliRunner().invoke(app, [*words, "--bandwidth", "-1"])
    assert isinstance(failed.exception, SimulationError)
