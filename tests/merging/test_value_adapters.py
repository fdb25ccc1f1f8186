"""Merging whole models and adapters without a plan's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tailor_dcp.merging.values import competition
from tailor_dcp.recipes.errors import RecipeError
from tests.support.hf_models import loaded, made
from tests.support.value_merges import merged

peft = pytest.importorskip("peft")


def adapter(folder: Path, seed: int, **options: Any) -> str:
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 8, **options}
    model = peft.get_peft_model(made("llama"), peft.LoraConfig(**config))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter.data)
    model.save_pretrained(folder)
    return str(folder)


def test_models_are_averaged(tmp_path: Path) -> None:
    """Equal weights by default, or those that are given."""
    for name, seed in (("a", 0), ("b", 1)):
        model = made("llama")
        torch.manual_seed(seed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter.data)
        model.save_pretrained(tmp_path / name)
    models = [str(tmp_path / "a"), str(tmp_path / "b")]
    merged(competition("linear", models), tmp_path / "mean")
    merged(competition("linear", models, weights=[1, 3]), tmp_path / "weighted")
    a, b = (loaded(Path(m))[1] for m in models)
    for folder, weight in (("mean", 0.5), ("weighted", 0.75)):
        for name, found in loaded(tmp_path / folder)[1].items():
            torch.testing.assert_close(found, (1 - weight) * a[name] + weight * b[name])
    assert "weight: 3.0" in (tmp_path / "weighted" / "README.md").read_text()


def test_parameters_and_a_base() -> None:
    """Other methods are told what they need; numbers may come as text."""
    plan = competition("ties", ["b", "c"], {"density": "0.5"}, base="a", dtype="bfloat16")
    assert plan.parameters == ({"density": 0.5},)
    assert [source.model for source in plan.slices[0].sources] == ["b", "c", "a"]
    assert plan.slices[0].sources[0].parameters == {"weight": 1.0}
    assert competition("slerp", ["a", "b"], {"t": 0.3}, base="a").slices[0].sources[0].parameters == {}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("slerp", ["a", "b"], None, [1, 2]), "'slerp' takes no weights"),
        (("linear", ["a", "b"], None, [1]), "1 weights for 2 models"),
        (("linaer", ["a", "b"], None, None), "did you mean 'linear'"),
        (("linear", [], None, None), "--method: "),
    ],
)
def test_what_the_command_refuses(arguments: Any, problem: str) -> None:
    """A slip on the command line is one sentence."""
    method, models, parameters, weights = arguments
    with pytest.raises(RecipeError, match=problem):
        competition(method, models, parameters, weights=weights)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_of_equal_rank(tmp_path: Path) -> None:
    """Factors are averaged, the result is an adapter that peft loads, and a note says what that is not."""
    models = [adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    notes = merged(competition("linear", models), tmp_path / "out")
    assert any("the product of means is no mean of products" in note for note in notes)
    a, b, out = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (*models, tmp_path / "out"))
    assert out.keys() == a.keys()
    for name, found in out.items():
        torch.testing.assert_close(found, (a[name] + b[name]) / 2)
    live = peft.PeftModel.from_pretrained(made("llama"), tmp_path / "out").state_dict()
    name = next(name for name in out if "lora_B" in name)
    assert torch.equal(live[name.replace("lora_B.", "lora_B.default.")], out[name])
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"r": 8}, r"a and .*b differ in the rank \(4 and 8\)"),
        ({"target_modules": ["q_proj"]}, "differ in the target modules"),
        ({"lora_alpha": 16}, r"differ in lora_alpha \(8 and 16\)"),
    ],
)
def test_adapters_of_another_kind(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    """Another rank, other modules or another scale are refused by name."""
    models = [adapter(tmp_path / "a", 0), adapter(tmp_path / "b", 1, **options)]
    with pytest.raises(RecipeError, match=problem):
        merged(competition("linear", models), tmp_path / "out")


def test_an_adapter_and_a_model(tmp_path: Path) -> None:
    """They are no two of a kind."""
    made("llama").save_pretrained(tmp_path / "model")
    models = [str(tmp_path / "model"), adapter(tmp_path / "adapter", 0)]
    with pytest.raises(RecipeError, match=r"adapter is an adapter and .*model a whole model; .*merge_and_unload"):
        merged(competition("linear", models), tmp_path / "out")
