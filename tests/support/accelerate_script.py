"""Trains a little with FSDP2 on the CPU; Accelerate's own functions save its state, or load one.

Accelerate itself turns FSDP on only where there is a GPU, so the model is sharded here, by the same calls.
Run under torchrun: ``accelerate_script.py save|load FOLDER OUT``; OUT gets what the model and the optimizer hold.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import fsdp_utils
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import fully_shard


class Block(nn.Module):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(self.a(x).tanh())


class Net(nn.Module):
    """A few layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def main(what: str, folder: str, out: str) -> None:
    """Save or load."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0 if what == "save" else 1)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False
    )
    net = Net()
    for layer in net.layers:
        fully_shard(layer)
    fully_shard(net)
    decayed = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others}], lr=0.01)
    for step in range(3):
        net(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if what == "save":
        fsdp_utils.save_fsdp_model(plugin, accelerator, net, folder)
        fsdp_utils.save_fsdp_optimizer(plugin, accelerator, optimizer, net, folder)
    else:
        fsdp_utils.load_fsdp_model(plugin, accelerator, net, folder)
        fsdp_utils.load_fsdp_optimizer(plugin, accelerator, optimizer, net, folder)
    model, optim = get_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if accelerator.is_main_process:
        torch.save({"model": model, "optim": optim}, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
