"""Folders that the Hugging Face Trainer writes, from real short trainings of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from tailor_dcp import rank_state
from tailor_dcp.converters.convert import convert
from tailor_dcp.converters.hf_source import open_source
from tailor_dcp.converters.options import Options
from tailor_dcp.converters.trainer_folder import trainer_train
from tailor_dcp.errors import ConversionError, DamagedSourceError
from tests.support.hf_models import hf, made

pytest.importorskip("accelerate")
STEPS = 3


def trained(family: str, folder: Path, **told: Any) -> tuple[Any, Path]:
    """Train a model for a few steps; return the Trainer and its checkpoint."""
    model = told.pop("model", None) or made(family)
    rows = [{"input_ids": torch.arange(n, n + 8), "labels": torch.arange(n, n + 8)} for n in range(8)]
    arguments: dict[str, Any] = {
        "max_steps": STEPS, "save_steps": STEPS, "per_device_train_batch_size": 2, "weight_decay": 0.1,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", **told.pop("arguments", {}),
    }  # fmt: skip
    trainer = hf.Trainer(model, hf.TrainingArguments(str(folder), **arguments), train_dataset=rows, **told)
    trainer.train()
    return trainer, folder / f"checkpoint-{STEPS}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One training of a family each."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def run(family: str) -> tuple[Any, Path]:
        if family not in done:
            done[family] = trained(family, folder / family)
        return done[family]

    return run


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2-tied", "bert-tied", "mixtral"])
def test_the_optimizers_state_has_the_names_that_torch_gives_it(runs: Any, tmp_path: Path, family: str) -> None:
    """Held against get_optimizer_state_dict of the trainer that wrote the folder, bit for bit."""
    trainer, folder = runs(family)
    convert(folder, tmp_path / "dcp", "dcp", "hf")
    optimizer = trainer.optimizer.optimizer
    expected = get_optimizer_state_dict(trainer.model, optimizer)
    found = get_optimizer_state_dict(trainer.model, optimizer)
    for held in found["state"].values():
        held.update({kind: torch.full_like(value, 7) for kind, value in held.items()})
    dcp.load({"optim": found}, checkpoint_id=tmp_path / "dcp")
    assert found["state"].keys() == expected["state"].keys()
    for fqn, held in expected["state"].items():
        assert held.keys() == found["state"][fqn].keys()
        assert all(torch.equal(value, found["state"][fqn][kind]) for kind, value in held.items()), fqn
    catalog = open_source(folder, Options())
    assert [group["params"] for group in catalog.groups] == [group["params"] for group in expected["param_groups"]]
    assert [group["weight_decay"] for group in catalog.groups] == [0.1, 0.0]
    set_optimizer_state_dict(trainer.model, optimizer, {**found, "param_groups": [dict(g) for g in catalog.groups]})


def test_the_trainings_progress(runs: Any) -> None:
    """Step, scheduler and generators as a TrainState keeps them."""
    _, folder = runs("llama")
    train, _ = trainer_train(folder, Options())
    assert train["step"] == STEPS
    expected = torch.load(folder / "scheduler.pt")
    assert train["scheduler"] == expected
    (rng,) = rank_state.unpack(train["rng"], "train.rng")
    rank_state.set_rng_state(rng)
    drawn = torch.rand(3)
    saved = torch.load(folder / "rng_state.pth", weights_only=False)
    torch.set_rng_state(saved["cpu"])
    assert torch.equal(torch.rand(3), drawn)


def test_the_generators_of_all_ranks(runs: Any, tmp_path: Path) -> None:
    """In the order of the ranks, which is not that of the names; a missing one is named."""
    folder = shutil.copytree(runs("llama")[1], tmp_path / "checkpoint-3")
    state = torch.load(folder / "rng_state.pth", weights_only=False)
    (folder / "rng_state.pth").unlink()
    for rank in range(12):
        torch.save({**state, "cpu": torch.full_like(state["cpu"], rank)}, folder / f"rng_state_{rank}.pth")
    train, _ = trainer_train(folder, Options())
    assert [int(s["torch"][0]) for s in rank_state.unpack(train["rng"], "rng")] == list(range(12))
    (folder / "rng_state_3.pth").unlink()
    with pytest.raises(DamagedSourceError, match="no generator states of rank 3"):
        trainer_train(folder, Options())


def test_the_trainer_gets_back_what_it_wrote(runs: Any, tmp_path: Path) -> None:
    """Through a DCP checkpoint; the pickle of its arguments is never opened."""
    folder = shutil.copytree(runs("llama")[1], tmp_path / "checkpoint-3")
    (folder / "training_args.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    convert(folder, tmp_path / "dcp", "dcp", "hf")
    result = convert(tmp_path / "dcp", tmp_path / "out", "hf", "dcp")
    for name in ("trainer_state.json", "training_args.bin", "model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert torch.load(tmp_path / "out" / "scheduler.pt") == torch.load(folder / "scheduler.pt")
    ours, theirs = (torch.load(p / "rng_state.pth", weights_only=False) for p in (tmp_path / "out", folder))
    assert rank_state.same({**ours, "numpy": list(ours["numpy"])}, {**theirs, "numpy": list(theirs["numpy"])})
    assert not (tmp_path / "out" / "optimizer.pt").exists()
    assert any("optimizer" in note for note in result.notes)


def test_the_trainer_goes_on_from_what_was_given_back(runs: Any, tmp_path: Path) -> None:
    """It takes step, weights and generators from the folder."""
    _, folder = runs("llama")
    convert(folder, tmp_path / "dcp", "dcp", "hf")
    convert(tmp_path / "dcp", tmp_path / "run" / "checkpoint-3", "hf", "dcp")
    trainer = hf.Trainer(
        made("llama"),
        hf.TrainingArguments(str(tmp_path / "run"), max_steps=STEPS, report_to=[], use_cpu=True, disable_tqdm=True),
        train_dataset=[{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8,
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert trainer.state.global_step == STEPS
    expected = hf.LlamaForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_training_with_an_optimizer_of_its_own(tmp_path: Path) -> None:
    """One group of all parameters in the model's order."""
    model = made("llama-tied")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    _, folder = trained("llama-tied", tmp_path, model=model, optimizers=(optimizer, None))
    catalog = open_source(folder, Options())
    expected = get_optimizer_state_dict(model, optimizer)
    assert catalog.groups[0]["params"] == expected["param_groups"][0]["params"]
    for fqn, held in expected["state"].items():
        assert torch.equal(catalog.state[fqn]["exp_avg"].whole(), held["exp_avg"])


