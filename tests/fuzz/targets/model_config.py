"""A model's ``config.json``, of which ``simulate`` builds the model without memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"

import warnings

import transformers

from tailor_dcp.model_states import state_of
from tests.fuzz.mutators.trees import jsons
from tests.fuzz.scratch import put
from tests.fuzz.target import Target

transformers.logging.set_verbosity_error()
warnings.simplefilter("ignore")
_SMALL = {
    "vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def parse(data: bytes) -> None:
    """Build the model, and the state of its training."""
    state = state_of(put(data, "model/config.json"))
    assert state.units


def seeds() -> Iterator[bytes]:
    """Small models of two families, and configurations that say less."""
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 2, **_SMALL}
    yield json.dumps(llama).encode()
    gpt2 = {"model_type": "gpt2", "vocab_size": 8, "n_positions": 4, "n_embd": 4, "n_layer": 1, "n_head": 2}
    yield json.dumps(gpt2).encode()
    yield b'{"model_type": "llama"'
    yield b'{"model_type": "nothing"}'
    yield json.dumps({**llama, "num_attention_heads": 0}).encode()
    yield json.dumps({**llama, "auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}).encode()


_WORDS = (
    "architectures", "LlamaForCausalLM", "GPT2LMHeadModel", "model_type", "llama", "gpt2", "hidden_size", "head_dim",
    "num_hidden_layers", "num_attention_heads", "vocab_size", "rope_scaling", "rope_theta", "hidden_act",
    "torch_dtype", "tie_word_embeddings", "auto_map", "quantization_config", "layer_types", "pad_token_id",
    "n_layer", "attn_implementation",
)  # fmt: skip
_BUILDING = 60.0
"""Seconds: transformers takes 3 ms to build a layer, and a model of 10,000 layers is not refused."""
for _seed in (*seeds(),)[:2]:
    parse(_seed)  # imports the models' classes, which is not the inputs' fault
TARGET = Target(parse, seeds, jsons(_WORDS), tuple(word.encode() for word in _WORDS), longest=1024, seconds=_BUILDING)
