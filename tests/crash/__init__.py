"""Crashes: real operations in real processes that die, or are refused, at any call to the file system."""
