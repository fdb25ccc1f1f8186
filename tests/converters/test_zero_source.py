"""Reading what real DeepSpeed engines saved in all their ways, without DeepSpeed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tailor_dcp.converters.convert import convert
from tailor_dcp.converters.formats import source_of
from tailor_dcp.converters.options import Options
from tailor_dcp.converters.zero_source import open_source
from tailor_dcp.errors import ConversionError
from tests.support.zero_cases import check_reading
from tests.support.zero_engines import Setup
from tests.support.zero_samples import sample

pytest.importorskip("deepspeed")

CLIENT = {"epoch": 3, "step": 99, "zero": "mine", "nested": {"a": [1, 2], "t": torch.arange(3)}, "rng": b"mine"}


def _train(setup: Setup, folder: Path, **save: Any) -> dict[str, Any]:
    state: dict[str, Any] = setup.call("train_and_save", str(folder), further=0, **save)[0]
    return state["saved"]


def test_deepspeed_is_not_needed(tmp_path: Path) -> None:
    """Nor imported where it is installed."""
    sample(tmp_path / "run")
    script = (
        "import sys; sys.modules['deepspeed'] = None; from pathlib import Path\n"
        "from tailor_dcp.converters.convert import convert\n"
        f"convert({str(tmp_path / 'run')!r}, {str(tmp_path / 'dcp')!r}, 'dcp')\n"
        f"convert({str(tmp_path / 'dcp')!r}, {str(tmp_path / 'back')!r}, 'zero2', 'dcp')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert (tmp_path / "back" / "latest").read_text() == "global_step5"


@pytest.mark.parametrize("stage", [3, 2])
def test_frozen_parameters_left_out(tmp_path: Path, stage: int) -> None:
    """They are not there, and that is said."""
    setup = Setup(stage, 2, family="odd")
    live = _train(setup, tmp_path, exclude_frozen_parameters=True)
    check_reading(setup, tmp_path, live)
    catalog = open_source(tmp_path, Options())
    assert not {"frozen", "frozen_one"} & catalog.weights.keys()
    assert any("exclude_frozen_parameters" in note for note in catalog.notes)
    assert not open_source(sample(tmp_path / "whole"), Options()).notes


def test_frozen_parameters_keep_their_dtype(tmp_path: Path) -> None:
    """Masters are fp32, what is not trained is as the module has it."""
    for stage in (3, 2, 1):
        setup = Setup(stage, 2, family="odd")
        _train(setup, tmp_path / str(stage))
        weights = open_source(tmp_path / str(stage), Options()).weights
        assert weights["frozen"].dtype == torch.bfloat16
        assert weights["cube"].dtype == torch.float32 and weights["seen"].dtype == torch.float32
        assert weights["table"].whole().equal(torch.arange(13))


@pytest.mark.parametrize("stage", [3, 2])
def test_client_state(tmp_path: Path, stage: int) -> None:
    """Under its own names, and under ``client`` where these mean something else."""
    _train(Setup(stage, 2), tmp_path, client_state=CLIENT)
    train = open_source(tmp_path, Options()).train
    assert train["step"] == 2 and train["epoch"] == 3 and train["nested"]["a"] == [1, 2]
    assert train["nested"]["t"].equal(torch.arange(3))
    assert train["client"] == {"step": 99, "zero": "mine", "rng": b"mine"}
    assert "rng" not in train


def test_what_is_deepspeeds_own(tmp_path: Path) -> None:
    """The engine's counters under the names that EngineState uses, and its configuration."""
    setup = Setup(3, 2, sub_group_size=400)
    _train(setup, tmp_path)
    zero = open_source(tmp_path, Options()).train["zero"]
    assert (zero["global_samples"], zero["skipped_steps"], zero["micro_steps"], zero["loss_scale"]) == (8, 0, 2, 1.0)
    assert (zero["stage"], zero["world_size"], zero["dtype"], zero["sub_group_size"]) == (3, 2, "bf16", 400)
    assert json.loads(zero["ds_config"]) == setup.config()


