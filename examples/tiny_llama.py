"""What the examples train: a small Llama that reads the Python standard library byte by byte.

Every machine that runs this has that text, so nothing is downloaded.
"""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HELD_OUT = 8 * 1024  # bytes at the end of the text that are never trained on
_LENGTH = 128  # bytes in a row that the model sees


def tiny_llama(layers: int = 8, width: int = 128, device: str = "cpu") -> LlamaForCausalLM:
    """Return a Llama of 1.6 million parameters, the same one in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=_LENGTH,
        use_cache=False,
        initializer_range=0.08,  # about 1/sqrt(width): so small a model learns little from the usual 0.02
    )
    with torch.device(device):
        return LlamaForCausalLM(config)


def batch(step: int, rank: int = 0, size: int = 4) -> Tensor:
    """Return a rank's texts for a step: always the same ones, so a resumed run sees what it would have seen."""
    draw = torch.Generator().manual_seed(1000 * step + rank)
    starts = torch.randint(len(_text()) - HELD_OUT - _LENGTH, (size,), generator=draw)
    return torch.stack([_text()[start : start + _LENGTH] for start in starts]).long()


def held_out() -> Tensor:
    """Return texts that no run trains on."""
    return _text()[-HELD_OUT:].view(-1, _LENGTH).long()


@functools.cache
def _text() -> Tensor:
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8)
