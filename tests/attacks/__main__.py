"""``python -m tests.attacks``: run the whole gallery, print what became of it, exit with 1 if anything got through."""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from tests.attacks.attack import Attack
from tests.attacks.gallery import GALLERIES
from tests.attacks.runner import Outcome, run


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.attacks", description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write what became of each")
    parser.add_argument("--only", default="", help="attacks whose group or name contains this")
    parser.add_argument("--sample", type=int, help="run so many attacks, some of each module")
    parser.add_argument("--tries", type=int, help="of the entries that take such a file, try so many")
    parser.add_argument("--seed", type=int, default=0, help="which attacks and entries these are")
    parser.add_argument("--list", action="store_true", help="show what each attack tries, and run none")
    asked = parser.parse_args()
    chosen = [
        (gallery.group, attack)
        for gallery in GALLERIES
        for attack in gallery.attacks
        if asked.only in f"{gallery.group}: {attack.name}"
    ]
    if not chosen:
        parser.error(f"no attack's group and name contain {asked.only!r}; --list shows them all")
    chosen = _sample(chosen, asked.sample, asked.seed) if asked.sample else chosen
    if asked.list:
        for group, attack in chosen:
            print(f"{group}: {attack.name}: {attack.tries}")
        return
    start, outcomes = time.monotonic(), []
    for outcome in run(chosen, asked.tries, asked.seed):
        outcomes.append(outcome)
        for entry, said in outcome.faults.items():
            print(f"{outcome.group}: {outcome.name}: {entry}: {said}", flush=True)
    _show(outcomes, time.monotonic() - start)
    if asked.json:
        asked.json.write_text(json.dumps(_told(outcomes, time.monotonic() - start), indent=1) + "\n")
    sys.exit(any(outcome.faults for outcome in outcomes))


def _sample(attacks: list[tuple[str, Attack]], count: int, seed: int) -> list[tuple[str, Attack]]:
    """Return attacks drawn from all modules in proportion, at least one of each."""
    chance = random.Random(seed)
    first = {group: chance.choice([one for one in attacks if one[0] == group]) for group, _ in attacks}
    rest = [one for one in attacks if one not in first.values()]
    drawn = [*first.values(), *chance.sample(rest, max(0, min(count - len(first), len(rest))))]
    return sorted(drawn, key=attacks.index)


def _counts(outcomes: list[Outcome]) -> Counter[str]:
    return Counter(said.partition(":")[0] for outcome in outcomes for said in outcome.entries.values())


def _show(outcomes: list[Outcome], seconds: float) -> None:
    print(f"{'group':<16}{'attacks':>8}{'tries':>8}{'refused':>9}{'harmless':>10}{'FAULTS':>8}{'peak MB':>9}{'s':>7}")
    for group in [*dict.fromkeys(outcome.group for outcome in outcomes), "all"]:
        of_group = [outcome for outcome in outcomes if group in ("all", outcome.group)]
        counts = _counts(of_group)
        peak, took = max(o.peak for o in of_group) / 1e6, sum(o.seconds for o in of_group)
        print(
            f"{group:<16}{len(of_group):>8}{sum(counts.values()):>8}{counts['refused']:>9}{counts['harmless']:>10}"
            f"{counts['FAULT']:>8}{peak:>9.0f}{took:>7.1f}"
        )
    print(f"{len(outcomes)} attacks in {seconds:.1f} s")


def _told(outcomes: list[Outcome], seconds: float) -> dict[str, object]:
    counts = _counts(outcomes)
    return {
        "attacks": len(outcomes),
        "tries": sum(counts.values()),
        "refused": counts["refused"],
        "harmless": counts["harmless"],
        "faults": counts["FAULT"],
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "outcomes": [_of(outcome) for outcome in outcomes],
    }


def _of(outcome: Outcome) -> dict[str, object]:
    counts = _counts([outcome])
    return {
        "group": outcome.group,
        "name": outcome.name,
        "refused": counts["refused"],
        "harmless": counts["harmless"],
        "faults": outcome.faults,
        "seconds": round(outcome.seconds, 1),
        "peak_mb": round(outcome.peak / 1e6),
    }


if __name__ == "__main__":
    main()