@pytest.mark.parametrize("stage", [2, 1])
@pytest.mark.parametrize("family", ["odd", "gpt2"])
def test_aligned_parameters(tmp_path: Path, stage: int, family: str) -> None:
    """``parameter_alignment`` puts gaps between them."""
    setup = Setup(stage, 2, family=family, groups=2, options=(("parameter_alignment", True),))
    check_reading(setup, tmp_path, _train(setup, tmp_path))


@pytest.mark.parametrize("world", [1, 2])
def test_bf16_optimizer(tmp_path: Path, world: int) -> None:
    """What DeepSpeed takes for ZeRO-1 in bf16 with fp32 gradients; its own zero_to_fp32 cannot read it."""
    setup = Setup(1, world, family="odd", groups=2, accumulate="fp32")
    trained = setup.call("train_and_save", str(tmp_path / "run"))[0]
    live = trained["saved"]
    catalog = open_source(tmp_path / "run", Options())
    for name, weight in live["weights"].items():
        assert np.array_equal(catalog.weights[name].whole().numpy(), weight), name
        assert np.array_equal(catalog.state[name]["exp_avg"].whole().numpy(), live["exp_avg"][name])
    assert len(live["weights"]) == 7 and catalog.weights["frozen"].dtype == torch.bfloat16
    convert(tmp_path / "run", tmp_path / "back", "zero1")
    assert setup.call("load_and_train", str(tmp_path / "back"))[0]["losses"] == trained["losses"]


@pytest.mark.parametrize("stage", [3, 2])
@pytest.mark.parametrize(("optimizer", "kinds"), [("momentum", {"momentum_buffer"}), ("SGD", set()), ("NAdam", None)])
def test_other_optimizers(tmp_path: Path, stage: int, optimizer: str, kinds: set[str] | None) -> None:
    """Their states under their own names, there and back."""
    setup = Setup(stage, 2, family="odd", optimizer=optimizer)
    live = setup.call("train_and_save", str(tmp_path / "run"))[0]
    catalog = open_source(tmp_path / "run", Options())
    found = {kind for held in catalog.state.values() for kind in held}
    assert found == ({"exp_avg", "exp_avg_sq", "step", "mu_product"} if kinds is None else kinds)
    for kind in found & live["saved"].keys():
        for name, value in live["saved"][kind].items():
            assert np.array_equal(catalog.state[name][kind].whole().numpy(), value)
    convert(tmp_path / "run", tmp_path / "back", f"zero{stage}", "zero")
    again = setup.call("load_and_train", str(tmp_path / "back"))[0]
    assert again["losses"] == live["losses"]


@pytest.mark.long
@pytest.mark.parametrize("stage", [3, 2])
def test_deepspeeds_own_adam(tmp_path: Path, stage: int) -> None:
    """It counts steps in plain numbers, and gets them back so."""
    setup = Setup(stage, 2, family="odd", optimizer="CPUAdam", options=(("offload_optimizer", {"device": "cpu"}),))
    live = setup.call("train_and_save", str(tmp_path / "run"))[0]
    assert float(open_source(tmp_path / "run", Options()).state["cube"]["step"].whole()) == 2
    convert(tmp_path / "run", tmp_path / "back", f"zero{stage}", "zero")
    again = setup.call("load_and_train", str(tmp_path / "back"))[0]
    assert again["losses"] == live["losses"]


def test_which_of_several_checkpoints(tmp_path: Path) -> None:
    """The latest, the one that is asked for, the only one, or the folder itself."""
    first = sample(tmp_path / "run", 3, 2, tag="first")
    shutil.copytree(sample(tmp_path / "other"), tmp_path / "run" / "global_step5")
    assert first.name == "global_step5" and (tmp_path / "run" / "latest").read_text() == "first"
    for path, tag in [("run", None), ("run", "global_step5"), ("run/first", None), ("run/first", "global_step5")]:
        assert open_source(tmp_path / path, Options(tag=tag)).train["step"] == 5
        assert source_of(tmp_path / path, None).name == "zero"
    (tmp_path / "run" / "latest").unlink()
    with pytest.raises(ConversionError, match=r"\(first, global_step5\); give one with --tag"):
        open_source(tmp_path / "run", Options())
    with pytest.raises(ConversionError, match="has no checkpoint 'none'; it has first, global_step5"):
        open_source(tmp_path / "run", Options(tag="none"))
    shutil.rmtree(tmp_path / "run" / "first")
    assert open_source(tmp_path / "run", Options()).train["step"] == 5


