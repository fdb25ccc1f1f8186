"""What is trained: a small Llama that reads real text byte by byte, in two regimes."""

from __future__ import annotations

import functools
import math
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH = 64  # bytes in a row that the model sees
BATCH = 8  # rows of a training step
_HELD_OUT = 10  # every tenth piece of the text is never trained on
_PIECE = 16 * 1024

State = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """The model's dimensions, and the texts of a training step: 1.25 million parameters, or 107 million."""

    width: int = 128
    layers: int = 6
    head: int = 32
    rows: int = BATCH
    length: int = LENGTH


SMALL = Size()
LARGE = Size(width=768, layers=15, head=64, rows=4, length=128)
LARGE_BATCH = Size(width=768, layers=15, head=64, rows=16, length=256)
"""With eight times the text in a step: for a GPU."""


@dataclass(frozen=True)
class Regime:
    """A way to train.

    Attributes:
        name: what it is called in the table.
        steps: how many there are.
        interval: steps from one checkpoint to the next.
        points: the steps at which the run fails, right after the checkpoint there.
        peak: the highest learning rate.
        warm_up: steps in which the rate rises.
        final: the share of ``peak`` that a cosine decay ends at.
        betas: AdamW's.
        decay: AdamW's weight decay.
        tuned: start from the weights that the run before ended with, and read another text.
        rests: the step from which on only the last layer, the final norm and the head train, as in staged freezing.
    """

    name: str
    steps: int
    interval: int
    points: tuple[int, ...]
    peak: float
    warm_up: int
    final: float
    betas: tuple[float, float]
    decay: float
    tuned: bool = False
    rests: int | None = None

    def rate(self, step: int) -> float:
        """Return the learning rate of a step; the first is 1."""
        if step <= self.warm_up:
            return self.peak * step / self.warm_up
        done = (step - self.warm_up) / (self.steps - self.warm_up)
        return self.peak * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


@functools.cache
def text(tuned: bool) -> tuple[Tensor, Tensor]:
    """Return what is trained on and what is held out: the standard library's sources, or its reference in prose."""
    library = Path(sysconfig.get_path("stdlib"))
    prose = library / "pydoc_data" / "topics.py"
    paths = [prose] if tuned else sorted(p for p in library.rglob("*.py") if _is_source(p.relative_to(library)))
    whole = b"".join(path.read_bytes() for path in paths)
    pieces = [whole[at : at + _PIECE] for at in range(0, len(whole), _PIECE)]
    held_out = b"".join(pieces[_HELD_OUT - 1 :: _HELD_OUT])
    trained = b"".join(piece for i, piece in enumerate(pieces) if i % _HELD_OUT != _HELD_OUT - 1)
    return _bytes(trained), _bytes(held_out)


def _is_source(path: Path) -> bool:
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data", "encodings"}
    return left_out.isdisjoint(path.parts)


def _bytes(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def evaluation(regime: Regime, size: Size, tokens: int) -> Tensor:
    """Return ``tokens`` bytes of what is held out, spread evenly over it, in rows."""
    held_out = text(regime.tuned)[1]
    rows = min(tokens // size.length, len(held_out) // size.length)
    starts = torch.linspace(0, len(held_out) - size.length, rows).long()
    return torch.stack([held_out[start : start + size.length] for start in starts]).long()


class Training:
    """A model and its optimizer, somewhere in a regime. The same seed and step always read the same texts."""

    def __init__(self, regime: Regime, seed: int, size: Size = SMALL, device: str = "cpu") -> None:
        self.regime, self.seed, self.size, self.device = regime, seed, size, device
        self.model: Any = _llama(size, seed).to(device)  # type: ignore[arg-type]
        self.optimizer = AdamW(self.model.parameters(), lr=0.0, betas=regime.betas, weight_decay=regime.decay)

    def state(self) -> State:
        """Return weights and optimizer state as torch's own function names them."""
        model, optim = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optim}

    def restore(self, state: State) -> None:
        """Take over what ``state`` holds."""
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])

    def gradients(self, step: int) -> None:
        """Compute what the step's texts ask for; what rests gets none, and AdamW leaves it alone."""
        texts = self._batch(step)
        self.optimizer.zero_grad()
        resting = self._resting() if self.regime.rests is not None and step > self.regime.rests else []
        for parameter in resting:
            parameter.requires_grad_(False)
        self.model(input_ids=texts, labels=texts).loss.backward()
        for parameter in resting:
            parameter.requires_grad_(True)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def run(self, start: int, stop: int) -> Iterator[int]:
        """Train from after step ``start`` to ``stop``; yield each step when it is done."""
        for step in range(start + 1, stop + 1):
            for group in self.optimizer.param_groups:
                group["lr"] = self.regime.rate(step)
            self.gradients(step)
            self.optimizer.step()
            yield step

    def losses(self, rows: Tensor) -> Tensor:
        """Return the loss of each row, in nats a byte, in double precision."""
        found = []
        with torch.no_grad():
            for part in torch.split(rows, 64):
                ids = part.to(self.device)
                logits = self.model(input_ids=ids).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
                found.append(loss.view(len(part), -1).double().mean(1).cpu())
        return torch.cat(found)

    def _resting(self) -> list[Tensor]:
        moving = (f"model.layers.{self.size.layers - 1}.", "model.norm.", "lm_head.")
        return [parameter for fqn, parameter in self.model.named_parameters() if not fqn.startswith(moving)]

    def _batch(self, step: int) -> Tensor:
        trained = text(self.regime.tuned)[0]
        draw = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        starts = torch.randint(len(trained) - self.size.length, (self.size.rows,), generator=draw)
        return torch.stack([trained[s : s + self.size.length] for s in starts]).long().to(self.device)


def _llama(size: Size, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=size.width,
        intermediate_size=size.width * 8 // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // size.head,
        max_position_embeddings=size.length,
        use_cache=False,
        tie_word_embeddings=False,
        initializer_range=size.width**-0.5,
    )
    return LlamaForCausalLM(config)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: bit for bit the same in every process, and two runs share two cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
