"""The evidence study: what a chain saves on real data, and where it does not. `python -m benchmarks.evidence`."""
