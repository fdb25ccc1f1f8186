"""Small real trainings: wrapped in every way, each rank with data and random numbers of its own.

The loss depends on dropout, on Python's and numpy's generators and on the data loader's
position, so a resumed training whose losses are equal has every one of them back.
"""

from __future__ import annotations

import json
import os
import random
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss

WIDTH = 8
RESERVED = {"train.rng", "train.token"}


class Block(nn.Module):
    """A residual block with dropout and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Count the call and go on."""
        self.seen += 1
        return x + self.dropout(self.linear(self.norm(x)))


class Net(nn.Module):
    """Numbered blocks between two other layers."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.inp = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply all layers."""
        x = self.inp(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Loader:
    """Data of one rank; where it is tells nothing about where other ranks are."""

    def __init__(self, rank: int = 0) -> None:
        self.rank, self.position = rank, 0

    def draw(self) -> torch.Generator:
        """Return a generator for the next batch."""
        self.position += 1 + self.rank
        return torch.Generator().manual_seed(1000 * self.position + self.rank)

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return {"position": self.position, "order": torch.arange(self.position)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the position."""
        self.position = int(state_dict["position"])
        assert torch.equal(state_dict["order"], torch.arange(self.position))


def seed(number: int) -> None:
    """Seed all generators of this process."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def draws() -> tuple[float, float, float]:
    """Return the next number of each generator."""
    return random.random(), float(np.random.rand()), torch.rand(()).item()


# Wrapping --------------------------------------------------------------------------------


def _blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.model.layers if hasattr(model, "config") else model.layers)


def _plain(model: nn.Module, group: Any) -> nn.Module:
    return model


def _ddp(model: nn.Module, group: Any) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model, process_group=group)


def _fsdp1(model: nn.Module, group: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        model,
        process_group=group,
        use_orig_params=True,
        device_id=torch.device("cpu"),
        auto_wrap_policy=ModuleWrapPolicy({type(_blocks(model)[0])}),
    )


def _fsdp2(model: nn.Module, group: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group, "cpu")
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPINGS = {"plain": _plain, "ddp": _ddp, "fsdp1": _fsdp1, "fsdp2": _fsdp2}


def tied_llama() -> nn.Module:
    """Return a Llama whose head is its embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        attention_dropout=0.2,
        attn_implementation="eager",
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def _net_loss(model: nn.Module, draw: torch.Generator) -> Tensor:
    x = torch.randn(4, WIDTH, generator=draw) * random.random() + float(np.random.rand())
    return mse_loss(model(x), x.sum(1, keepdim=True))


def _llama_loss(model: nn.Module, draw: torch.Generator) -> Tensor:
    ids = torch.randint(32, (2, 8), generator=draw)
    return model(input_ids=ids, labels=ids).loss * random.random() * float(np.random.rand())


MODELS = {"net": (Net, _net_loss), "tied llama": (tied_llama, _llama_loss)}


class Training:
    """A model in training, of one rank."""

    def __init__(self, number: int, wrapping: str = "plain", group: Any = None, model: str = "net") -> None:
        from tailor_dcp import TrainState

        make, self._loss = MODELS[model]
        self.group, self.rank = group, 0 if group is None else dist.get_rank(group)
        self._average = wrapping == "plain" and group is not None
        seed(number)  # all ranks begin with the same weights
        self.model = WRAPPINGS[wrapping](make(), group)
        seed(100 * number + self.rank)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.7)
        self.loader = Loader(self.rank)
        self.progress = {"step": 0}
        self.state = TrainState(
            self.model, self.optimizer, self.scheduler, self.loader, self.progress, process_group=group
        )

    def step(self) -> float:
        """Make one step and return this rank's loss."""
        self.progress["step"] += 1
        loss = self._loss(self.model, self.loader.draw())
        loss.backward()
        for p in self.model.parameters() if self._average else ():
            dist.all_reduce(p.grad, group=self.group)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss.item()

    def steps(self, count: int) -> list[float]:
        """Make several steps."""
        return [self.step() for _ in range(count)]

    def save(self, path: str | Path, policy: Any = "parity", **options: Any) -> None:
        """Save with our planner."""
        from tailor_dcp import LayerwisePlanner

        dcp.save(self.state, checkpoint_id=path, planner=LayerwisePlanner(policy, **options), process_group=self.group)

    def load(self, path: str | Path) -> None:
        """Load as anybody does."""
        dcp.load(self.state, checkpoint_id=path, process_group=self.group)

    def weights(self) -> dict[str, Tensor]:
        """Return what this rank has of each parameter and buffer."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: local(value).detach().clone() for name, value in named}


def local(value: Tensor) -> Tensor:
    """Return this rank's part of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


# What workers are told to call -------------------------------------------------------------


