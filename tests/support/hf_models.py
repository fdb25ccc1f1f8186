"""Small models of many transformers families."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
import transformers as hf

hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()

_SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
_HEADS: dict[str, Any] = {**_SIZES, "num_key_value_heads": 1, "head_dim": 8}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_HEADS)),
    "llama-tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_HEADS, tie_word_embeddings=True)),
    "qwen2-tied": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_HEADS, tie_word_embeddings=True)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_HEADS)),
    "gpt2-tied": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    ),
    "gemma2-tied": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_HEADS)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_HEADS, pad_token_id=0)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_HEADS, num_local_experts=3)),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**_HEADS, num_experts=4, moe_intermediate_size=8, num_experts_per_tok=2)
    ),
    "opt-tied": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=64, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
            word_embed_proj_dim=16, max_position_embeddings=32,
        )
    ),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SIZES)),
    "bert-tied": lambda: hf.BertForMaskedLM(hf.BertConfig(**_SIZES)),
    "t5-tied": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    ),
    "vit": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
        )
    ),
}  # fmt: skip
"""One model each; those that transformers joins experts or renames parameters for are among them."""


def made(family: str) -> Any:
    """Return a family's model with random weights, always the same."""
    torch.manual_seed(0)
    return FAMILIES[family]()


def loaded(folder: Path, dtype: Any = "auto") -> tuple[Any, dict[str, torch.Tensor]]:
    """Load a folder as a user does; return the model and its state dict."""
    import json

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(hf, name).from_pretrained(folder, dtype=dtype)
    return model, model.state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Tell whether two state dicts have the same names, dtypes and bytes."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
