"""Correctness and speed of a GPU machine."""
