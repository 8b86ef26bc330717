"""Scores of a model: zero-shot classification, retrieval, validation loss."""
