"""The demo's folder, and what lies in the checkpoints' folders."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from demo.errors import DemoError

METADATA = ".metadata"
"""The file that commits a checkpoint: DCP writes it last."""

_MARKER = ".made-by-the-tailor-dcp-demo"


@dataclass(frozen=True)
class Places:
    """Where the demo keeps what."""

    root: Path

    @property
    def uninterrupted(self) -> Path:
        """The run that nobody disturbs."""
        return self.root / "uninterrupted"

    @property
    def killed(self) -> Path:
        """The run that is killed and resumed."""
        return self.root / "killed"

    @property
    def logs(self) -> Path:
        """What the trainers print."""
        return self.root / "logs"


def prepare(root: Path) -> Places:
    """Make the demo's folder, without what an earlier demo left in it.

    Raises:
        DemoError: the folder holds something that no demo has put there.
    """
    places = Places(root)
    if root.exists() and not (root / _MARKER).exists() and (not root.is_dir() or any(root.iterdir())):
        raise DemoError(f"{root} was not made by this demo, so it is left alone; choose another folder with --run.")
    root.mkdir(parents=True, exist_ok=True)
    (root / _MARKER).touch()
    # Only what a demo makes: its user may have put something else beside it since.
    for folder in (places.uninterrupted, places.killed, places.logs):
        shutil.rmtree(folder, ignore_errors=True)
    places.logs.mkdir()
    return places


def checkpoint(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run / f"step-{step}"


def is_committed(folder: Path) -> bool:
    """Tell whether a checkpoint is complete."""
    return (folder / METADATA).exists()


def is_committing(folder: Path) -> bool:
    """Tell whether all that is left to do for a checkpoint is to rename this file."""
    return (folder / f"{METADATA}.tmp").exists()


def committed_steps(run: Path) -> list[int]:
    """Return the steps whose checkpoints are complete, found here without asking the library."""
    return sorted(int(path.parent.name.removeprefix("step-")) for path in run.glob(f"step-*/{METADATA}"))


def own_data(folder: Path) -> list[int]:
    """Return the sizes of the data files that a save has put into its folder so far."""
    return [path.stat().st_size for path in folder.glob("*.distcp")]


def disk_use(run: Path) -> int:
    """Return the bytes of a run's files; a file with several links is there once."""
    stats = [path.stat() for path in run.rglob("*") if path.is_file()]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())
