"""Weights on disk, read one tensor at a time: compt's own format and those of others."""
