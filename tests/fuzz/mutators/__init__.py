"""Changing inputs as their formats have it: what flipping bytes alone would take for ever to reach."""
