"""Small models of four kinds, and the batches that they are trained with; the same in every process."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 64
FAMILIES = ("llama", "tied_llama", "gpt2", "odd")


class Odd(torch.nn.Module):
    """What a converter may stumble over: three dimensions, one element, frozen parameters, ties and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, 7)
        self.cube = torch.nn.Parameter(torch.randn(3, 5, 7) * 0.1)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.frozen = torch.nn.Parameter(torch.randn(11, 7) * 0.1, requires_grad=False)
        self.frozen_one = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        self.norm = torch.nn.LayerNorm(7)
        self.register_buffer("seen", torch.zeros(3))
        self.head = torch.nn.Linear(7, VOCABULARY)
        self.register_buffer("table", torch.arange(13, dtype=torch.int64))
        self.register_buffer("passing", torch.ones(4), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens).mean(1) * self.scale * self.frozen_one
        x = x + torch.einsum("abc,bc->c", self.cube, self.cube.sum(0)) + self.frozen.sum(0)
        self.seen += 0.25
        x = self.norm(x) * self.passing[:1].to(x.dtype) * (1 + self.seen[:1].to(x.dtype))
        return torch.nn.functional.cross_entropy(self.head(x).float(), tokens[:, 0])


def make_net(family: str, seed: int) -> torch.nn.Module:
    """Return a new model of a family."""
    torch.manual_seed(seed)
    if family == "odd":
        return Odd()
    import transformers

    if family == "gpt2":
        config: Any = transformers.GPT2Config(
            n_layer=2, n_head=2, n_embd=18, vocab_size=VOCABULARY, n_positions=16, bos_token_id=1, eos_token_id=2
        )
        config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=20, intermediate_size=35, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, max_position_embeddings=16, tie_word_embeddings=family == "tied_llama",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def loss_of(model: Any, family: str, tokens: torch.Tensor) -> torch.Tensor:
    """Return the loss of a batch."""
    return model(tokens) if family == "odd" else model(input_ids=tokens, labels=tokens).loss


def batch(step: int, rank: int) -> torch.Tensor:
    """Return a rank's tokens for a step."""
    generator = torch.Generator().manual_seed(step * 1000 + rank)
    return torch.randint(0, VOCABULARY, (2, 8), generator=generator)


def param_groups(model: torch.nn.Module, groups: int) -> list[dict[str, Any]]:
    """Return one group with everything that is trained, or weights and biases with a weight decay each."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if groups == 1:
        return [{"params": [p for _, p in trained], "weight_decay": 0.05}]
    small = [p for _, p in trained if p.dim() < 2]
    large = [p for _, p in trained if p.dim() >= 2]
    return [{"params": large, "weight_decay": 0.1}, {"params": small, "weight_decay": 0.0}]
