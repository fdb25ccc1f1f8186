"""Hugging Face folders both ways, as transformers itself writes and loads them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tailor_dcp.converters.convert import Converted, convert
from tailor_dcp.converters.hf_source import open_source, recognise
from tailor_dcp.converters.options import Options
from tailor_dcp.errors import ConversionError, DamagedSourceError
from tests.support.hf_models import FAMILIES, equal, hf, loaded, made


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What save_pretrained makes of a family; one folder each."""
    folder = tmp_path_factory.mktemp("families")

    def save(family: str) -> Path:
        if not (folder / family).exists():
            made(family).save_pretrained(folder / family)
        return folder / family

    return save


def there_and_back(source: Path, folder: Path, **told: Any) -> Path:
    """Convert a folder to a DCP checkpoint and that to a folder again."""
    convert(source, folder / "dcp", "dcp", "hf")
    convert(folder / "dcp", folder / "hf", "hf", "dcp", Options(**told))
    return folder / "hf"


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(saved: Any, tmp_path: Path, family: str) -> None:
    """The file is the same byte for byte, and a live model of the family finds all its parameters on the way."""
    source = saved(family)
    result = there_and_back(source, tmp_path)
    assert (result / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert (result / "config.json").read_bytes() == (source / "config.json").read_bytes()
    _, expected = loaded(source)
    model, found = loaded(result)
    assert equal(expected, found)
    live = {"model": {name: torch.full_like(tensor, 7) for name, tensor in expected.items()}}
    dcp.load(live, checkpoint_id=tmp_path / "dcp")
    assert equal(live["model"], expected)
    if family.endswith("-tied"):
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("family", ["llama-tied", "mixtral"])
def test_many_files(saved: Any, tmp_path: Path, family: str) -> None:
    """A sharded folder is read, and written with an index that has what transformers' has."""
    source = tmp_path / "sharded"
    made(family).save_pretrained(source, max_shard_size=4000)
    result = there_and_back(source, tmp_path, max_shard_size=4000)
    index, expected = (json.loads((p / "model.safetensors.index.json").read_text()) for p in (result, source))
    assert index["metadata"] == expected["metadata"]
    assert index["weight_map"].keys() == expected["weight_map"].keys()
    assert len(set(index["weight_map"].values())) > 3
    for name, file in index["weight_map"].items():
        with safe_open(result / file, "pt") as ours, safe_open(source / expected["weight_map"][name], "pt") as theirs:
            assert torch.equal(ours.get_tensor(name), theirs.get_tensor(name))
    assert equal(loaded(result)[1], loaded(saved(family))[1])


def test_files_of_a_size_are_divided_as_transformers_does(tmp_path: Path) -> None:
    """The same tensors in files of the same names and bytes."""
    made("llama").save_pretrained(tmp_path / "theirs", max_shard_size=3000)
    convert(tmp_path / "theirs", tmp_path / "ours", "hf", "hf", Options(max_shard_size=3000))
    files = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == files
    assert all((tmp_path / "ours" / f).read_bytes() == (tmp_path / "theirs" / f).read_bytes() for f in files)


def test_two_processes_share_the_work(saved: Any, tmp_path: Path) -> None:
    """As under torchrun; what they write is what one writes."""
    pytest.importorskip("deepspeed")  # which these workers have
    from tests.support.zero_engines import fleet

    together = "tests.support.universal:convert_together"
    said = fleet(2).call(together, str(saved("mixtral")), str(tmp_path / "dcp"), "dcp")
    assert said[0] == said[1]
    fleet(2).call(together, str(tmp_path / "dcp"), str(tmp_path / "out"), "hf")
    expected = (saved("mixtral") / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


def test_another_dtype(saved: Any, tmp_path: Path) -> None:
    """The weights are rounded as torch rounds them, and the configuration says so, in its parts as well."""
    result = there_and_back(saved("mixtral"), tmp_path, dtype=torch.bfloat16)
    model, found = loaded(result)
    assert model.dtype == torch.bfloat16
    expected = loaded(saved("mixtral"))[1]
    assert equal(found, {name: tensor.to(torch.bfloat16) for name, tensor in expected.items()})
    before, after = (json.loads((p / "config.json").read_text()) for p in (saved("mixtral"), result))
    assert after == before | {"dtype": "bfloat16"}


def test_a_configuration_of_parts(saved: Any, tmp_path: Path) -> None:
    """Where the parts of a configuration have dtypes of their own they are changed, and none is added."""
    source = shutil.copytree(saved("llama"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    config |= {"torch_dtype": "float32", "vision_config": {"torch_dtype": "float32", "depth": 1}, "other": {"a": 1}}
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out", "hf", "hf", Options(dtype=torch.float16))
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {"torch_dtype": "float16", "vision_config": {"torch_dtype": "float16", "depth": 1}, "other": {"a": 1}}
    assert after == config | expected


def test_what_lies_beside_the_weights_is_given_back(saved: Any, tmp_path: Path) -> None:
    """Configurations, tokenizer, templates, remote code and licence, byte for byte; weights and junk are not."""
    source = shutil.copytree(saved("llama"), tmp_path / "source")
    given = {
        "generation_config.json": b'{"top_k": 5}', "tokenizer.json": b'{"a":\r\n1}', "tokenizer_config.json": b"{}",
        "special_tokens_map.json": b"{}", "vocab.json": b"{}", "vocab.txt": b"a\n", "merges.txt": b"#\n",
        "tokenizer.model": bytes(range(256)), "chat_template.jinja": b"{{ a }}", "added_tokens.json": b"{}",
        "preprocessor_config.json": b"{}", "processor_config.json": b"{}", "modeling_mine.py": b"raise SystemExit(1)\n",
        "README.md": b"# It\n", "LICENSE": b"Free\n", "additional_chat_templates/tools.jinja": b"{{ b }}",
        "tekken.tiktoken": b"x",
    }  # fmt: skip
    for name, data in given.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(data)
    (source / "flax_model.msgpack").write_bytes(b"x")
    (source / "model.onnx").write_bytes(b"x")
    result = there_and_back(source, tmp_path)
    assert {name: (result / name).read_bytes() for name in given} == given
    files = {path.relative_to(result).as_posix() for path in result.rglob("*") if path.is_file()}
    assert files == {*given, "model.safetensors", "config.json"}


def test_without_transformers_it_works_as_well(saved: Any, tmp_path: Path) -> None:
    """Names are then the files' own, ties are those of the usual names, and a note says so."""
    script = """
import sys
sys.modules["transformers"] = None
from tailor_dcp.converters.convert import convert
made = convert(sys.argv[1], sys.argv[2] + "/dcp", "dcp", "hf")
assert any("transformers is not installed" in note for note in made.notes), made.notes
assert made.weights == int(sys.argv[3])
convert(sys.argv[2] + "/dcp", sys.argv[2] + "/hf", "hf", "dcp")
"""
    count = len(load_file(saved("qwen2-tied") / "model.safetensors"))
    subprocess.run([sys.executable, "-c", script, saved("qwen2-tied"), tmp_path, str(count)], check=True, timeout=120)
    expected = saved("qwen2-tied") / "model.safetensors"
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == expected.read_bytes()
    live = {"model": {"lm_head.weight": torch.zeros(64, 16)}}
    dcp.load(live, checkpoint_id=tmp_path / "dcp")
    assert torch.equal(live["model"]["lm_head.weight"], load_file(expected)["model.embed_tokens.weight"])


def test_a_class_that_transformers_has_not_keeps_the_files_names(saved: Any, tmp_path: Path) -> None:
    """Remote code is carried along and never imported."""
    source = shutil.copytree(saved("mixtral"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["MineForCausalLM"], "auto_map": {"AutoModelForCausalLM": "mine.MineForCausalLM"}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    catalog = open_source(source, Options())
    assert catalog.weights.keys() == load_file(source / "model.safetensors").keys()
    assert "MineForCausalLM is not part of transformers" in catalog.notes[0]
    result = there_and_back(source, tmp_path)
    assert (result / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert not (tmp_path / "ran").exists()


def test_the_base_models_files_get_the_prefix_that_the_class_has(tmp_path: Path) -> None:
    """As on the hub for gpt2, whose files have been saved from the model without a head."""
    model = made("gpt2-tied")
    model.save_pretrained(tmp_path / "source")
    bare = {name: tensor.clone() for name, tensor in model.transformer.state_dict().items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # a mask that old files have
    save_file(bare, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    catalog = open_source(tmp_path / "source", Options())
    assert catalog.weights.keys() == model.state_dict().keys() | {"h.0.attn.bias"}
    assert catalog.weights["lm_head.weight"] is catalog.weights["transformer.wte.weight"]
    assert any("h.0.attn.bias" in note for note in catalog.notes)
    convert(tmp_path / "source", tmp_path / "out", "hf", "hf")
    assert equal(loaded(tmp_path / "out")[1], model.state_dict())


def test_what_the_files_lack_is_said(tmp_path: Path) -> None:
    """from_pretrained would start it anew, which nobody may notice."""
    model = made("llama")
    model.save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    catalog = open_source(tmp_path / "source", Options())
    assert any("lack model.norm.weight" in note for note in catalog.notes)


def test_tied_weights_that_were_trained_apart_stay_apart(tmp_path: Path) -> None:
    """Two tensors that the configuration ties are one in the folder only if they are equal."""
    model = made("llama-tied")
    model.save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    for head, count in ((tensors["model.embed_tokens.weight"].clone(), 0), (torch.ones(64, 16), 1)):
        folder = tmp_path / f"both{count}"
        shutil.copytree(tmp_path / "source", folder)
        save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
        made_ = convert(folder, tmp_path / f"out{count}", "hf", "hf")
        assert len(load_file(tmp_path / f"out{count}" / "model.safetensors")) == len(tensors) + count
        assert equal(loaded(tmp_path / f"out{count}")[1], loaded(folder)[1])
        assert any("differ" in note for note in made_.notes) == bool(count)


def test_variants(saved: Any, tmp_path: Path) -> None:
    """A variant is taken if there is nothing else; of several one has to be named."""
    made("llama").save_pretrained(tmp_path / "source", variant="fp16")
    assert recognise(tmp_path / "source")
    assert open_source(tmp_path / "source", Options()).weights.keys() == made("llama").state_dict().keys()
    sharded = tmp_path / "sharded"
    made("llama").save_pretrained(sharded, variant="fp16", max_shard_size=4000)
    assert open_source(sharded, Options()).weights.keys() == made("llama").state_dict().keys()
    shutil.copy(tmp_path / "source" / "model.fp16.safetensors", tmp_path / "source" / "model.fp32.safetensors")
    with pytest.raises(ConversionError, match="several files"):
        open_source(tmp_path / "source", Options())
    named = open_source(tmp_path / "source" / "model.fp32.safetensors", Options())
    assert named.weights.keys() == made("llama").state_dict().keys()
    assert "config.json" in named.files


def test_a_link_of_the_hubs_cache_is_followed_and_no_other(saved: Any, tmp_path: Path) -> None:
    """A snapshot links to the blobs beside it; a link to anywhere else is refused by name."""
    blobs, snapshot = tmp_path / "models--a" / "blobs", tmp_path / "models--a" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in saved("llama").iterdir():
        shutil.copy(file, blobs / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    convert(snapshot, tmp_path / "out", "hf", "hf")
    assert equal(loaded(tmp_path / "out")[1], loaded(saved("llama"))[1])
    (snapshot / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(ConversionError, match=r"tokenizer\.json is a link to /etc/hostname"):
        open_source(snapshot, Options())


def sharded(folder: Path, change: Any) -> Path:
    """Return a folder of several files whose index was changed."""
    made("llama").save_pretrained(folder, max_shard_size=4000)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    return folder


def test_an_index_that_names_a_missing_file(tmp_path: Path) -> None:
    """Is refused with the tensor's name and the file's."""
    folder = sharded(tmp_path / "a", lambda names: names.update({"model.norm.weight": "absent.safetensors"}))
    with pytest.raises(DamagedSourceError, match=r"model\.norm\.weight is in absent\.safetensors"):
        open_source(folder, Options())


def test_an_index_that_names_another_file(tmp_path: Path) -> None:
    """A tensor that is not in its file is named."""

    def swap(names: dict[str, str]) -> None:
        first, last = min(names.values()), max(names.values())
        tensor = next(name for name, file in names.items() if file == first)
        names[tensor] = last

    with pytest.raises(DamagedSourceError, match="does not hold"):
        open_source(sharded(tmp_path / "a", swap), Options())


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "", "..", "a\\b", 7])
def test_an_index_that_leads_out_of_the_folder(tmp_path: Path, name: Any) -> None:
    """Is refused, also if the file exists."""
    save_file({"model.norm.weight": torch.ones(16)}, tmp_path / "outside.safetensors")
    with pytest.raises(ConversionError):
        open_source(sharded(tmp_path / "a", lambda names: names.update({"model.norm.weight": name})), Options())


@pytest.mark.parametrize("text", ["", "[]", "{" * 10000, '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    """Is refused with its name."""
    folder = sharded(tmp_path / "a", lambda names: None)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(DamagedSourceError, match="index"):
        open_source(folder, Options())


def test_a_shard_that_is_cut_off(tmp_path: Path) -> None:
    """Nothing is left of the result."""
    folder = sharded(tmp_path / "a", lambda names: None)
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(DamagedSourceError, match=file.name):
        convert(folder, tmp_path / "out", "hf", "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9}, {"hidden_size": "many"}, {"architectures": ["__loader__"]}, {"architectures": 3},
        {"architectures": ["LlamaConfig"]}, {"model_type": "bert"}, {"attn_implementation": "evil/kernel"},
        {"quantization_config": {"quant_method": "bitsandbytes"}}, {"backbone": "resnet"},
    ],
)  # fmt: skip
def test_a_strange_configuration_keeps_the_files_names(saved: Any, tmp_path: Path, change: Any) -> None:
    """It costs the model's own names at most, never more time, and nothing is fetched or run."""
    source = shutil.copytree(saved("llama"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps(config))
    assert open_source(source, Options()).weights.keys() == load_file(source / "model.safetensors").keys()


def test_the_optimizers_state_is_left_out_and_that_is_said(saved: Any, tmp_path: Path) -> None:
    """A training's checkpoint in other hands gives a folder as well; what it lacks is told."""
    model = made("llama")
    model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=tmp_path / "dcp")
    result: Converted = convert(tmp_path / "dcp", tmp_path / "out", "hf", "dcp")
    assert [word for note in result.notes for word in ("optimizer", "config.json") if word in note]
    shutil.copy(saved("llama") / "config.json", tmp_path / "out")
    assert equal(hf.LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict(), model.state_dict())
