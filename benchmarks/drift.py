"""What choosing by drift costs, beside a training step.

    python -m benchmarks.drift [--pairs 10] [--interval 50] [--device cuda] [--json FILE]

Choosing is everything that a drift policy adds to a save: taking the samples, putting them together, comparing them
with the base's, and asking the policy. Its seconds, spread over the interval between two saves, are set against a step
of training on the same threads, and the bytes of its sketches against the weights'.
"""

from __future__ import annotations

import statistics
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed.checkpoint as dcp
import typer
from torch.distributed.checkpoint.metadata import StorageMeta
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Ratio, interleave, ratio, training_state
from benchmarks.table import Row, publish, row
from tailor_dcp import LayerwisePlanner, drifts
from tailor_dcp.base import open_base
from tailor_dcp.coordination import gather
from tailor_dcp.layers import LayerMap
from tailor_dcp.policies import parse_policy
from tailor_dcp.selection import held, make_request

POLICY = "drift:threshold=0.05,states=0.6"
SIZES = {
    "1.7 M": LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=341, num_hidden_layers=8, num_attention_heads=4
    ),
    "100 M": LlamaConfig(
        vocab_size=256, hidden_size=768, intermediate_size=2048, num_hidden_layers=14, num_attention_heads=12
    ),
}
_TOKENS = 512  # a step of a batch this small is the hardest to hide in


class Choosing:
    """Everything that a drift policy adds to a save of some parameters, against a base that is one save old."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], folder: Path, device: str) -> None:
        self.policy = parse_policy(POLICY)
        state = training_state(shapes)
        self.weights = sum(t.numel() * t.element_size() for t in state["model"].values())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, about saving without a process group
            dcp.save(state, checkpoint_id=folder / "step-1", planner=LayerwisePlanner(self.policy))
        self.base = open_base(folder / "step-1")
        self.planner = LayerwisePlanner(self.policy, base=folder / "step-1")
        self.planner.set_up_planner(_moved(state, device), StorageMeta(str(folder / "step-2")), is_coordinator=True)
        self.plan = self.planner.create_local_plan()
        self.info = self.plan.planner_data
        self.state = gather([self.info], LayerMap(), self.base)

    @property
    def sketches(self) -> int:
        """The bytes of all sketches in the record."""
        assert self.base.record is not None
        return sum(map(len, self.base.record.sketches.values()))

    def run(self) -> None:
        """Choose once."""
        lookup = self.planner.lookup_object
        measured = drifts.measure(self.plan, lookup, self.policy, ("run", ""))
        state = drifts.compare(self.state, [measured], self.base, self.policy)
        drifts.remembered(state, (), self.base)
        origins = held(state, self.base.holdings())
        list(self.policy.select(make_request(state, origins, 2, 1, LayerMap(), self.policy)))


def _moved(tree: Any, device: str) -> Any:
    """Return a state after some training."""
    if isinstance(tree, torch.Tensor):
        return (tree * 1.01).to(device) if tree.dim() else tree
    return {key: _moved(value, device) for key, value in tree.items()} if isinstance(tree, dict) else tree


def measure(name: str, pairs: int, interval: int, device: str) -> list[Row]:
    """Measure one size of model."""
    model: Any = LlamaForCausalLM(SIZES[name]).to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    texts = torch.randint(256, (_TOKENS // 64, 64), device=device)
    shapes = {fqn: tuple(p.shape) for fqn, p in model.named_parameters()}

    def step() -> None:
        model(input_ids=texts, labels=texts).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device != "cpu":
            torch.cuda.synchronize()

    with tempfile.TemporaryDirectory(prefix="tailor-drift-") as folder:
        choosing = Choosing(shapes, Path(folder), device)
        times = interleave({"choosing": choosing.run, "step": step}, pairs, reset=lambda: None, warm_up=2)
    found = ratio(times["choosing"], times["step"])
    spread = Ratio(*(value / interval for value in (found.median, found.low, found.high)))
    said = (
        f"{statistics.median(times['choosing']) * 1e3:.1f} ms against {statistics.median(times['step']) * 1e3:.0f} ms"
    )
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return [
        row(
            f"choosing by drift, {name}, every {interval} steps", "a training step", "time", spread, bar=0.02, note=said
        ),
        row(f"sketches, {name}", "the weights", "bytes", choosing.sketches / weights, bar=0.001),
    ]


def main(
    pairs: Annotated[int, typer.Option(help="How often each is timed.")] = 10,
    interval: Annotated[int, typer.Option(help="Steps from one save to the next.")] = 50,
    device: Annotated[str, typer.Option(help="Where the state is.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Cores to use.")] = 1,
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
) -> None:
    """Measure both sizes."""
    torch.set_num_threads(threads)
    rows = [found for name in SIZES for found in measure(name, pairs, interval, device)]
    title = f"Choosing by drift on {threads} cores of {device}, {_TOKENS} bytes of text a step, {pairs} pairs"
    publish(title, rows, out, interval=interval)


if __name__ == "__main__":
    typer.run(main)
