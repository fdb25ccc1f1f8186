"""``tailor simulate``: bytes, seconds and money that a policy would cost, before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table

from tailor_dcp.cli.output import console, print_json, say, size
from tailor_dcp.intervals import Prices, daly, wasted, young
from tailor_dcp.model_states import state_of
from tailor_dcp.simulate import Simulation, SimulationError
from tailor_dcp.simulate import simulate as simulate_run

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_FULL = "full"


def simulate(
    model: Annotated[Path, typer.Option(help="A Hugging Face config.json or its folder, or a checkpoint.")],
    policy: Annotated[str, typer.Option(help="As LayerwisePlanner takes it: moments:every=5,weights=bf16.")],
    every: Annotated[int, typer.Option(help="Steps from one save to the next.")] = 100,
    steps: Annotated[int, typer.Option(help="Steps of the run.")] = 10_000,
    optimizer: Annotated[str, typer.Option(help="adamw, adam, lion, momentum or sgd.")] = "adamw",
    dtype: Annotated[str, typer.Option(help="Of weights and optimizer in training: fp32, bf16, fp16.")] = "fp32",
    ranks: Annotated[int, typer.Option(help="Ranks that shard the state.")] = 1,
    frozen: Annotated[list[str] | None, typer.Option(help="A glob of layers or parameters that rest.")] = None,
    full_every: Annotated[int | None, typer.Option(help="Every so many saves, one is full.")] = None,
    keep_last: Annotated[int | None, typer.Option(help="Checkpoints that are kept; all, if not given.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Write rate of all ranks together, GB/s.")] = None,
    step_seconds: Annotated[float | None, typer.Option(help="How long a step takes.")] = None,
    mtbf_hours: Annotated[float | None, typer.Option(help="Mean time between failures of the whole job.")] = None,
    restart_seconds: Annotated[float, typer.Option(help="From a failure until it trains again.")] = 0.0,
    lost_intervals: Annotated[
        float, typer.Option(help="Intervals that resuming from such a checkpoint loses beside a full one (measured).")
    ] = 0.0,
    gpus: Annotated[int, typer.Option(help="Accelerators of the job.")] = 1,
    gpu_hour: Annotated[float, typer.Option(help="Price of one of them for an hour.")] = 0.0,
    gb_month: Annotated[float, typer.Option(help="Price of a gigabyte stored for a month.")] = 0.0,
    allow: Annotated[list[str] | None, typer.Option(help="A class, as module.Class, that may be unpickled.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what a policy would write, keep and cost beside full saves.

    With --bandwidth also seconds; with --step-seconds and --mtbf-hours also the best interval and what failures cost.
    """
    for name, value in (("bandwidth", bandwidth), ("step-seconds", step_seconds), ("mtbf-hours", mtbf_hours)):
        if value is not None and value <= 0:
            raise SimulationError(f"--{name} {value:g} makes no sense; give a number above 0.")
    if dtype not in _DTYPES:
        raise SimulationError(f"--dtype {dtype} is unknown; use {', '.join(_DTYPES)}.")
    state = state_of(model, optimizer, _DTYPES[dtype], frozen or (), tuple(allow or ()))

    def run(of: str) -> Simulation:
        return simulate_run(state, of, every, steps, ranks=ranks, full_every=full_every, keep_last=keep_last)

    found = {of: run(of) for of in dict.fromkeys((_FULL, policy))}
    times = {of: _times(one, bandwidth) for of, one in found.items()}
    costs = {
        of: _costs(
            one, times[of], every, step_seconds, mtbf_hours, restart_seconds,
            lost_intervals if of != _FULL else 0.0, Prices(gpus, gpu_hour, gb_month),
        )
        for of, one in found.items()
    }  # fmt: skip
    if as_json:
        print_json({of: {**found[of].to_dict(), **times[of], **costs[of]} for of in found})
    else:
        _show(found, times, costs, every, bool(gpu_hour or gb_month))


def _times(found: Simulation, bandwidth: float | None) -> dict[str, Any]:
    return {"save_seconds": found.later / (bandwidth * 1e9)} if bandwidth else {}


