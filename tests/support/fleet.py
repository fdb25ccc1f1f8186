"""A fleet: real processes with gloo between them that stay alive from test to test.

Starting torch takes seconds a process, and a property needs hundreds of saves by several
ranks. So the processes are started once and told what to call. ``stock=True`` makes
importing tailor_dcp fail in them: what they load, anybody's torch loads.
"""

from __future__ import annotations

import os
import pickle  # plain: torch's own way of sending tensors needs a shared secret
import shutil
import subprocess
import sys
import tempfile
import traceback
from importlib import import_module
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]


class RemoteError(AssertionError):
    """What a worker raised, with its traceback."""


class Fleet:
    """``size`` worker processes. ``call`` runs one function on the first ``ranks`` of them, together."""

    def __init__(self, size: int, stock: bool = False) -> None:
        self.size = size
        # A socket and a store with names of their own: ports would be raced for by tests that run side by side.
        self._folder = tempfile.mkdtemp(prefix="fleet")
        listener = Listener(f"{self._folder}/socket", "AF_UNIX")
        environment = {
            **os.environ,
            "WORLD_SIZE": str(size),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(_ROOT),
            "FLEET_STOCK": "1" if stock else "",
        }
        command = [sys.executable, "-m", "tests.support.fleet", self._folder]
        self._processes = [
            subprocess.Popen(command, env={**environment, "RANK": str(rank)}, cwd=_ROOT) for rank in range(size)
        ]
        # A worker that dies at its start would be waited for for ever.
        listener._listener._socket.settimeout(180)  # type: ignore[attr-defined]
        self._workers: list[Connection] = [None] * size  # type: ignore[list-item]
        for _ in range(size):
            connection = listener.accept()
            self._workers[connection.recv()] = connection
        listener.close()

    def call(self, function: str, *args: Any, ranks: int | None = None, **kwargs: Any) -> list[Any]:
        """Call ``module:function(group, *args)`` on the first ``ranks`` workers and return their results."""
        ranks = self.size if ranks is None else ranks
        for worker in self._workers[:ranks]:
            worker.send_bytes(pickle.dumps((function, ranks, args, kwargs)))
        replies = [pickle.loads(worker.recv_bytes()) for worker in self._workers[:ranks]]
        failures = [text for failed, text in replies if failed]
        if failures:
            raise RemoteError(failures[0])
        return [value for _, value in replies]

    def lose(self, victim: int, function: str, *args: Any, ranks: int, **kwargs: Any) -> bool:
        """Call on the first ``ranks`` workers, of which one may die; tell whether it did.

        The others may then wait for it for ever: all that is left to do with them is to close them.
        """
        for worker in self._workers[:ranks]:
            worker.send_bytes(pickle.dumps((function, ranks, args, kwargs)))
        try:
            self._workers[victim].recv_bytes()
        except (EOFError, ConnectionError):
            return True
        for rank, worker in enumerate(self._workers[:ranks]):
            if rank != victim:
                worker.recv_bytes()
        return False

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
        shutil.rmtree(self._folder, ignore_errors=True)


def _work(folder: str) -> None:
    import warnings

    import torch
    import torch.distributed as dist

    if os.environ["FLEET_STOCK"]:
        sys.modules["tailor_dcp"] = None  # type: ignore[assignment]  # any import of it now fails
    warnings.filterwarnings("ignore", module="torch")
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    # A group for each world size that a test may ask for; all ranks must take part in making them.
    groups = {n: dist.new_group(list(range(n))) for n in range(1, size + 1)}
    connection = Client(f"{folder}/socket", "AF_UNIX")
    connection.send(rank)
    while True:
        try:
            function, ranks, args, kwargs = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):
            return
        try:
            module, name = function.split(":")
            result = getattr(import_module(module), name)(groups[ranks], *args, **kwargs)
            connection.send_bytes(pickle.dumps((False, result)))
        except BaseException:  # CheckpointException is no Exception
            connection.send_bytes(pickle.dumps((True, traceback.format_exc())))


if __name__ == "__main__":
    _work(sys.argv[1])
