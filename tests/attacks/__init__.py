"""Attacks: hostile files of every kind that the product reads, and what becomes of each.

``python -m tests.attacks`` runs them all; ``--list`` shows what each tries.
"""
