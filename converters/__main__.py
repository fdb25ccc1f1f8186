"""``python -m tailor_dcp.converters``, for torchrun."""

from .cli import main

main()
