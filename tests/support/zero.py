"""Small trainings by real DeepSpeed engines, for workers that stay alive.

What a batch is depends on the step and the rank alone, so a resumed training whose losses are equal
has all of its state back: weights, moments, steps, buffers, learning rates.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

WIDTH = 8
VOCABULARY = 32


@dataclass(frozen=True)
class Setup:
    """How an engine is built.

    Attributes:
        stage: of ZeRO.
        dtype: bf16 or fp32.
        model: odd, llama or tied llama.
        groups: parameter groups; the second one has biases and norms and no weight decay.
        optimizer: adamw (torch's) or cpu_adam (DeepSpeed's).
        offload: whether the optimizer lives on the CPU.
        options: more of DeepSpeed's ``zero_optimization``.
        accumulate: batches a step.
    """

    stage: int = 3
    dtype: str = "fp32"
    model: str = "odd"
    groups: int = 1
    optimizer: str = "adamw"
    offload: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    accumulate: int = 1


class Odd(nn.Module):
    """All that is unusual: three dimensions, a single element, frozen weights, buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(6, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.cube = nn.Parameter(torch.randn(3, 5, 7))
        self.scale = nn.Parameter(torch.rand(1))
        self.fixed = nn.Linear(WIDTH, WIDTH)
        self.fixed.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("ones", torch.ones(WIDTH), persistent=False)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply all of it."""
        self.seen += 1
        x = self.inp(x) * self.ones.to(x.dtype)
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * self.scale
        x = self.fixed(x) + self.cube.square().mean() * self.seen.mean().to(x.dtype)
        return self.head(x)


def _odd_loss(model: Any, draw: torch.Generator, dtype: torch.dtype) -> Tensor:
    x = torch.randn(4, 6, generator=draw).to(dtype)
    return (model(x).float() - x.float().sum(1, keepdim=True)).square().mean()


def llama(tied: bool) -> nn.Module:
    """Return a small Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
        use_cache=False,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def _llama_loss(model: Any, draw: torch.Generator, dtype: torch.dtype) -> Tensor:
    ids = torch.randint(VOCABULARY, (2, 8), generator=draw)
    return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]


MODELS = {
    "odd": (Odd, _odd_loss),
    "llama": (lambda: llama(False), _llama_loss),
    "tied llama": (lambda: llama(True), _llama_loss),
}


def make_model(name: str, number: int) -> nn.Module:
    """Return a model that was drawn with a seed."""
    torch.manual_seed(number)
    return MODELS[name][0]().train()


def batch_loss(name: str, model: Any, step: int, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the loss of a rank's batch of a step."""
    draw = torch.Generator().manual_seed(1000 * step + rank)
    return MODELS[name][1](model, draw, dtype)


def param_groups(model: nn.Module, groups: int) -> list[dict[str, Any]]:
    """Divide the trained parameters in one or two groups."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if groups == 1:
        return [{"params": trained, "lr": 0.02, "weight_decay": 0.1}]
    return [
        {"params": [p for p in trained if p.dim() > 1], "lr": 0.02, "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() <= 1], "lr": 0.01, "weight_decay": 0.0},
    ]


def make_optimizer(setup: Setup, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the optimizer of a setup."""
    if setup.optimizer == "cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups)  # type: ignore[no-any-return]
    return torch.optim.AdamW(groups)


def make_engine(setup: Setup, number: int) -> Any:
    """Return an engine of all ranks."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    model = make_model(setup.model, number)
    optimizer = make_optimizer(setup, param_groups(model, setup.groups))
    zero: dict[str, Any] = {"stage": setup.stage, **dict(setup.options)}
    if setup.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": setup.accumulate,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }
    if setup.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    return engine


class ZeroTraining:
    """A training of one rank."""

    def __init__(self, setup: Setup, number: int) -> None:
        self.setup = setup
        self.engine = make_engine(setup, number)
        self.extra: dict[str, Any] | None = {"note": number}

    @property
    def state(self) -> Any:
        """The engine's state; made anew each time, as a script may."""
        from tailor_dcp import EngineState

        return EngineState(self.engine, extra=self.extra)

    def step(self) -> float:
        """Make one step and return this rank's loss."""
        dtype = torch.bfloat16 if self.setup.dtype == "bf16" else torch.float32
        loss = batch_loss(self.setup.model, self.engine, self.engine.global_steps, dist.get_rank(), dtype)
        self.engine.backward(loss)
        self.engine.step()
        return loss.item()

    def steps(self, count: int) -> list[float]:
        """Make several steps."""
        return [self.step() for _ in range(count)]

    def load(self, path: str | Path, planner: Any = None) -> list[str]:
        """Load and return what was warned of."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dcp.load(self.state, checkpoint_id=path, planner=planner)
        return [str(w.message) for w in caught if w.category.__name__ == "TailorWarning"]
