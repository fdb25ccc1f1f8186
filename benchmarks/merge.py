"""Merging 32 layers by parity from two steps: at 8B shapes, and beside ``cp -r`` and mergekit's passthrough.

    python -m benchmarks.merge [--pairs 15] [--place /dev/shm] [--json FILE]

At 8B shapes on 8 ranks files are sparse: a merge opens none of them, so only their names and lengths matter. ``cp`` and
mergekit do read, so they are timed on real bytes of a size that fits here, and what they would take at 8B is computed
from that. Everything runs in one process, in turns, with all imports done. Memory is measured apart, each piece of work
in a process of its own: anonymous memory beyond what the imports left.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from benchmarks.harness import LLAMA_8B, Work, interleave, llama_shapes, ratio, scratch
from benchmarks.memory import Watch
from benchmarks.sharded import Shapes, write_checkpoint
from benchmarks.table import publish, row
from tailor_dcp import merge
from tailor_dcp.recipes.native import Recipe, Take

RANKS = 8
REAL = llama_shapes(layers=32, hidden=320, vocab=32000)  # 73 M parameters: 0.88 GB of fp32 weights and moments
MODEL = llama_shapes(layers=32, hidden=576, vocab=42424)  # three times as many, so that its weights have these bytes
LARGER = {name: (10 * rows, *others) for name, (rows, *others) in LLAMA_8B.items()}  # ten times the bytes
EIGHT, TENFOLD, OURS, CP, MERGEKIT = "8B", "8B x 10", "ours", "cp -r", "mergekit-yaml"
WORKS = (EIGHT, TENFOLD, OURS, CP, MERGEKIT)
_MEBI = 1 << 20


def main(
    pairs: Annotated[int, typer.Option(help="Interleaved pairs.")] = 15,
    place: Annotated[Path, typer.Option(help="Where to merge.")] = Path("/dev/shm"),
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
    watch: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure all of it; exit with 1 if a bar is missed."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if watch:
        print(json.dumps(_watched(watch, place)))
        return
    with scratch(str(place)) as folder:
        sizes = _prepare(folder)
        works = _works(folder)
        times = interleave(works, pairs, reset=lambda: _clean(folder / "out"))
        memory = {name: _in_own_process(name, folder) for name in WORKS}
        command = [_command(folder) for _ in range(3)]
    _report(times, sizes, memory, median(command), place, out)


def _prepare(folder: Path) -> dict[str, int]:
    """Make all sources; return the bytes of one of each kind."""
    sizes: dict[str, int] = {}
    for name, shapes in ((EIGHT, LLAMA_8B), (TENFOLD, LARGER), (OURS, REAL)):
        for step in (100, 200):
            sizes[name] = write_checkpoint(folder / name / f"step-{step}", shapes, RANKS, sparse=name != OURS)
    for step in (100, 200):
        sizes[MERGEKIT] = _write_model(folder / MERGEKIT / f"step-{step}", MODEL)
    (folder / "plan.yaml").write_text(_plan(folder / MERGEKIT))
    return {**sizes, CP: sizes[OURS]}


def _works(folder: Path) -> dict[str, Work]:
    target = folder / "out"
    ours = {name: partial(_parity, folder / name, target) for name in (EIGHT, TENFOLD, OURS)}
    return {
        **ours,
        CP: lambda: _copy(folder / OURS / "step-200", target),
        MERGEKIT: _mergekit(folder / "plan.yaml", target),
    }


def _parity(run: Path, target: Path) -> None:
    merge(Recipe(f"{run}/step-200", (Take("model.layers.*[13579]", f"{run}/step-100"),)), target)


def _copy(source: Path, target: Path) -> None:
    _run(["cp", "-r", str(source), str(target)])


def _mergekit(plan: Path, target: Path) -> Work:
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(yaml.safe_load(plan.read_text()))
    # As the command has it, less the progress bar.
    return lambda: run_merge(config, str(target), MergeOptions(quiet=True, copy_tokenizer=False))


def _plan(models: Path) -> str:
    """Return mergekit's plan that takes every other layer from the earlier step."""
    slices = [
        {"sources": [{"model": str(models / f"step-{(200, 100)[i % 2]}"), "layer_range": [i, i + 1]}]}
        for i in range(32)
    ]
    return json.dumps({"merge_method": "passthrough", "dtype": "float32", "slices": slices})


def _write_model(folder: Path, shapes: Shapes) -> int:
    """Write a Hugging Face model of random weights in fp32; return its bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    file = folder / "model.safetensors"
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, file, metadata={"format": "pt"})
    vocab, hidden = shapes["lm_head.weight"]
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=32,
        num_attention_heads=8, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    return file.stat().st_size


def _run(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed: {done.stderr[-2000:]}")
    return done.stdout


def _remove(target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)


def _clean(target: Path) -> None:
    _remove(target)
    gc.collect()  # or it falls to whichever work comes when the heap of all imports is looked through


def _command(folder: Path) -> float:
    """Return the seconds that the whole command takes at 8B shapes, the start of Python and imports included."""
    tailor = Path(sys.executable).with_name("tailor")
    run = folder / EIGHT
    words = [str(tailor), "merge", "--base", f"{run}/step-200", "--take", f"model.layers.*[13579]={run}/step-100"]
    start = time.perf_counter()
    _run([*words, str(folder / "out")])
    seconds = time.perf_counter() - start
    _remove(folder / "out")
    return seconds


def _in_own_process(work: str, folder: Path) -> int:
    told = _run([sys.executable, "-m", "benchmarks.merge", "--watch", work, "--place", str(folder)])
    _remove(folder / "out")
    return int(json.loads(told.strip().splitlines()[-1]))


def _watched(work: str, folder: Path) -> int:
    run = _works(folder)[work]
    with Watch() as watch:
        run()
    return watch.peak


def _report(
    times: dict[str, list[float]],
    sizes: dict[str, int],
    memory: dict[str, int],
    command: float,
    place: Path,
    out: Path | None,
) -> None:
    eight = median(times[EIGHT])
    computed = {name: median(times[name]) / sizes[name] * sizes[EIGHT] for name in (CP, MERGEKIT)}
    title = f"Merging 32 layers by parity from two steps, {RANKS} ranks of shards, {place}, {len(times[OURS])} rounds"
    size = f"{sizes[OURS] / 1e9:.2f} GB"
    told = {name: f"its {median(times[name]):.2f} s, {memory[name] / _MEBI:.0f} MiB private" for name in (CP, MERGEKIT)}
    rows = [
        row("ten times the bytes of 8B", "8B", "time", ratio(times[TENFOLD], times[EIGHT]), 1.2),
        row("8B shapes, sparse", "1 s", "time beyond imports", eight, 1.0, note=f"the whole command {command:.2f} s"),
        row(
            "8B shapes, sparse", "cp -r, computed", "time", eight / computed[CP], 0.1, note=f"its {computed[CP]:.0f} s"
        ),
        row(f"{size}, parity", CP, "time", ratio(times[OURS], times[CP]), note=told[CP]),
        row(f"{size}, parity", MERGEKIT, "time", ratio(times[OURS], times[MERGEKIT]), 1.0, note=told[MERGEKIT]),
    ]
    publish(title, rows, out, bytes=sizes, memory=memory, computed=computed, command=command)


if __name__ == "__main__":
    typer.run(main)
