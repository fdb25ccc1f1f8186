"""mergekit itself, run in this process, and small models of some families for it to merge."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers as hf
from safetensors.torch import load_file

from tests.support.hf_models import loaded

LAYERS = 4
_SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES, head_dim=8)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_SIZES, tie_word_embeddings=True)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_SIZES, head_dim=8, num_local_experts=3)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=LAYERS, n_head=2)
    ),
}


def save_family(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> list[str]:
    """Save three models of a family: one and two that were fine-tuned from it, as it were; return their folders."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)  # norms and biases should not be all the same
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    folders = []
    for number, name in enumerate("abc"):
        torch.manual_seed(number)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(base[key] + (torch.randn(parameter.shape) * 0.03 if number else 0))
        model.to(dtype).save_pretrained(folder / name)
        model.to(torch.float32)
        folders.append(str(folder / name))
    return folders


def mergekit(plan: Mapping[str, Any], out: Path) -> dict[str, torch.Tensor]:
    """Return what mergekit makes of a plan, by the names in its file."""
    from huggingface_hub.errors import StrictDataclassClassValidationError
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, clone_tensors=True)
    try:
        run_merge(MergeConfiguration.model_validate(plan), str(out), options)
    except StrictDataclassClassValidationError:
        # It changes a configuration's number of layers, but not its list of their types, and fails once the weights
        # are written.
        assert (out / "model.safetensors").is_file()
    return load_file(out / "model.safetensors")


def assert_alike(
    folder: Path,
    expected: Mapping[str, torch.Tensor],
    *,
    tolerance: float = 1e-4,
    rounding: torch.dtype | None = None,
    exact: bool = False,
) -> None:
    """Check a folder of ours, loaded by transformers, against mergekit's tensors.

    Args:
        folder: what we have written.
        expected: mergekit's tensors.
        tolerance: by how much of a tensor's largest element any may differ.
        rounding: a dtype that values were rounded to, of which they may differ by one step.
        exact: they must have the same bytes.
    """
    _, found = loaded(folder)
    extra = set(found) - set(expected)
    assert set(expected) <= set(found) and extra <= {"lm_head.weight"}
    for name, want in expected.items():
        have = found[name]
        assert have.dtype == want.dtype and have.shape == want.shape, name
        if exact:
            assert torch.equal(have, want), name
        step = torch.finfo(rounding).eps * want.double().abs() if rounding else 0.0
        bound = step + tolerance * want.double().abs().max()
        assert bool(((have.double() - want.double()).abs() <= bound).all()), name
