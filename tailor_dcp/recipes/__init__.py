"""Recipes: what a merge is told, in our own words, in mergekit's and in LLMTailor's."""
