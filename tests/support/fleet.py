"""A fleet: real processes with gloo between them that stay alive from test to test.

Starting torch takes seconds a process, and a property needs hundreds of saves by several
ranks. So the processes are started once and told what to call. ``stock=True`` makes
importing tailor_dcp fail in them: what they load, anybody's torch loads.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from importlib import import_module
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

_KEY = b"fleet"
_ROOT = Path(__file__).parents[2]


class RemoteError(AssertionError):
    """What a worker raised, with its traceback."""


class Fleet:
    """``size`` worker processes. ``call`` runs one function on the first ``ranks`` of them, together."""

    def __init__(self, size: int, stock: bool = False) -> None:
        self.size = size
        listener = Listener(("127.0.0.1", 0), authkey=_KEY)
        environment = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(size),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(_ROOT),
            "FLEET_STOCK": "1" if stock else "",
        }
        command = [sys.executable, "-m", "tests.support.fleet", str(listener.address[1])]
        self._processes = [
            subprocess.Popen(command, env={**environment, "RANK": str(rank)}, cwd=_ROOT)
            for rank in range(size)
        ]
        self._workers: list[Connection] = [None] * size  # type: ignore[list-item]
        for _ in range(size):
            connection = listener.accept()
            self._workers[connection.recv()] = connection
        listener.close()

    def call(self, function: str, *args: Any, ranks: int | None = None, **kwargs: Any) -> list[Any]:
        """Call ``module:function(group, *args)`` on the first ``ranks`` workers and return their results."""
        ranks = self.size if ranks is None else ranks
        for worker in self._workers[:ranks]:
            worker.send((function, ranks, args, kwargs))
        replies = [worker.recv() for worker in self._workers[:ranks]]
        failures = [text for failed, text in replies if failed]
        if failures:
            raise RemoteError(failures[0])
        return [value for _, value in replies]

    def one(self, function: str, *args: Any, **kwargs: Any) -> Any:
        """Call on a single worker and return its result."""
        return self.call(function, *args, ranks=1, **kwargs)[0]

    def close(self) -> None:
        """Stop the workers."""
        for worker in self._workers:
            worker.close()
        for process in self._processes:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work(port: int) -> None:
    import warnings

    import torch
    import torch.distributed as dist

    if os.environ["FLEET_STOCK"]:
        sys.modules["tailor_dcp"] = None  # type: ignore[assignment]  # any import of it now fails
    warnings.filterwarnings("ignore", module="torch")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    # A group for each world size that a test may ask for; all ranks must take part in making them.
    groups = {n: dist.new_group(list(range(n))) for n in range(1, dist.get_world_size() + 1)}
    connection = Client(("127.0.0.1", port), authkey=_KEY)
    connection.send(dist.get_rank())
    while True:
        try:
            function, ranks, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            module, name = function.split(":")
            result = getattr(import_module(module), name)(groups[ranks], *args, **kwargs)
            connection.send((False, result))
        except BaseException:  # CheckpointException is no Exception
            connection.send((True, traceback.format_exc()))


if __name__ == "__main__":
    _work(int(sys.argv[1]))