def test_other_folders_are_not_taken_for_it(tmp_path: Path) -> None:
    """Universal checkpoints have a file of the same name; others have a file ``latest``."""
    folder = sample(tmp_path / "run", 2)
    from tailor_dcp.converters.zero_files import recognise

    (folder / "zero").mkdir()
    assert not recognise(folder)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "latest").write_text("step-5")
    assert not recognise(tmp_path / "else") and not recognise(tmp_path / "none") and not recognise(folder / "x.pt")


def _trainer_folder(folder: Path) -> dict[str, bytes]:
    """Put a real Trainer's files around a checkpoint, with generators of two ranks; return what they are."""
    from types import SimpleNamespace

    from transformers import LlamaConfig, Trainer, TrainerState

    state = TrainerState(global_step=5, epoch=0.5, max_steps=10, log_history=[{"loss": 1.5, "step": 4}])
    state.save_to_json(str(folder / "trainer_state.json"))
    for rank in range(2):
        torch.manual_seed(rank)
        Trainer._save_rng_state(SimpleNamespace(args=SimpleNamespace(world_size=2, process_index=rank)), str(folder))
    torch.save({"last_epoch": 5, "_last_lr": [0.1]}, folder / "scheduler.pt")
    (folder / "training_args.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    LlamaConfig().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "zero_to_fp32.py").write_text("# DeepSpeed's")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_trainers_folder_around_it(tmp_path: Path) -> None:
    """All of it is kept and given back, through DCP."""
    folder = tmp_path / "checkpoint-5"
    sample(folder)
    before = _trainer_folder(folder)
    assert source_of(folder, None).name == "zero"
    catalog = open_source(folder, Options())
    assert json.loads(catalog.train["trainer_state"])["log_history"] == [{"loss": 1.5, "step": 4}]
    assert catalog.train["scheduler"]["_last_lr"] == [0.1] and isinstance(catalog.train["rng"], bytes)
    convert(folder, tmp_path / "dcp", "dcp")
    convert(tmp_path / "dcp", tmp_path / "back", "zero3", "dcp")
    for name in before.keys() - {"zero_to_fp32.py", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"}:
        assert (tmp_path / "back" / name).read_bytes() == before[name], name
    assert torch.load(tmp_path / "back" / "scheduler.pt") == torch.load(folder / "scheduler.pt")
    for rank in range(2):
        name = f"rng_state_{rank}.pth"
        ours, theirs = (torch.load(p / name, weights_only=False) for p in (tmp_path / "back", folder))
        assert ours["cpu"].equal(theirs["cpu"]) and ours["python"] == theirs["python"]
        assert np.array_equal(ours["numpy"][1], theirs["numpy"][1]) and ours["numpy"][2:] == theirs["numpy"][2:]
    again = open_source(tmp_path / "back", Options())
    assert again.train["rng"] == catalog.train["rng"] and again.train["trainer_state"] == catalog.train["trainer_state"]


def test_generators_of_several_devices_are_given_back_as_they_are(tmp_path: Path) -> None:
    """TrainState has no place for them."""
    folder = tmp_path / "checkpoint-5"
    sample(folder)
    before = _trainer_folder(folder)
    state = torch.load(folder / "rng_state_0.pth", weights_only=False)
    torch.save({**state, "cuda": [torch.zeros(2), torch.ones(2)]}, folder / "rng_state_1.pth")
    before["rng_state_1.pth"] = (folder / "rng_state_1.pth").read_bytes()
    assert "rng" not in open_source(folder, Options()).train
    convert(folder, tmp_path / "back", "zero2")
    for rank in range(2):
        name = f"rng_state_{rank}.pth"
        assert (tmp_path / "back" / name).read_bytes() == before[name]
