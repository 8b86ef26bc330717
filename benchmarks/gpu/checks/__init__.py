"""Checks of correctness on a GPU."""
