"""Names of a checkpoint's entries: sorted into layers and kinds, whatever they are, and in no time."""

from __future__ import annotations

from collections.abc import Iterator

from tailor_dcp.layers import LayerMap, strip_wrappers, trained
from tests.fuzz.mutators.texts import texts
from tests.fuzz.target import Target

_PLAIN, _EXPERTS = LayerMap(), LayerMap(experts=True)


def parse(data: bytes) -> None:
    """Take each line for a path, its parts cut by slashes and numbers among them being indexes."""
    paths = {line: _path(line) for line in data.decode("utf-8", "surrogateescape").split("\n")}
    for layers in (_PLAIN, _EXPERTS):
        entries = layers.classify(paths, [key for key in paths if not key.endswith("!")])
        assert entries.keys() <= paths.keys()
        for entry in entries.values():
            assert entry.unit.layer == layers.layer(entry.fqn), "an entry is in another layer than its name"
            assert strip_wrappers(entry.fqn) == entry.fqn, "a name that is not bare"
            LayerMap.position(entry.unit.layer)
        assert trained(entries) <= entries.keys()


def _path(line: str) -> tuple[str | int, ...]:
    parts = line.split("/")
    return tuple(int(part) if part.isascii() and part.isdecimal() and len(part) < 5 else part for part in parts)


def seeds() -> Iterator[bytes]:
    """State dicts of some trainers."""
    yield b"model/layers.0.weight\noptim/state/layers.0.weight/exp_avg\noptim/state/layers.0.weight/step"
    yield b"model.model.layers.0.weight\noptim.state.model.layers.0.weight.exp_avg\ntrain/step!\nrng!"
    yield b"module/_orig_mod.h.3.mlp.experts.7.w1.weight\nema/0/layers.1.bias\nmodels/1/_fsdp_wrapped_module.a.weight"
    yield b"optimizer.state.0.exp_avg\nstate/x/momentum_buffer\nloss\nlr_scheduler/last_lr/0\n"
    yield b"layers." + b"9" * 4400 + b".weight"
    yield b"base_model.model.q.lora_A.default.weight\na.parametrizations.weight.original0"


_WORDS = (
    "model", "optim", "state", "exp_avg", "exp_avg_sq", "step", "layers", "weight", "bias", "module", "_orig_mod",
    "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "experts", "lora_A", "parametrizations", "scheduler",
    "rng", "ema", "base_layer", "momentum_buffer", "_extra_state", "state_dict", "train", "/", ".", "\n", "0", "12",
    "optimizer.state.",
)  # fmt: skip
TARGET = Target(parse, seeds, texts(_WORDS), tuple(word.encode() for word in _WORDS), longest=5000)
