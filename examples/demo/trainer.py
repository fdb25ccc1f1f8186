"""Running the training script on two ranks with torchrun, and hearing what it prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from demo.errors import DemoError

_EXAMPLES = Path(__file__).parents[1]
_SILENCE = 300  # seconds; a step takes half a second, and starting ten
_GRACE = 10  # seconds that torchrun has to end its ranks


def quiet_environment() -> dict[str, str]:
    """Return an environment in which two ranks share two cores, and torch keeps its hints to itself."""
    # More threads a rank would only get in each other's way.
    quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "TYPER_STANDARD_TRACEBACK": "1"}
    return {**os.environ, **quiet}


class Trainer:
    """A training script under torchrun, from its start to its end.

    Args:
        script: its name among the examples.
        run: the folder of its checkpoints.
        log: where everything that it prints goes.
        ranks: how many processes train.
        options: further options of the script.

    Attributes:
        log: as given.
        losses: the loss of each step that it has trained so far.
        resumed_from: the step that it said it goes on from, None until it has.
    """

    def __init__(self, script: str, run: Path, log: Path, ranks: int = 2, **options: object) -> None:
        self.log = log
        self.losses: dict[int, float] = {}
        self.resumed_from: int | None = None
        self._ranks: dict[int, int] = {}
        self._heard = time.monotonic()
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                _command(script, ranks, run, log.parent, options),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=quiet_environment(),
                start_new_session=True,
            )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def step(self) -> int:
        """The last step that it has trained."""
        return max(self.losses, default=self.resumed_from or 0)

    def running(self) -> bool:
        """Tell whether a process of it is alive.

        Raises:
            DemoError: nothing was heard of it for minutes.
        """
        if time.monotonic() - self._heard > _SILENCE:
            raise DemoError(f"The trainer has said nothing for {_SILENCE} seconds.", self.log)
        return self._listener.is_alive()

    def kill(self) -> None:
        """Send SIGKILL to both ranks and to torchrun, and wait until nothing of them is left."""
        # torchrun gives each rank a process group of its own. The first rank commits, so it goes first.
        for _, pid in sorted(self._ranks.items()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._listener.join()
        self._process.wait()

    def stop(self) -> None:
        """End it in good order, and if that takes too long by force."""
        if self._process.poll() is None:
            self._process.terminate()  # torchrun passes it on, also to ranks that we do not know yet
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE)
        self.kill()

    def _listen(self) -> None:
        # Both ranks have inherited the pipe: it ends when the last process is gone, whoever its parent is.
        assert self._process.stdout is not None
        with self.log.with_suffix(".jsonl").open("w") as record:
            for line in self._process.stdout:
                record.write(line)
                self._heard = time.monotonic()
                with suppress(ValueError):
                    self._note(json.loads(line))

    def _note(self, said: dict[str, float]) -> None:
        if "pid" in said:
            self._ranks[int(said["rank"])] = int(said["pid"])
            self.resumed_from = int(said["resumed_from"])
        elif "loss" in said:
            self.losses[int(said["step"])] = said["loss"]


def _command(script: str, ranks: int, run: Path, logs: Path, options: dict[str, object]) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    # Killed, it could not remove the folder that it makes among the system's temporary files.
    launcher += ["--log-dir", str(logs / "torchrun")]
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [*launcher, str(_EXAMPLES / script), str(run), *given]


def stock_losses(checkpoints: list[Path], log: Path) -> subprocess.Popen[str]:
    """Start loading checkpoints in a process that has torch alone; it prints a line of JSON for each."""
    with log.open("w") as errors:
        return subprocess.Popen(
            [sys.executable, str(_EXAMPLES / "stock_load.py"), *map(str, checkpoints)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**quiet_environment(), "OMP_NUM_THREADS": "2"},
        )
