"""The full grid of ZeRO cases, by ``make test-zero-grid``; the last result is kept in ``zero_grid.json``."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from tests.support.zero_cases import DTYPES, GROUPS, STAGES, WORLDS, case, check_case, name_of
from tests.support.zero_engines import close_fleets
from tests.support.zero_nets import FAMILIES

RESULT = Path(__file__).with_suffix(".json")


def main() -> int:
    """Run all cases, one world size after the other, so that only one fleet is alive at a time."""
    failed: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for world in WORLDS:
        for stage, dtype, groups, family in product(STAGES, DTYPES, GROUPS, FAMILIES):
            setup = case(stage, world, dtype, groups, family)
            start = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                try:
                    check_case(setup, Path(folder))
                except Exception as error:  # the others are of interest, too
                    failed[name_of(setup)] = f"{type(error).__name__}: {str(error)[-400:]}"
            seconds[name_of(setup)] = round(time.monotonic() - start, 2)
            print(name_of(setup), seconds[name_of(setup)], failed.get(name_of(setup), "ok"), flush=True)
        close_fleets()
    RESULT.write_text(json.dumps(_result(seconds, failed), indent=1) + "\n", encoding="utf-8")
    print(f"{len(seconds) - len(failed)} of {len(seconds)} cases hold; {RESULT} says so")
    return 1 if failed else 0


def _result(seconds: dict[str, float], failed: dict[str, str]) -> dict[str, Any]:
    return {
        "versions": {name: version(name) for name in ("deepspeed", "torch", "transformers")},
        "date": time.strftime("%Y-%m-%d"),
        "cases": len(seconds),
        "held": len(seconds) - len(failed),
        "failed": failed,
        "seconds": seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
