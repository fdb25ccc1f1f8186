"""A process whose children save and are killed with SIGKILL at their n-th file-system call.

Python announces every open, link, mkdir, rename and unlink to audit hooks before it makes
the system call. A child counts those that concern the run and kills itself at the n-th, so
that every such moment of a save can be tried, one after the other.

Reads lines of JSON ``[n, step]`` and answers each with ``{"killed": bool}``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

_COUNTED = frozenset({"open", "os.link", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"})


def main(run: str, writer: str) -> None:
    """Save two checkpoints, then fork a child for every line of standard input."""
    import torch

    from tests.support.world import load, save
    from tests.test_kill import MODEL, POLICY

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for step in (10, 20):
        save(None, MODEL, step, f"{run}/step-{step}", POLICY, writer=writer)
    print("ready", flush=True)
    for line in sys.stdin:
        n, step = json.loads(line)
        child = os.fork()
        if child == 0:
            load(None, MODEL, f"{run}/step-{10 if step == 20 else 20}")
            _die_at(n, run)
            save(None, MODEL, step, f"{run}/step-{step}", POLICY, writer=writer)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"killed": os.WIFSIGNALED(status), "ok": os.WIFSIGNALED(status) or status == 0}), flush=True)


def _die_at(n: int, run: str) -> None:
    left = n

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in _COUNTED and any(_concerns(a, run) for a in arguments[:2]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _concerns(argument: Any, run: str) -> bool:
    return isinstance(argument, (str, Path)) and str(argument).startswith(run)


if __name__ == "__main__":
    main(*sys.argv[1:])