def _costs(
    found: Simulation,
    times: dict[str, Any],
    every: int,
    step_seconds: float | None,
    mtbf_hours: float | None,
    restart: float,
    lost_intervals: float,
    prices: Prices,
) -> dict[str, Any]:
    """Return what failures cost at this interval and at the best one, as far as what was told is enough."""
    if "save_seconds" not in times or step_seconds is None or mtbf_hours is None:
        return {}
    save, mtbf = times["save_seconds"], 3600 * mtbf_hours
    best = daly(save, mtbf)
    waste = wasted(every * step_seconds, save, mtbf, restart, lost_intervals)
    least = wasted(best, save, mtbf, restart, lost_intervals)
    return {
        "lost_steps_a_failure": every * (0.5 + lost_intervals),
        "wasted": waste,
        "best_every": max(1, round(best / step_seconds)),
        "best_seconds": best,
        "young_seconds": young(save, mtbf),
        "wasted_at_best": least,
        "yearly": prices.yearly(waste, found.disk),
        "yearly_at_best": prices.yearly(least, found.disk),
    }


def _show(
    found: dict[str, Simulation],
    times: dict[str, dict[str, Any]],
    costs: dict[str, dict[str, Any]],
    every: int,
    money: bool,
) -> None:
    one = next(iter(found.values()))
    title = f"{one.parameters:,} parameters, {len(one.saves):,} saves, one every {every:,} steps"
    table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False)
    table.add_column("")
    for name in found:
        table.add_column(escape(name), justify="right")
    for label, cells in _lines(found, times, costs, money):
        table.add_row(label, *cells)
    console().print(table)
    if len(found) > 1:
        (full, ours), (of_full, of_ours) = found.values(), costs.values()
        say(_conclusion(full, ours, of_full, of_ours, money=money))


def _lines(
    found: dict[str, Simulation],
    times: dict[str, dict[str, Any]],
    costs: dict[str, dict[str, Any]],
    money: bool,
) -> list[tuple[str, list[str]]]:
    def row(label: str, tell: Any) -> tuple[str, list[str]]:
        return label, [tell(of) for of in found]

    lines = [
        row("a save, after the first", lambda of: size(round(found[of].later))),
        row("of a full save", lambda of: f"{100 * found[of].fraction:.1f} %"),
        row("the largest after the first", lambda of: size(max(found[of].saves[1:], default=found[of].full))),
        row("the whole run", lambda of: size(found[of].total)),
        row("disk in use at the end", lambda of: size(found[of].disk)),
        row("the same with DCP's own writer", lambda of: size(found[of].disk_stock)),
        row("weights behind, mean and most", lambda of: _behind(found[of], weights=True)),
        row("moments behind, mean and most", lambda of: _behind(found[of], weights=False)),
    ]
    if all(times.values()):
        lines.append(row("a save takes", lambda of: f"{times[of]['save_seconds']:.3g} s"))
    if all(costs.values()):
        lines += [
            row("lost by a failure, mean", lambda of: f"{costs[of]['lost_steps_a_failure']:,.0f} steps"),
            row("time lost at this interval", lambda of: f"{100 * costs[of]['wasted']:.2f} %"),
            row("best interval (Daly)", lambda of: f"{costs[of]['best_every']:,} steps"),
            row("time lost at the best interval", lambda of: f"{100 * costs[of]['wasted_at_best']:.2f} %"),
        ]
        if money:
            lines += [
                row("a year costs, at this interval", lambda of: f"{costs[of]['yearly']:,.0f}"),
                row("a year costs, at the best", lambda of: f"{costs[of]['yearly_at_best']:,.0f}"),
            ]
    return lines


def _behind(found: Simulation, weights: bool) -> str:
    ages = [age for kind, age in found.stale.items() if (kind == "weight") == weights and kind != "step"]
    return f"{max(mean for mean, _ in ages):.0f}, {max(most for _, most in ages)} steps" if ages else "-"


def _conclusion(
    full: Simulation, ours: Simulation, of_full: dict[str, Any], of_ours: dict[str, Any], *, money: bool
) -> str:
    text = (
        f"{full.later / ours.later:.2f} times fewer bytes a save"
        if ours.later
        else "nothing is written after the first"
    )
    if of_full and money:
        saved = of_full["yearly"] - of_ours["yearly"]
        best = of_full["yearly_at_best"] - of_ours["yearly_at_best"]
        text += f"; {saved:,.0f} a year saved at this interval, {best:,.0f} with each at its best"
    return f"{text}."
