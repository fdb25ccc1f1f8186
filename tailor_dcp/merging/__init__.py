"""Merging: putting a checkpoint together from others, by remapping or by computing."""
