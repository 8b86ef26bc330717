"""The efficiency tables of the Chain-of-Models paper recomputed, one command each: `python -m benchmarks.all`."""
