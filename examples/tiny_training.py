"""Training the small Llama in one process, for the examples about merging: train, save, resume, look at the loss."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from tiny_llama import batch, held_out, tiny_llama
from torch.optim import AdamW

from tailor_dcp import LayerwisePlanner, TrainState

# DCP warns in each call that it works in a single process, which is what is meant here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

# Tensors as small as these are done before a second thread has heard of them.
torch.set_num_threads(1)

_MARKER = ".made-by-a-tailor-dcp-example"


class Training:
    """A model, its optimizer, and how far they are.

    Args:
        layers: of the model.
        resume: the checkpoint to go on from.
    """

    def __init__(self, layers: int = 8, resume: str | Path | None = None) -> None:
        self.model = tiny_llama(layers, width=64)
        self.optimizer = AdamW(self.model.parameters(), lr=5e-3)
        self.progress = {"step": 0}
        self.state = TrainState(self.model, self.optimizer, extra=self.progress)
        if resume:
            dcp.load(self.state, checkpoint_id=resume)

    def train(self, until: int, run: Path | None = None, every: int = 0) -> float:
        """Train up to a step; save to ``run`` after every so many steps. Return the loss on text never trained on."""
        for step in range(self.progress["step"] + 1, until + 1):
            texts = batch(step, size=8)
            self.model(input_ids=texts, labels=texts).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.progress["step"] = step
            if run and step % every == 0:
                dcp.save(self.state, checkpoint_id=run / f"step-{step}", planner=LayerwisePlanner("full"))
        return self.loss()

    def loss(self) -> float:
        """Return the loss on text that is never trained on."""
        with torch.inference_mode():
            return float(self.model(input_ids=held_out(), labels=held_out()).loss)


def fresh(folder: Path) -> Path:
    """Return an example's folder, without what an earlier try left in it."""
    if folder.exists() and not (folder / _MARKER).exists():
        raise SystemExit(f"{folder} was not made by an example, so it is left alone; name another with --run.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _MARKER).touch()
    return folder