class Outcome(NamedTuple):
    """How a training went on: its losses, and what it had at the end."""

    losses: list[float]
    weights: dict[str, Tensor]
    draws: tuple[float, float, float]
    rates: list[float]
    progress: dict[str, int]


class Resumed(NamedTuple):
    """How a training went on after a save, and how another one did that loaded it, fresh and once more later."""

    expected: Outcome
    resumed: Outcome
    gone_back: Outcome
    keys: set[str]
    stock_keys: set[str]


def _outcome(training: Training, steps: int) -> Outcome:
    losses = training.steps(steps)
    return Outcome(losses, training.weights(), draws(), training.scheduler.get_last_lr(), dict(training.progress))


def resume(group: Any, wrapping: str, model: str, path: str) -> Resumed:
    """Train, save, train on; resume in a model that began with other weights, data and random numbers."""
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict
    from torch.distributed.checkpoint.state_dict import get_state_dict

    first = Training(1, wrapping, group, model)
    first.steps(3)
    first.save(path, "full")
    weights, moments = get_state_dict(first.model, first.optimizer)
    stock_keys = set(flatten_state_dict({"model": weights, "optim": moments})[0])
    keys = set(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)
    expected = _outcome(first, 3)
    again = Training(2, wrapping, group, model)
    again.load(path)
    resumed = _outcome(again, 3)
    again.load(path)
    return Resumed(expected, resumed, _outcome(again, 3), keys, stock_keys)


def save_ranks(group: Any, path: str, together: bool) -> list[tuple[float, float, float]]:
    """Save and return the numbers that this rank draws next; its loader is where others are, or not."""
    training = Training(1, "plain", group)
    training.loader.position = 7 if together else 7 + training.rank
    training.save(path, "full")
    return [draws(), draws()]


class Loaded(NamedTuple):
    """What one rank has after a load."""

    draws: list[tuple[float, float, float]]
    position: int
    warnings: list[str]


def load_ranks(group: Any, path: str) -> Loaded:
    """Load where everything was different and return the numbers that this rank draws next."""
    training = Training(2, "plain", group)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training.load(path)
    said = [str(w.message) for w in caught if w.category.__name__ == "TailorWarning"]
    return Loaded([draws(), draws()], training.loader.position, said)


def keep_training(group: Any, wrapping: str, run: str) -> list[int]:
    """Save layer by layer, go back, save again; return the steps that the last save's bytes come from."""
    training = Training(1, wrapping, group)
    for step in (100, 120, 200):
        training.step()
        training.save(f"{run}/step-{step}")
    training.load(f"{run}/step-100")
    training.step()
    training.save(f"{run}/step-140")
    return origin_steps(f"{run}/step-140")


def train_and_save(group: Any, wrapping: str, path: str) -> None:
    """Train and save everything."""
    training = Training(1, wrapping, group)
    training.steps(2)
    training.save(path, "full")


def load_and_save(group: Any, wrapping: str, source: str, target: str) -> None:
    """Load into a training that began otherwise, and save everything again."""
    training = Training(2, wrapping, group)
    training.load(source)
    training.save(target, "full")


def save_alone(group: Any, run: str) -> list[str]:
    """Save twice as the only rank of its checkpoint; return the parent of the second."""
    from tailor_dcp import LayerwisePlanner, inspect

    training = Training(1, "plain", group)
    folder = f"{run}/rank{training.rank}/step-{training.rank + 1}"
    for path in (f"{folder}0", f"{folder}1"):
        dcp.save(training.state, checkpoint_id=path, planner=LayerwisePlanner("parity"), no_dist=True)
    return [str(inspect(f"{folder}1").parent)]


def load_alone(group: Any, run: str) -> list[int]:
    """Let the last rank load something on its own; return the steps that the next save's bytes come from."""
    training = Training(1, "plain", group)
    training.save(f"{run}/step-100")
    if training.rank == dist.get_world_size(group) - 1:
        dcp.load({"model": Net().state_dict()}, checkpoint_id=f"{run}/step-100", no_dist=True)
    training.save(f"{run}/step-140")
    return origin_steps(f"{run}/step-140")


def gathered(group: Any) -> list[int]:
    """Return what all ranks hold, as this rank sees it."""
    from tailor_dcp import rank_state

    assert rank_state.world_size(group) == dist.get_world_size(group)
    return rank_state.gather(rank_state.rank_of(group) * 10, group)


def origin_steps(path: str | Path) -> list[int]:
    """Return the steps that a checkpoint's bytes come from."""
    from tailor_dcp import inspect

    return sorted({unit.origin_step for unit in inspect(path).units if unit.origin_step is not None})


# A process of its own ----------------------------------------------------------------------


def _main(source: str, target: str) -> None:
    """Resume from one folder, make a step, save to another; print where its bytes come from."""
    training = Training(2)
    training.load(source)
    training.step()
    training.save(target)
    print(json.dumps(origin_steps(target)))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    partial(_main, *sys.argv[1:])()
