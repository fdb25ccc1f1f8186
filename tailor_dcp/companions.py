"""Companions: configuration, tokenizer and the like, which belong to a model and which training never touches.

In a DCP checkpoint they lie in the folder ``hf`` beside the data, as they are, so that
``AutoTokenizer.from_pretrained("run/step-0/hf")`` works there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from tailor_dcp.carry import make_folder, sync_file, sync_folder
from tailor_dcp.errors import TailorError
from tailor_dcp.stores import is_remote

FOLDER = "hf"


def put_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files into the folder for them inside of a checkpoint that is being written."""
    give_files(files, folder / FOLDER)


def give_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files to where they belong in a folder that is being written, where they are not already.

    Raises:
        TailorError: a name leads out of the folder, or a file cannot be copied.
    """
    for name, source in files.items():
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise TailorError(f"{source} would be written outside of {folder}; rename it.")
        target = folder / relative
        if target.exists():
            continue
        try:
            if is_remote(target):
                target.write_bytes(source.read_bytes())
                continue
            make_folder(target.parent)
            if is_remote(source):
                target.write_bytes(source.read_bytes())
            else:
                shutil.copyfile(source, target)
            sync_file(target)
            sync_folder(target.parent)
        except OSError as error:
            raise TailorError(f"{source} cannot be carried along: {error.strerror}.") from error


def files_of(checkpoint: Path) -> dict[str, Path]:
    """Return the files that a checkpoint carries along, by name; links are not followed out of it."""
    folder = checkpoint / FOLDER
    if folder.is_symlink() or not folder.is_dir():
        return {}
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }
