"""Converters between checkpoint formats and tailor_dcp's layout."""
