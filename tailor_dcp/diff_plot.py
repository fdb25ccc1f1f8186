"""The picture of a diff: each layer's relative change, one line a kind."""

from __future__ import annotations

from pathlib import Path

from tailor_dcp.diff import Diff
from tailor_dcp.errors import TailorError

_FORMATS = ("png", "svg", "pdf")
_MARKS = "osD^vP*X"


def draw(found: Diff, path: Path) -> None:
    """Draw the relative change of all units.

    Args:
        found: what ``diff`` found.
        path: the picture, of the format that its name ends with: png, svg or pdf.

    Raises:
        TailorError: matplotlib is missing, the format is another one, or the file cannot be written.
    """
    if path.suffix.lower().lstrip(".") not in _FORMATS:
        raise TailorError(f"{path} names no format that can be drawn; end it with .{', .'.join(_FORMATS)}.")
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise TailorError(f"{path} needs matplotlib: pip install 'tailor-dcp[plot]'.") from error
    layers = list(dict.fromkeys(unit.layer for unit in found.units))
    kinds = list(dict.fromkeys(unit.kind for unit in found.units))
    figure = Figure(figsize=(max(6.0, 2 + 0.28 * len(layers)), 4.5), layout="constrained")
    axes = figure.subplots()
    for number, kind in enumerate(kinds):
        moved = {unit.layer: unit.relative for unit in found.units if unit.kind == kind and unit.relative}
        places = [layers.index(layer) for layer in moved]
        axes.plot(places, list(moved.values()), _MARKS[number % len(_MARKS)] + "-", label=kind, markersize=4)
    axes.set_yscale("log")
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    axes.set_ylabel("relative change ‖b - a‖ / ‖a‖")
    axes.set_title(f"{Path(found.a).name} → {Path(found.b).name}; what did not change has no mark", fontsize=10)
    axes.grid(True, axis="y", alpha=0.3)
    if any(unit.relative for unit in found.units):
        axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise TailorError(f"{path} cannot be written: {error.strerror}.") from error
