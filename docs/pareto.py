"""Draws docs/pareto.png, what each policy writes against what resuming loses, and fills in docs/policies.md's table.

    python docs/pareto.py

Both show what benchmarks/results/resume_quality.json holds, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "resume_quality.json"
FAMILIES = {
    "moments": ("#1b4f72", "o", "moments in turn"),
    "budget": ("#1f7a5c", "s", "budget"),
    "drift": ("#b9770e", "D", "drift"),
    "layers by drift": ("#b9770e", "d", "layers by drift"),
    "first moment": ("#6c3483", "^", "a cadence for each kind"),
    "parity": ("#943126", "P", "parity"),
    "filter": ("#943126", "X", "filter"),
    "random": ("#7f8c8d", "*", "random units"),
    "full, every": ("#17202a", "v", "full saves, less often"),
    "all in bf16": ("#7f8c8d", "v", "full saves in bf16, less often"),
    "full": ("#17202a", "o", "full"),
}
_START, _END = "<!-- table: written by docs/pareto.py -->", "<!-- end of table -->"
_NAMES = ("full", "parity")
NEAR = 0.1  # intervals; the right picture shows what loses less


def main() -> None:
    """Read, draw, and write the table."""
    policies = json.loads(RESULTS.read_text())["policies"]
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure, (whole, near) = plt.subplots(1, 2, figsize=(12, 5.2))
        _draw(whole, policies, bars=False)
        _draw(near, [told for told in policies if told["lost_intervals"] <= NEAR], bars=True)
        whole.set_title("all policies", fontsize=10)
        near.set_title("those that lose least, with 95 % intervals of the mean", fontsize=10)
        _name(near, [told for told in policies if told["lost_intervals"] <= NEAR and told["bytes"] < 0.9])
        near.axhline(0.1, color="#943126", linewidth=0.8, linestyle=":")
        near.axvline(0.3, color="#943126", linewidth=0.8, linestyle=":")
        whole.legend(loc="upper right", frameon=False, fontsize=8)
        figure.tight_layout()
        figure.savefig(Path(__file__).with_name("pareto.png"), dpi=110)
    page = Path(__file__).with_name("policies.md")
    before, start, rest = page.read_text().partition(_START)
    page.write_text(f"{before}{start}\n{_table(policies)}{_END}{rest.partition(_END)[2]}")


def _table(policies: Sequence[dict[str, Any]]) -> str:
    lines = ["| policy | bytes | disk | intervals lost | pre-training: early, middle, late | fine-tuning: the same |"]
    lines.append("|---|---|---|---|---|---|")
    for told in policies:
        spread = f" [{told['low']:+.2f}, {told['high']:+.2f}]" if "low" in told else ""
        regimes = [list(found.values()) for found in told["regimes"].values()]
        points = [", ".join(f"{lost:+.2f}" for lost in found[1:]) or "by arithmetic" for found in regimes]
        cells = [f"`{told['policy']}`" if ":" in told["policy"] or told["policy"] in _NAMES else told["policy"]]
        cells += [f"{told['bytes']:.2f}", f"{told['disk']:.2f}", f"{told['lost_intervals']:+.3f}{spread}", *points]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _draw(axis: Axes, policies: Sequence[dict[str, Any]], bars: bool) -> None:
    shown = set()
    for told in policies:
        color, marker, label = next(look for start, look in FAMILIES.items() if told["policy"].startswith(start))
        x, y = told["bytes"], told["lost_intervals"]
        if bars and "low" in told:
            axis.plot([x, x], [told["low"], told["high"]], color=color, linewidth=1)
        axis.plot(x, y, marker, color=color, label=None if label in shown else label, markersize=6)
        shown.add(label)
    axis.axhline(0, color="#bbbbbb", linewidth=0.8)
    axis.set_xlabel("bytes of a save, as a share of a full one")
    axis.set_ylabel("intervals lost by resuming")
    axis.set_xlim(0.1, 0.68 if bars else 1.05)
    axis.spines[["top", "right"]].set_visible(False)


def _name(axis: Axes, policies: Sequence[dict[str, Any]]) -> None:
    """Write the names above the points, evenly apart, each with a line that leads down to its own."""
    ordered = sorted(policies, key=lambda told: (told["bytes"], told["lost_intervals"]))
    for i, told in enumerate(ordered):
        at, high = 0.13 + 0.42 * i / max(1, len(ordered) - 1), told.get("high", told["lost_intervals"])
        axis.plot([told["bytes"], at], [high, 0.155], color="#bbbbbb", linewidth=0.5)
        axis.text(
            at, 0.157, _short(told["policy"]), rotation=50, fontsize=7, va="bottom", ha="left", rotation_mode="anchor"
        )
    axis.set_ylim(top=0.34)
    axis.set_yticks([-0.1, -0.05, 0, 0.05, 0.1])


def _short(policy: str) -> str:
    short = (
        policy.replace("weights=bf16,moments=bf16", "all bf16").replace("fraction=", "").replace("max_stale", "stale")
    )
    return short.replace("first moment ", "first ").replace("threshold=1e-09,", "")


if __name__ == "__main__":
    main()
