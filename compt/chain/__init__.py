"""A chain of models, run job by job, with its state on disk."""
