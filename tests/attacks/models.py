"""Hugging Face folders: safetensors that lie, ``.bin`` files that run code, indexes that lead outside."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tests.attacks.attack import Gallery
from tests.attacks.byte_entries import rebuilt, with_tensor
from tests.attacks.ground import CONFIG, FQNS, Ground, saved, system

attack = Gallery("models", "model")
WEIGHTS = {fqn: torch.ones(4, 3) for fqn in FQNS}


def held(ground: Ground, content: bytes, name: str = "model.safetensors") -> Path:
    """Return a folder with other bytes for the weights."""
    folder = ground.copy("hf")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    return folder


def headed(header: Any, body: bytes = bytes(48), length: int | None = None) -> bytes:
    """Return a safetensors file with a header of its own; ``length`` is what it says that the header has."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(dtype: Any = "F32", shape: Any = (4, 3), offsets: Any = (0, 48)) -> dict[str, Any]:
    """Return a header of one tensor."""
    return {FQNS[0]: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


_TWO = {"dtype": "F32", "shape": [4, 3]}
for _what, _content in {
    "an empty file": b"",
    "seven bytes": b"1234567",
    "a header of 2 to the 63 bytes": struct.pack("<Q", 1 << 63) + b"{}",
    "a header of all 64 bits": b"\xff" * 8 + b"{}",
    "a header of 4 gigabytes": struct.pack("<Q", 1 << 32) + b"{}",
    "a header of 99 megabytes that is not there": struct.pack("<Q", 99_000_000) + b"{}",
    "a header of nothing": struct.pack("<Q", 0),
    "a header that ends early": headed(entry(), length=10),
    "a header that goes on into the data": headed(entry(), length=200),
    "a header that is a list": headed([1, 2]),
    "a header that is a number": headed(b"1"),
    "a header that is no JSON": headed(b"{'a': 1}"),
    "a header that is not UTF-8": headed(b'{"\xff\xfe": 1}'),
    "a header that nests deeply": headed(b'{"a":' * 200_000 + b"1" + b"}" * 200_000),
    "a header of lists that nest deeply": headed(b"[" * 1_000_000),
    "a header of a number of a million digits": headed(b'{"a": ' + b"9" * 1_000_000 + b"}"),
    "a header of NaN": headed(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, Infinity]}}'),
    "a header with a key twice": headed(
        b'{"a": {"dtype": "F32", "shape": [12], "data_offsets": [0, 48]}, '
        b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    ),
    "a header of many tensors": headed(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10_000)}, b""
    ),
    "a hole before the data": headed(entry(offsets=[4, 52]), bytes(52)),
    "a hole between tensors": headed(
        {"a": {**_TWO, "data_offsets": [0, 48]}, "b": {**_TWO, "data_offsets": [60, 108]}}, bytes(108)
    ),
    "tensors over each other": headed(
        {"a": {**_TWO, "data_offsets": [0, 48]}, "b": {**_TWO, "data_offsets": [24, 72]}}, bytes(72)
    ),
    "tensors on each other": headed({"a": {**_TWO, "data_offsets": [0, 48]}, "b": {**_TWO, "data_offsets": [0, 48]}}),
    "tensors in another order": headed(
        {"a": {**_TWO, "data_offsets": [48, 96]}, "b": {**_TWO, "data_offsets": [0, 48]}}, bytes(96)
    ),
    "bytes after the last tensor": headed(entry(), bytes(4096)),
    "offsets that go backwards": headed(entry(offsets=[48, 0])),
    "negative offsets": headed(entry(offsets=[-48, 0])),
    "offsets beyond the file": headed(entry(offsets=[0, 1 << 40])),
    "offsets that overflow": headed(entry(offsets=[(1 << 64) - 48, 1 << 64])),
    "offsets that are text": headed(entry(offsets=["0", "48"])),
    "offsets that are truth values": headed(entry(offsets=[False, True])),
    "three offsets": headed(entry(offsets=[0, 24, 48])),
    "a shape of other size": headed(entry(shape=[4, 4])),
    "a shape that overflows": headed(entry(shape=[1 << 32, 1 << 32, 0])),
    "a shape of 2 to the 62": headed(entry(shape=[1 << 62, 4])),
    "a negative shape": headed(entry(shape=[-4, -3])),
    "a shape of a float": headed(entry(shape=[4.0, 3.0])),
    "a shape of truth values": headed(entry(shape=[True, 12])),
    "a shape of ten thousand dimensions": headed(entry(shape=[1] * 10_000 + [12])),
    "no shape": headed({FQNS[0]: {"dtype": "F32", "data_offsets": [0, 48]}}),
    "an unknown dtype": headed(entry(dtype="__import__")),
    "a dtype that is a list": headed(entry(dtype=["F32"])),
    "a dtype of half the size": headed(entry(dtype="F16")),
    "a tensor that is a number": headed({FQNS[0]: 1}),
    "metadata that are a list": headed({"__metadata__": [1], **entry()}),
    "metadata of numbers": headed({"__metadata__": {"format": 1, "x": {}}, **entry()}),
    "metadata of control characters": headed({"__metadata__": {"format": "\x1b[2J"}, **entry()}),
    "a pickle": saved(WEIGHTS),
}.items():
    attack.add(f"safetensors: {_what}", f"Is a safetensors file with {_what}.", lambda g, c=_content: held(g, c))