def test_names_in_the_file_are_believed(runs: Any, tmp_path: Path) -> None:
    """torch writes them for an optimizer that was given named parameters."""
    folder = shutil.copytree(runs("llama")[1], tmp_path / "checkpoint-3")
    state = torch.load(folder / "optimizer.pt")
    names = [[f"p{n}" for n in group["params"]] for group in state["param_groups"]]
    groups = [{**g, "param_names": n} for g, n in zip(state["param_groups"], names, strict=True)]
    torch.save({**state, "param_groups": groups}, folder / "optimizer.pt")
    with pytest.raises(ConversionError, match="does not fit p0"):
        open_source(folder, Options())


def test_frozen_parameters_are_not_guessed(tmp_path: Path) -> None:
    """Which they were the folder does not tell; the weights alone still convert."""
    model = made("llama")
    model.model.embed_tokens.requires_grad_(False)
    _, folder = trained("llama", tmp_path / "run", model=model)
    with pytest.raises(ConversionError, match="cannot be named safely; convert with --weights-only"):
        open_source(folder, Options())
    convert(folder, tmp_path / "dcp", "dcp", "hf", Options(weights_only=True))


def test_shapes_that_disagree_are_refused(runs: Any, tmp_path: Path) -> None:
    """The state that does not fit is named."""
    folder = shutil.copytree(runs("llama")[1], tmp_path / "checkpoint-3")
    state = torch.load(folder / "optimizer.pt")
    held = state["state"]
    held[0], held[1] = held[1], held[0]
    torch.save(state, folder / "optimizer.pt")
    with pytest.raises(ConversionError, match="state of parameter 0 does not fit model"):
        open_source(folder, Options())


@pytest.mark.parametrize("tree", [[], {"state": {}}, {"state": {9: {}}, "param_groups": [{"params": [0]}]}])
def test_an_optimizer_that_is_none(runs: Any, tmp_path: Path, tree: Any) -> None:
    """Is refused with the file's name."""
    folder = shutil.copytree(runs("llama")[1], tmp_path / "checkpoint-3")
    torch.save(tree, folder / "optimizer.pt")
    with pytest.raises(DamagedSourceError, match=r"optimizer\.pt"):
        open_source(folder, Options())


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_damaged_file(runs: Any, tmp_path: Path, name: str) -> None:
    """Is refused with its name."""
    folder = shutil.copytree(runs("llama")[1], tmp_path / "checkpoint-3")
    (folder / name).write_bytes((folder / name).read_bytes()[:200])
    with pytest.raises(DamagedSourceError, match=name):
        open_source(folder, Options())


def test_an_adapters_training(tmp_path: Path) -> None:
    """Its parameters cannot be named from its folder; its weights convert."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(made("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    _, folder = trained("llama", tmp_path / "run", model=model)
    with pytest.raises(ConversionError, match="--weights-only"):
        open_source(folder, Options())
    result = convert(folder, tmp_path / "out", "hf", "hf", Options(weights_only=True))
    assert result.states == 0
    expected = (folder / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == expected
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"
