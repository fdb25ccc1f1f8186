"""What can go wrong, each as one sentence that names the file, the layer and the way out."""

from __future__ import annotations


class TailorError(Exception):
    """Base of every error this package raises on purpose.

    ``exit_code`` is what a command line tool ends with: 1 when the thing that was
    checked is bad, 2 for wrong usage or unreadable input.
    """

    exit_code = 2


class PolicyError(TailorError, ValueError):
    """A policy, or the string it is written as, does not make sense."""


class BaseError(TailorError):
    """An explicit ``base=`` cannot be carried from."""


class UnreadableMetadataError(TailorError):
    """A ``.metadata`` file is damaged, hostile, or not a DCP checkpoint's."""


class NewerFormatError(UnreadableMetadataError):
    """A checkpoint was saved by a later version, whose record this one cannot read; it need not be damaged."""


class SaveRefusedError(TailorError):
    """This way of saving would write a wrong selection, so it is refused before a byte is written."""


class ConflictingStateError(TailorError, ValueError):
    """Ranks disagree about a tensor, or the state does not cover it."""


class LoadError(TailorError):
    """A checkpoint does not hold what is asked of it, or not in a form that can be loaded; nothing was overwritten."""


class NoCheckpointError(TailorError, FileNotFoundError):
    """No committed checkpoint was found where one was asked for."""


class TailorWarning(UserWarning):
    """Training goes on, but something was written that could have been carried, or the like."""


class ConversionError(TailorError):
    """The source cannot be converted as asked; nothing was written."""


class DamagedSourceError(ConversionError):
    """A file of the source is missing, cut off, or contradicts another; nothing was written."""