def _bin(make: Callable[[Ground], bytes]) -> Callable[[Ground], Path]:
    return lambda ground: held(ground, make(ground), "pytorch_model.bin")


for _what, _make in {
    "code": lambda g: saved({**WEIGHTS, "x": system(g)}),
    "code alone": lambda g: saved(system(g)),
    "a number": lambda g: saved(3),
    "a list": lambda g: saved(list(WEIGHTS.values())),
    "names that are numbers": lambda g: saved(dict(enumerate(WEIGHTS.values()))),
    "an object among weights": lambda g: saved({**WEIGHTS, "x": {"y": 1}}),
    "an expanded tensor": lambda g: with_tensor(rebuilt(12, 0, (1 << 40,), (0,))),
    "safetensors under another name": lambda g: save(WEIGHTS),
    "half of it": lambda g: saved(WEIGHTS)[:700],
}.items():
    attack.add(f"bin: {_what}", f"Is a pytorch_model.bin with {_what}.", _bin(_make))


def indexed(ground: Ground, index: Any) -> Path:
    """Return a folder whose weights an index tells."""
    folder = ground.copy("hf")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


for _what, _file in {
    "outside": "../../outside/secret.distcp",
    "to an absolute path": "/etc/passwd",
    "to a share": "\\\\host\\share\\x",
    "to a URL": "https://evil.example/model.safetensors",
    "to its own folder": ".",
    "to nothing": "",
    "to a NUL": "a\0b.safetensors",
    "to itself": "model.safetensors.index.json",
    "to control characters": "\x1b[2J.safetensors",
    "to a device": "/dev/zero",
}.items():
    attack.add(f"an index that leads {_what}", f"Has an index that leads {_what}.",
               lambda g, f=_file: indexed(g, {"weight_map": dict.fromkeys(FQNS, f)}))  # fmt: skip
for _what, _index in {
    "is a list": [],
    "has no map": {"metadata": {}},
    "maps to numbers": {"weight_map": dict.fromkeys(FQNS, 3)},
    "maps nothing": {"weight_map": {}},
    "nests deeply": "[" * 500_000,
    "is a number of many digits": "9" * 1_000_000,
    "names tensors that are not there": {"weight_map": {"ghost": "model-00001-of-00001.safetensors"}},
}.items():
    attack.add(f"an index that {_what}", f"Has an index that {_what}.", lambda g, i=_index: indexed(g, i))


@attack
def weights_that_are_a_link_outside(ground: Ground) -> Path:
    """Puts a symbolic link to a model outside where the weights should be."""
    folder = ground.copy("hf")
    (folder / "model.safetensors").rename(ground.outside / "model.safetensors")
    (folder / "model.safetensors").symlink_to(ground.outside / "model.safetensors")
    return folder


@attack
def weights_that_are_a_pipe(ground: Ground) -> Path:
    """Puts a pipe where the weights should be."""
    folder = ground.copy("hf")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    return folder


@attack
def carried_file_that_is_a_link_outside(ground: Ground) -> Path:
    """Makes a file that is carried along a link to a secret, which the copy would publish."""
    folder = ground.copy("hf")
    (folder / "tokenizer.json").symlink_to(ground.secret)
    return folder


@attack
def carried_file_that_is_a_pipe(ground: Ground) -> Path:
    """Makes a file that is carried along a pipe."""
    folder = ground.copy("hf")
    os.mkfifo(folder / "tokenizer.json")
    return folder


@attack
def templates_that_are_a_link_outside(ground: Ground) -> Path:
    """Makes the folder of templates a link out of the model."""
    folder = ground.copy("hf")
    (ground.outside / "secret.jinja").write_bytes(ground.secret.read_bytes())
    (folder / "additional_chat_templates").symlink_to(ground.outside)
    return folder


@attack
def training_arguments_that_run_code(ground: Ground) -> Path:
    """Is a Trainer's folder whose arguments, scheduler and generators run a command when they are unpickled."""
    folder = ground.copy("hf")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 5}))
    for name in ("training_args.bin", "scheduler.pt", "rng_state.pth", "optimizer.pt"):
        (folder / name).write_bytes(saved(system(ground)))
    return folder


@attack
def adapter_that_leads_outside(ground: Ground) -> Path:
    """Is an adapter whose base model is a path outside."""
    folder = ground.copy("hf")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2**62, "base_model_name_or_path": str(ground.outside)})
    )
    return folder


# config.json, for `tailor simulate` ----------------------------------------------------------------


def configured(ground: Ground, changed: dict[str, Any] | str) -> Path:
    """Return a configuration with something else in it."""
    text = changed if isinstance(changed, str) else json.dumps({**CONFIG, **changed})
    return ground.write("model/config.json", text)


_REMOTE = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
for _what, _changed in {
    "remote code": {"auto_map": _REMOTE, "model_type": "evil"},
    "remote code of a repository": {"auto_map": {k: f"someone/something--{v}" for k, v in _REMOTE.items()}},
    "an architecture that is a function": {"architectures": ["pipeline"]},
    "an architecture that is a path": {"architectures": ["../../evil", 3, None]},
    "a million layers": {"num_hidden_layers": 1_000_000},
    "2 to the 62 layers": {"num_hidden_layers": 1 << 62},
    "negative layers": {"num_hidden_layers": -1},
    "layers that are text": {"num_hidden_layers": "many"},
    "a vocabulary of 2 to the 62": {"vocab_size": 1 << 62},
    "a hidden size of nothing": {"hidden_size": 0},
    "a hidden size of 2 to the 40": {"hidden_size": 1 << 40},
    "an unknown kind of model": {"model_type": "../../../etc/passwd"},
    "a name to fetch": {"_name_or_path": "https://evil.example/x", "tokenizer_class": "Evil"},
    "a list": "[]",
    "no JSON": "{",
    "deep nesting": "[" * 200_000,
    "a number of many digits": '{"num_hidden_layers": ' + "9" * 100_000 + "}",
    "a quantization that is loaded": {"quantization_config": {"quant_method": "gptq", "bits": 2}},
    "an activation that is code": {"hidden_act": "__import__('os').system('true')"},
}.items():

    def _config(ground: Ground, changed: Any = _changed) -> Path:
        path = configured(ground, changed)
        (path.parent / "evil.py").write_text(f"open({str(ground.sentinel)!r}, 'w')\nclass EvilConfig: pass\n")
        return path

    attack.add(f"config: {_what}", f"Is a config.json with {_what}.", _config, "config")


@attack.of("config")
def config_that_is_a_pipe(ground: Ground) -> Path:
    """Is a pipe for a configuration."""
    (ground.folder / "model").mkdir()
    os.mkfifo(ground.folder / "model" / "config.json")
    return ground.folder / "model" / "config.json"
