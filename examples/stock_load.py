"""Load checkpoints with nothing but torch, in one process, and see how well the model reads unseen text.

    python examples/stock_load.py my-run/step-*

The checkpoints may come from any number of ranks, and hold layers that earlier steps wrote.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from tiny_llama import held_out, tiny_llama
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import LlamaForCausalLM


def load_everything(checkpoint: Path) -> dict[str, Any]:
    """Load each entry of a checkpoint: weights, moments, scheduler, random number generators."""
    entries = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None
        for key, entry in entries.items()
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def held_out_loss(model: LlamaForCausalLM, state: dict[str, Any]) -> float:
    """Return the loss on text that no run trains on."""
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
    with torch.inference_mode():
        return float(model(input_ids=held_out(), labels=held_out()).loss)


def main() -> None:
    """Print a line of JSON for each checkpoint."""
    # Importing tailor_dcp is an error in this process from here on: what reads is stock DCP.
    sys.modules["tailor_dcp"] = None  # type: ignore[assignment]
    model = tiny_llama()
    for path in map(Path, sys.argv[1:]):
        state = load_everything(path)
        print(json.dumps({"checkpoint": str(path), "loss": held_out_loss(model, state)}), flush=True)


if __name__ == "__main__":
    main()
