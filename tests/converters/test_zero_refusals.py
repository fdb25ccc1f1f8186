"""Kinds of DeepSpeed checkpoints that are not read: each is recognised and told by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tailor_dcp.converters.convert import convert
from tailor_dcp.converters.formats import source_of
from tailor_dcp.converters.options import Options
from tailor_dcp.converters.zero_files import recognise
from tailor_dcp.converters.zero_source import open_source
from tailor_dcp.errors import ConversionError
from tests.support.zero_samples import edit, sample


def _refused(path: Path, words: str) -> None:
    """It is recognised, and refused in one sentence; nothing is written, and nothing changed."""
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    assert recognise(path)
    with pytest.raises(ConversionError, match=words) as caught:
        convert(path, path.parent / "out", "dcp")
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert not list(path.parent.glob("*out*"))
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("stage", [3, 2])
def test_tensor_parallel_files(tmp_path: Path, stage: int) -> None:
    """By the second part's name."""
    folder = sample(tmp_path / "run", stage)
    for path in [*folder.iterdir()]:
        (folder / path.name.replace("mp_rank_00", "mp_rank_01")).write_bytes(path.read_bytes())
    _refused(tmp_path / "run", "tensor parallelism")


@pytest.mark.parametrize("changed", [{"mp_world_size": 2}, {"checkpoint_parallel_dimensions": {"tp_degree": 2}}])
def test_a_tensor_parallel_run(tmp_path: Path, changed: dict[str, Any]) -> None:
    """By what the file says, should only one part have been copied."""
    folder = sample(tmp_path / "run")
    edit(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt", lambda tree: tree.update(changed))
    _refused(tmp_path / "run", "tensor parallelism")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layer_0_expert_3_mp_rank_00_model_states.pt", "MoE"),
        ("expert_3_mp_rank_00_model_states.pt", "MoE"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "MoE"),
        ("layer_01-model_00-model_states.pt", "pipeline"),
    ],
)
def test_files_of_parts_of_the_model(tmp_path: Path, name: str, words: str) -> None:
    """Experts and stages of pipelines, whose files lie beside the usual ones."""
    folder = sample(tmp_path / "run", 2)
    torch.save({}, folder / name)
    _refused(tmp_path / "run", words)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_experts": [4]}, "MoE"),
        ({"ds_autoep_layers": [{"module_path": "x"}]}, "MoE"),
        ({"checkpoint_parallel_dimensions": {"pp_degree": 2}}, "pipeline"),
    ],
)
def test_models_in_parts(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    """By what the model's file says."""
    folder = sample(tmp_path / "run")
    edit(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt", lambda tree: tree.update(changed))
    _refused(tmp_path / "run", words)


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ({"zero_hpz_partition_size": 2}, r"hpZ of ZeRO\+\+"),
        ({"zero_quantized_weights": True}, r"ZeRO\+\+ \(zero_quantized_weights\)"),
        ({"zero_quantized_nontrainable_weights": True}, r"ZeRO\+\+"),
        ({"mics_shard_size": 2}, "MiCS"),
        ({"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, "offload_optimizer to NVMe"),
        ({"offload_param": {"device": "nvme", "nvme_path": "/x"}}, "offload_param to NVMe"),
        ({"zenflow": {"topk_ratio": 0.1}}, "ZenFlow"),
    ],
)
@pytest.mark.parametrize("file", ["model", "optim"])
def test_what_the_configuration_tells(tmp_path: Path, zero: dict[str, Any], words: str, file: str) -> None:
    """Whichever of the files has it."""
    folder = sample(tmp_path / "run")
    path = next(folder.glob(f"*zero_pp_rank_1_*{file}_states.pt"))
    edit(path, lambda tree: tree["ds_config"]["zero_optimization"].update(zero))
    _refused(tmp_path / "run", words)


def test_offload_to_the_cpu_is_read(tmp_path: Path) -> None:
    """Its files are the usual ones."""
    folder = sample(tmp_path / "run")
    zero = {"offload_optimizer": {"device": "cpu"}, "mics_shard_size": -1, "zero_hpz_partition_size": 1}
    for path in folder.iterdir():
        edit(path, lambda tree: tree["ds_config"]["zero_optimization"].update(zero))
    assert open_source(tmp_path / "run", Options()).weights


def _elastic(tree: dict[str, Any]) -> None:
    zero = tree["optimizer_state_dict"]
    zero["base_optimizer_state"] = [*zero["base_optimizer_state"]["state"].values()]


def _experts(tree: dict[str, Any]) -> None:
    tree["optimizer_state_dict"]["ds_zero_partition_groups"] = [{"sub_group": 0}]


@pytest.mark.parametrize(("change", "words"), [(_elastic, "elastic_checkpoint"), (_experts, "MoE")])
def test_optimizers_in_other_forms(tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str) -> None:
    """By what is in the optimizer's file."""
    folder = sample(tmp_path / "run", 2)
    edit(next(folder.glob("*rank_0_*optim_states.pt")), change)
    _refused(tmp_path / "run", words)


def test_deepspeed_without_zero(tmp_path: Path) -> None:
    """Stage 0 has one file for all, and no flat buffers."""
    folder = sample(tmp_path / "run", 1)
    for path in folder.glob("*optim_states.pt"):
        path.unlink()
    _refused(tmp_path / "run", "without ZeRO")


def test_megatrons_torch_dist(tmp_path: Path) -> None:
    """A DCP folder whose tensors hold several layers each."""
    folder = tmp_path / "run" / "iter_0000100"
    folder.mkdir(parents=True)
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (folder / ".metadata").write_bytes(b"")
    assert source_of(folder, None).name == "dcp"
    with pytest.raises(ConversionError, match="Megatron torch_dist"):
        convert(folder, tmp_path / "out", "dcp")
    assert not list(tmp_path.glob("*out*"))
