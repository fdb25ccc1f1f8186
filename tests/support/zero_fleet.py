"""A fleet whose calls end: DeepSpeed's collectives wait for ever for a rank that has failed."""

from __future__ import annotations

import os
import pickle
import time
from multiprocessing.connection import wait
from typing import Any

from tests.support.fleet import Fleet, RemoteError

_LONGEST = 150  # seconds that a call may take; the first one builds DeepSpeed's operators
_GRACE = 5  # seconds that the other ranks have once one has failed


class ZeroFleet(Fleet):
    """Workers with DeepSpeed, which takes the world for its group: calls are always for all of them."""

    def __init__(self, size: int) -> None:
        before = os.environ.get("DS_ACCELERATOR")
        os.environ["DS_ACCELERATOR"] = "cpu"
        try:
            super().__init__(size)
        finally:
            os.environ.pop("DS_ACCELERATOR")
            os.environ.update({"DS_ACCELERATOR": before} if before else {})
        self.alive = True

    def call(self, function: str, *args: Any, ranks: int | None = None, **kwargs: Any) -> list[Any]:
        """Call on all workers; if one fails and others hang for it, all of them are given up."""
        assert ranks in (None, self.size), "DeepSpeed works with the world alone"
        for worker in self._workers:
            worker.send_bytes(pickle.dumps((function, self.size, args, kwargs)))
        replies: dict[int, Any] = {}
        end = time.monotonic() + _LONGEST
        while len(replies) < self.size:
            waiting = [w for rank, w in enumerate(self._workers) if rank not in replies]
            ready = wait(waiting, max(0.0, end - time.monotonic()))
            if not ready:
                self.close()
                self.alive = False
                break
            for worker in ready:
                reply = replies[self._workers.index(worker)] = pickle.loads(worker.recv_bytes())
                end = min(end, time.monotonic() + _GRACE) if reply[0] else end
        failures = [value for failed, value in replies.values() if failed]
        if failures or len(replies) < self.size:
            raise RemoteError(failures[0] if failures else f"{function} did not end in {_LONGEST} seconds")
        return [replies[rank][1] for rank in range(self.size)]
