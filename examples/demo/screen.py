"""What the demo shows while it runs: one progress bar, and a line for each event above it."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from demo.kills import Kill

_WIDTH = 100


class Screen:
    """The terminal, or whatever stands for it.

    Args:
        total: how much work there is: steps to train and checkpoints to load.
        phases: in how many parts it is done.
    """

    def __init__(self, total: int, phases: int = 3) -> None:
        self._phases = phases
        plain = Console(highlight=False)
        # Wide enough for the tables where nobody looks at it live.
        self.console = plain if plain.is_terminal else Console(highlight=False, width=_WIDTH)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("[dim]{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._bar = self._progress.add_task("", total=total, detail="")
        self._before = 0  # work done in earlier phases

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def phase(self, number: int, name: str, told: str) -> None:
        """Begin a phase, with the name that the bar shows and a line that says what happens in it."""
        self._before = int(self._progress.tasks[0].completed)
        self._progress.update(self._bar, description=f"{number}/{self._phases} {name}", detail="")
        self.console.print(f"\n[bold]{number}[/]  {told}")

    def advance(self, done: int, detail: str) -> None:
        """Show how far the phase is; work that is done again after a kill does not move the bar back."""
        furthest = max(self._before + done, int(self._progress.tasks[0].completed))
        self._progress.update(self._bar, completed=furthest, detail=detail)

    def say(self, text: str) -> None:
        """Print a line below the phase's own."""
        self.console.print(f"   {text}")

    def killed(self, kill: Kill) -> None:
        """Tell of a kill, and what was found after it."""
        if kill.committed:
            self.say(f"[yellow]•[/] the kill in step-{kill.step} came too late, it is complete; again at the next save")
        else:
            metadata = "no .metadata but its .tmp" if kill.committing else "no .metadata"
            self.say(f"[red]✗[/] killed in step-{kill.step}, {kill.moment.words}: {data_left(kill)}, {metadata}")

    def resumed(self, step: int) -> None:
        """Tell of a resume."""
        self.say(f"[green]↻[/] started again: it goes on from step-{step}, the newest complete checkpoint")

    def failed(self, message: str) -> None:
        """Tell of a failure."""
        self.console.print(f"\n[bold red]{escape(message)}[/]")


def data_left(kill: Kill) -> str:
    """Say what a killed save had written of its data."""
    if not kill.data_files:
        return "no data"
    return f"{kill.data_files} data file{'' if kill.data_files == 1 else 's'}, {size(kill.data_bytes)}"


def size(count: int) -> str:
    """Write a number of bytes in megabytes, a small one in kilobytes."""
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.0f} kB"
