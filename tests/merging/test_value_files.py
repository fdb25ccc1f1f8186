"""The files beside a merged model's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tailor_dcp.merging.model_files import files_of_merge
from tailor_dcp.merging.model_files_card import card
from tailor_dcp.merging.model_files_config import merged_config
from tailor_dcp.recipes.errors import RecipeError
from tests.support.hf_models import made
from tests.support.value_merges import merged

STACK = "model.layers"


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"num_hidden_layers": 3, "vocab_size": 3}, {"num_hidden_layers": 4, "vocab_size": 3}),
        ({"n_layer": 3, "n_embd": 3}, {"n_layer": 4, "n_embd": 3}),
        ({"n_layers": 3}, {"n_layers": 4}),
        (
            {"num_hidden_layers": 3, "layer_types": ["full", "sliding", "linear"], "eos_token_id": [7, 8, 9]},
            {"num_hidden_layers": 4, "layer_types": ["full", "linear", "linear", "sliding"], "eos_token_id": [7, 8, 9]},
        ),
        ({"num_hidden_layers": 3, "mlp_only_layers": [0, 2]}, {"num_hidden_layers": 4, "mlp_only_layers": [0, 1, 2]}),
        ({"num_hidden_layers": 3, "mlp_only_layers": []}, {"num_hidden_layers": 4, "mlp_only_layers": []}),
        (
            {"text_config": {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]}, "vision_config": {"depth": 3}},
            {"text_config": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}, "vision_config": {"depth": 3}},
        ),
        (
            {"encoder_layers": 3, "decoder_layers": 3, "num_hidden_layers": 3},
            {"encoder_layers": 3, "decoder_layers": 3, "num_hidden_layers": 4},
        ),
    ],
)
def test_layers_in_the_configuration(config: dict[str, Any], wanted: dict[str, Any]) -> None:
    """The number of layers is found whatever it is called, and what is said of each layer follows."""
    assert merged_config(config, "config.json", {STACK: [0, 2, 2, 1]}) == wanted
    assert merged_config(config, "config.json", {STACK: [0, 1, 2]}) == config


def test_stacks_of_a_translation_model() -> None:
    """Each stack has its own number."""
    config = {"encoder_layers": 3, "decoder_layers": 3}
    assert merged_config(config, "c", {"model.decoder.layers": [0]}) == {"encoder_layers": 3, "decoder_layers": 1}


def test_dtype_and_ties_in_the_configuration() -> None:
    """Both are said in all parts that say them."""
    config = {"torch_dtype": "float32", "tie_word_embeddings": True, "text_config": {"dtype": "float32"}}
    made_of = merged_config(config, "c", {}, torch.bfloat16, untied=True)
    assert made_of == {
        "torch_dtype": "bfloat16", "tie_word_embeddings": False, "text_config": {"dtype": "bfloat16"},
    }  # fmt: skip
    assert merged_config({}, "c", {}, torch.float16) == {"dtype": "float16"}


def test_a_configuration_without_a_number_of_layers() -> None:
    """It cannot be told, so it is refused by name."""
    with pytest.raises(
        RecipeError, match=r"config.json does not say how many layers the model has, by none of num_hidden"
    ):
        merged_config({"vocab_size": 3}, "config.json", {STACK: [0]})


def test_the_card_has_front_matter() -> None:
    """The hub reads its front matter, and the recipe is in it whatever it holds."""
    text = card("base: x\nnote: '```'\n", ["/somewhere/run/step-300", "org/model", "org/model"], "linear")
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": ["step-300", "org/model"], "library_name": "transformers", "tags": ["merge", "tailor_dcp"],
    }  # fmt: skip
    assert "````yaml\nbase: x\n" in body and "/somewhere" not in text


def test_no_input_is_changed(tmp_path: Path) -> None:
    """What has to be written anew goes into the scratch folder."""
    source = tmp_path / "model"
    source.mkdir()
    for name, text in (("config.json", '{"n_layer": 2}'), ("README.md", "old"), ("LICENSE", "mine")):
        (source / name).write_text(text)
    files = {path.name: path for path in source.iterdir()}
    found = files_of_merge(files, tmp_path / "new", layers={"h": [0, 0, 1]}, text="r", models=["model"])
    assert found["LICENSE"] == source / "LICENSE"
    assert json.loads(found["config.json"].read_text()) == {"n_layer": 3}
    assert found["README.md"].is_relative_to(tmp_path / "new")
    assert (source / "README.md").read_text() == "old" and files["config.json"].read_text() == '{"n_layer": 2}'
    kept = files_of_merge(files, tmp_path / "kept", layers={}, text="r", models=["model"])
    assert kept["config.json"] == source / "config.json"
    assert files_of_merge({}, tmp_path / "none", layers={"h": [0]}, text="r", models=["model"]) == {}


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    """Three models, two of them with a tokenizer."""
    for name in "abc":
        made("llama").save_pretrained(tmp_path / name)
    for name, tokens, template in (
        ("a", ["x", "y"], "{{ a }}"),
        ("b", ["x", "y"], "{{ b }}"),
        ("c", ["y", "x"], "{{ b }}"),
    ):
        vocabulary = {"model": {"vocab": {token: number for number, token in enumerate(tokens)}}, "added_tokens": []}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(vocabulary))
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"of": name, "chat_template": template}))
    (tmp_path / "c" / "tokenizer.json").rename(tmp_path / "c" / "tokenizer.json.other")
    return [str(tmp_path / name) for name in "abc"]


def linear(models: list[str], **more: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": m} for m in models], "parameters": {"weight": 1}, **more}


def test_the_tokenizer_that_a_plan_names(models: list[str], tmp_path: Path) -> None:
    """The first model's by default, the base model's, or any that is named."""
    for number, (more, name) in enumerate(
        [({}, "a"), ({"base_model": models[1]}, "b"), ({"tokenizer_source": models[1]}, "b"),
         ({"base_model": models[1], "tokenizer_source": "base"}, "b"), ({"tokenizer": {"source": models[1]}}, "b")]
    ):  # fmt: skip
        merged(linear(models, **more), tmp_path / f"out-{number}")
        assert json.loads((tmp_path / f"out-{number}" / "tokenizer_config.json").read_text())["of"] == name


def test_the_chat_template_that_a_plan_asks_for(models: list[str], tmp_path: Path) -> None:
    """Its own text, or the one that most models have."""
    merged(linear(models, chat_template="{{ mine }}"), tmp_path / "mine")
    merged(linear(models, chat_template="auto"), tmp_path / "auto")
    texts = [(tmp_path / name / "chat_template.jinja").read_text() for name in ("mine", "auto")]
    assert texts == ["{{ mine }}", "{{ b }}"]


def test_tokenizers_that_differ(models: list[str], tmp_path: Path) -> None:
    """Rows of embeddings would have to be moved for a tokenizer that numbers tokens otherwise."""
    (Path(models[2]) / "tokenizer.json.other").rename(Path(models[2]) / "tokenizer.json")
    with pytest.raises(RecipeError, match=r"c numbers its tokens otherwise than .*a, whose tokenizer"):
        merged(linear(models, tokenizer_source=models[0]), tmp_path / "out")
    made("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(RecipeError, match="bare holds no tokenizer"):
        merged(linear(models, tokenizer_source=str(tmp_path / "bare")), tmp_path / "out")
