"""The shortest script with layer-wise checkpoints: one process, one device, no torch.distributed.

    python examples/single_gpu.py my-run

Type the same command again, and it goes on where it was.
"""

from __future__ import annotations

import sys
import warnings

import torch
import torch.distributed.checkpoint as dcp
from tiny_llama import batch, tiny_llama

from tailor_dcp import LayerwisePlanner, TrainState, latest

# DCP warns in each call that it works in a single process, which is what is meant here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

run = sys.argv[1] if len(sys.argv) > 1 else "single-gpu-run"
device = "cuda" if torch.cuda.is_available() else "cpu"
model = tiny_llama(layers=4, device=device)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
progress = {"step": 0}
state = TrainState(model, optimizer, extra=progress)

if newest := latest(run):
    dcp.load(state, checkpoint_id=newest)
    print(f"resumed from {newest}")

for step in range(progress["step"] + 1, progress["step"] + 21):
    texts = batch(step).to(device)
    loss = model(input_ids=texts, labels=texts).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        progress["step"] = step
        dcp.save(state, checkpoint_id=f"{run}/step-{step}", planner=LayerwisePlanner("moments:every=5,weights=bf16"))
        print(f"step {step}: loss {loss.item():.3f}, saved")
