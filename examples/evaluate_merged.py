"""Evaluate a model before and after a merge with lm-eval, on questions that are a local file.

    pip install lm-eval          # the extra: pip install '.[eval]'
    python examples/evaluate_merged.py

A training saves DCP checkpoints. ``tailor merge --to hf`` makes a Hugging Face folder of the last one as it is, and one
of the average of the last five. Both go through lm-eval's own Hugging Face model. The task is two files in
``evaluation/``: a YAML that lm-eval finds by ``include_path``, and the questions. Nothing comes from the network.
"""

from __future__ import annotations

import os
from contextlib import chdir
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from tiny_training import Training, fresh
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tailor_dcp import merge

EVALUATION = Path(__file__).parent / "evaluation"
TASK = "tailor_python_words"


def main(
    run: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("evaluate-run"),
    steps: Annotated[int, typer.Option(min=5, help="Training steps; five checkpoints in the last tenth.")] = 250,
) -> None:
    """Train, merge, evaluate both."""
    if find_spec("lm_eval") is None:
        raise SystemExit("lm-eval is not installed: pip install lm-eval")
    run = fresh(run.resolve())
    every = max(1, steps // 50)
    training = Training()
    training.train(steps - 5 * every)
    last = []
    for _ in range(5):
        step = training.progress["step"] + every
        training.train(step, run, every=step)
        last.append(run / f"step-{step}")
    for checkpoint in last:  # what a Hugging Face folder needs beside weights travels in the folder hf/
        training.model.config.save_pretrained(checkpoint / "hf")
        byte_tokenizer().save_pretrained(checkpoint / "hf")

    merge({"base": str(last[-1])}, run / "before", to="hf")
    average = [{"model": str(checkpoint), "parameters": {"weight": 1}} for checkpoint in last]
    merge({"merge_method": "linear", "optimizer": "drop", "models": average}, run / "after", to="hf")

    for name in ("before", "after"):
        scores = evaluate(run / name, run / "cache")
        print(f"{name:<7} {TASK}: acc {scores['acc,none']:.3f} ± {scores['acc_stderr,none']:.3f}", flush=True)


def evaluate(model: Path, cache: Path) -> dict[str, Any]:
    """Return lm-eval's scores of a Hugging Face folder."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache)}
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with chdir(EVALUATION):  # the task names its questions' file
        found = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(model), "device": "cpu", "dtype": "float32"},
            tasks=[TASK],
            task_manager=TaskManager(include_path=str(EVALUATION), include_defaults=False),
            batch_size=8,
        )
    scores: dict[str, Any] = found["results"][TASK]
    return scores


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of the small Llama: one token a byte."""
    letters: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in letters.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=letters[0])  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    typer.run(main)
