"""Hugging Face folders whose weights torch.save wrote: nothing in them is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_torch_state_dict_into_shards

from tailor_dcp.converters.convert import convert
from tailor_dcp.converters.hf_source import open_source, recognise
from tailor_dcp.converters.options import Options
from tailor_dcp.errors import ConversionError, DamagedSourceError
from tests.support.hf_models import equal, loaded, made


def binned(family: str, folder: Path, most: int | None = None) -> Path:
    """Write a family's model as transformers 4 did with safe_serialization=False."""
    model = made(family)
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    state = dict(model.state_dict())
    if most is None:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    plan = split_torch_state_dict_into_shards(
        state, filename_pattern="pytorch_model{suffix}.bin", max_shard_size=most
    )  # fmt: skip
    for name, held in plan.filename_to_tensors.items():
        torch.save({tensor: state[tensor].clone() for tensor in held}, folder / name)
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("most", [None, 4000])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2-tied"])
def test_there_and_back(tmp_path: Path, family: str, most: int | None) -> None:
    """A folder of .bin files comes back as one of safetensors that from_pretrained loads as the same model."""
    source = binned(family, tmp_path / "source", most)
    assert recognise(source)
    convert(source, tmp_path / "dcp", "dcp", "hf")
    convert(tmp_path / "dcp", tmp_path / "out", "hf", "dcp")
    expected = made(family).state_dict()
    assert equal(loaded(tmp_path / "out")[1], expected)
    assert equal(loaded(source)[1], expected)
    live = {"model": {name: torch.zeros_like(tensor) for name, tensor in expected.items()}}
    dcp.load(live, checkpoint_id=tmp_path / "dcp")
    assert equal(live["model"], expected)


def test_names_of_one_storage_are_tied(tmp_path: Path) -> None:
    """As torch.save keeps them; tensors without elements are not tied for having one address."""
    source = binned("llama-tied", tmp_path / "source")
    state = torch.load(source / "pytorch_model.bin")
    torch.save({**state, "e.a": torch.ones(0), "e.b": torch.ones(0)}, source / "pytorch_model.bin")
    catalog = open_source(source, Options())
    assert catalog.ties == {"lm_head.weight": "model.embed_tokens.weight"}


def test_safetensors_come_first(tmp_path: Path) -> None:
    """As in transformers, where both are there."""
    source = binned("llama", tmp_path / "source")
    made("llama").save_pretrained(source)
    (source / "pytorch_model.bin").write_bytes(b"junk")
    assert open_source(source, Options()).weights.keys() == made("llama").state_dict().keys()


class Evil:
    """An object whose pickle runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("old", [False, True])
def test_a_file_that_runs_code(tmp_path: Path, old: bool) -> None:
    """It is refused by the name of what it would call, and nothing was called."""
    source = binned("llama", tmp_path / "source")
    state = torch.load(source / "pytorch_model.bin")
    torch.save(
        {**state, "evil": Evil(tmp_path / "ran")}, source / "pytorch_model.bin", _use_new_zipfile_serialization=not old
    )
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin asks for \w+\.system"):
        convert(source, tmp_path / "out", "hf", "hf")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_a_plain_pickle_that_runs_code(tmp_path: Path) -> None:
    """Also without torch's own format around it."""
    source = binned("llama", tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(ConversionError):
        open_source(source, Options())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("tree", [[torch.ones(1)], {"a": {"b": torch.ones(1)}}, {"a": 1.0}, {1: torch.ones(1)}, None])
def test_a_file_of_something_else(tmp_path: Path, tree: Any) -> None:
    """Is refused with what it holds."""
    source = binned("llama", tmp_path / "source")
    torch.save(tree, source / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin holds"):
        open_source(source, Options())


@pytest.mark.parametrize("size", [0, 100, 5000, -1])
def test_a_file_that_is_cut_off(tmp_path: Path, size: int) -> None:
    """Is refused with its name."""
    source = binned("llama", tmp_path / "source")
    file = source / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(DamagedSourceError, match=r"pytorch_model\.bin"):
        open_source(source, Options())


def test_an_index_that_names_a_missing_file(tmp_path: Path) -> None:
    """Is refused with the file's name."""
    source = binned("llama", tmp_path / "source", 4000)
    shard = sorted(source.glob("pytorch_model-*.bin"))[0]
    shutil.move(shard, tmp_path)
    with pytest.raises(DamagedSourceError, match=shard.name):
        open_source(source, Options())
