"""The report's file: it appears whole or not at all, and in the place of nothing that is no report."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from tailor_dcp.errors import TailorError

START = "<!doctype html>"


class NoPlaceError(TailorError):
    """A report cannot be written where it is asked for."""


def check_target(out: Path) -> None:
    """Refuse what must not be written over, before any work is done.

    Raises:
        NoPlaceError: ``out`` is a folder, a file that is no page, or in a folder that does not exist.
    """
    if out.is_dir():
        raise NoPlaceError(f"{out} is a folder; name a file, such as {out / 'report.html'}.")
    if not out.parent.is_dir():
        raise NoPlaceError(f"{out} cannot be written: the folder {out.parent} does not exist; make it first.")
    if not out.exists():
        return
    try:
        with out.open("rb") as file:
            start = file.read(len(START)).decode("ascii", "replace")
    except OSError as error:
        raise NoPlaceError(f"{out} exists and cannot be read: {error.strerror}; name another file.") from error
    if start and start.lower() != START:
        raise NoPlaceError(f"{out} exists and is no report; name another file, or remove it.")


def write_page(text: str, out: Path) -> None:
    """Write a page under another name, and give it its own at the end.

    Raises:
        NoPlaceError: it cannot be written, or something that is no page has taken its place since.
    """
    check_target(out)
    partial = out.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with partial.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
    except OSError as error:
        raise NoPlaceError(f"{out} cannot be written: {error.strerror}.") from error
    finally:
        with suppress(OSError):
            partial.unlink()
