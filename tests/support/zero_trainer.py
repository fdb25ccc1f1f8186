"""The Hugging Face Trainer with DeepSpeed on the CPU, as a script for torchrun: ``FOLDER STAGE STEPS [RESUME]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


def main(folder: str, stage: str, steps: str, resume: str | None = None) -> None:
    """Train to a step, saving at the second one; leave the losses in ``FOLDER/losses.json``."""
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": int(stage), "sub_group_size": 500},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    arguments = TrainingArguments(
        folder, deepspeed=config, bf16=True, use_cpu=True, max_steps=int(steps), save_steps=2,
        per_device_train_batch_size=2, weight_decay=0.1, warmup_steps=1, learning_rate=1e-2, logging_steps=1,
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=2,
            hidden_size=16,
            intermediate_size=24,
            num_attention_heads=2,
            vocab_size=64,
            max_position_embeddings=16,
            tie_word_embeddings=True,
            attention_dropout=0.1,
        )
    )
    rows = [{"input_ids": torch.arange(n, n + 8) % 64, "labels": torch.arange(n, n + 8) % 64} for n in range(16)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if trainer.is_world_process_zero():
        Path(folder, "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
