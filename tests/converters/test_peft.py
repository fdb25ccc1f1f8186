"""PEFT adapters both ways, as peft itself writes and loads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from tailor_dcp.converters.convert import convert
from tailor_dcp.converters.hf_source import open_source, recognise
from tailor_dcp.converters.options import Options
from tailor_dcp.errors import ConversionError
from tests.support.hf_models import equal, made

peft = pytest.importorskip("peft")

METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(target_modules=["q_proj", "v_proj"]),
    "lora with a head": lambda: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    "lora of embeddings": lambda: peft.LoraConfig(target_modules=["q_proj", "embed_tokens"]),
    "lora with biases": lambda: peft.LoraConfig(target_modules=["q_proj"], bias="all"),
    "lora with tokens": lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    "dora": lambda: peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj"]),
    "lokr": lambda: peft.LoKrConfig(target_modules=["q_proj"]),
    "oft": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=2, r=0),
    "hra": lambda: peft.HRAConfig(target_modules=["q_proj"], r=2),
    "norms": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "fourier": lambda: peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=4),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]),
}


def adapted(method: str) -> Any:
    """Return a live model with an adapter in which no tensor is zero."""
    family = "qwen2-tied" if method == "lora with biases" else "llama"
    model = peft.get_peft_model(made(family), METHODS[method]())
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "default" in name:
            torch.nn.init.normal_(parameter.data, generator=torch.Generator().manual_seed(number))
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_there_and_back(tmp_path: Path, method: str) -> None:
    """A live model finds its parameters in the checkpoint, and the folder's file is the same byte for byte."""
    live = adapted(method)
    live.save_pretrained(tmp_path / "source")
    assert recognise(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "dcp", "dcp", "hf")
    state = live.state_dict()
    trained = {n: t for n, t in state.items() if "default" in n}
    found = {"model": {name: torch.zeros_like(tensor) for name, tensor in trained.items()}}
    dcp.load(found, checkpoint_id=tmp_path / "dcp")
    assert equal(found["model"], trained)
    convert(tmp_path / "dcp", tmp_path / "out", "hf", "dcp")
    for file in (tmp_path / "source").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    base = made("qwen2-tied" if method == "lora with biases" else "llama")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    assert equal({n: t for n, t in again.state_dict().items() if n in trained}, trained)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["lora", "lora with a head", "lora of embeddings", "lora with biases", "dora"])
def test_out_of_a_checkpoint_of_the_whole_model(tmp_path: Path, method: str) -> None:
    """A run that saves the model with its adapter gives the adapter's folder, and a note of what is not in it."""
    live = adapted(method)
    live.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "dcp", "dcp", "hf")
    dcp.save({"model": live.state_dict()}, checkpoint_id=tmp_path / "run")
    (tmp_path / "dcp" / "hf").rename(tmp_path / "run" / "hf")
    made_ = convert(tmp_path / "run", tmp_path / "out", "hf", "dcp")
    expected, found = (load_file(p / "adapter_model.safetensors") for p in (tmp_path / "source", tmp_path / "out"))
    assert equal(expected, found)
    assert any("not part of its folder" in note for note in made_.notes)


def test_the_old_format(tmp_path: Path) -> None:
    """adapter_model.bin, as older versions wrote it."""
    live = adapted("lora")
    live.save_pretrained(tmp_path / "source")
    torch.save(load_file(tmp_path / "source" / "adapter_model.safetensors"), tmp_path / "source" / "adapter_model.bin")
    expected = (tmp_path / "source" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "source" / "adapter_model.safetensors").unlink()
    convert(tmp_path / "source", tmp_path / "out", "hf", "hf")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("method", ["PREFIX_TUNING", "XLORA", None])
def test_a_method_whose_names_are_not_known_is_refused(tmp_path: Path, method: Any) -> None:
    """By its name, with those that are known."""
    adapted("lora").save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": method}))
    with pytest.raises(ConversionError, match=f"method {method}.*LORA"):
        open_source(tmp_path / "source", Options())


def test_two_adapters_are_refused(tmp_path: Path) -> None:
    """A folder has room for one."""
    live = adapted("lora")
    live.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "dcp", "dcp", "hf")
    live.add_adapter("other", METHODS["lora"]())
    dcp.save({"model": live.state_dict()}, checkpoint_id=tmp_path / "run")
    (tmp_path / "dcp" / "hf").rename(tmp_path / "run" / "hf")
    with pytest.raises(ConversionError, match="adapters default, other"):
        convert(tmp_path / "run", tmp_path / "out", "hf", "dcp")
