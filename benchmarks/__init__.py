"""Benchmarks: each measures us and our peer in one run. See README, *What it costs*."""
