"""Amounts: sizes, shares and times as people read them, also where a hostile record makes them absurd."""

from __future__ import annotations

import math
from datetime import UTC, datetime

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86400.0


def size(count: float) -> str:
    """Write a number of bytes with three digits and a decimal unit."""
    value, unit = float(count), 0
    while abs(value) >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} {_UNITS[unit]}" if unit == 0 or value >= 99.95 else f"{value:.3g} {_UNITS[unit]}"


def percent(part: float, whole: float) -> str:
    """Write a fraction as a percentage; a dash where there is no whole."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def lasting(seconds: float | None) -> str:
    """Write a length of time in its largest sensible unit; a dash where it is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    for length, name in ((_DAY, "days"), (_HOUR, "h"), (_MINUTE, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {name}"
    return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.0f} s"


def moment(seconds: float) -> str:
    """Write a time since the epoch as a date, UTC."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return "at an impossible time"


def counted(count: int, one: str, several: str | None = None) -> str:
    """Write a number with its noun."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"
