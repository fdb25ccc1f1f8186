"""A small Llama in training with FSDP2, by torch's documented calls alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def make_model(layers: int, seed: int) -> Any:
    """Return a Llama without dropout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=16,
        attn_implementation="eager",
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


class Training:
    """One rank of it; weight matrices decay, norms do not."""

    def __init__(self, group: Any, layers: int, seed: int) -> None:
        self.group, self.model = group, make_model(layers, seed)
        mesh = DeviceMesh.from_group(group, "cpu")
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        named = dict(self.model.named_parameters())
        groups = [
            {"params": [p for name, p in named.items() if "norm" not in name], "weight_decay": 0.1},
            {"params": [p for name, p in named.items() if "norm" in name], "weight_decay": 0.0, "lr": 0.02},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01)

    def steps(self, first: int, count: int) -> list[float]:
        """Make steps with the batches of these numbers."""
        losses = []
        for number in range(first, first + count):
            draw = torch.Generator().manual_seed(1000 * number + dist.get_rank(self.group))
            ids = torch.randint(32, (2, 8), generator=draw)
            loss = self.model(input_ids=ids, labels=ids).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def state(self) -> dict[str, Any]:
        """Return the sharded state."""
        model, optim = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optim}

    def whole(self) -> dict[str, Any]:
        """Return every tensor whole, and the rates."""
        state = self.state()
        found = {f"model.{name}": value for name, value in state["model"].items()}
        for name, kinds in state["optim"]["state"].items():
            found |= {f"optim.state.{name}.{kind}": value for kind, value in kinds.items()}
        whole = {key: v.full_tensor().clone() if isinstance(v, DTensor) else v for key, v in found.items()}
        return {**whole, "rates": [(group["lr"], group["weight_decay"]) for group in self.optimizer.param_groups]}


# What workers are told to call -----------------------------------------------------------


def save_steps(group: Any, layers: int, run: str, steps: tuple[int, ...]) -> None:
    """Train and save everything after each of these steps."""
    training, done = Training(group, layers, 0), 0
    for step in steps:
        training.steps(done, step - done)
        done = step
        dcp.save(training.state(), checkpoint_id=f"{run}/step-{step}", process_group=group)


def go_on(group: Any, layers: int, source: str, first: int, count: int) -> tuple[list[float], dict[str, Any]]:
    """Resume from a checkpoint in a training that began otherwise; return the losses and the end."""
    training = Training(group, layers, 1)
    state = training.state()
    dcp.load(state, checkpoint_id=source, process_group=group)
    set_state_dict(training.model, training.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    return training.steps(first, count), training.whole()


def go_on_by_hand(group: Any, layers: int, file: str, first: int, count: int) -> tuple[list[float], dict[str, Any]]:
    """Resume from whole tensors in a file of ``torch.save``; return the losses and the end."""
    training = Training(group, layers, 2)
    state = torch.load(file, weights_only=True)
    set_state_dict(
        training.model,
        training.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optim"],
        options=StateDictOptions(full_state_dict=True),
    )
    return training.steps(first, count), training.whole()
