"""What holds for every engine, measured: `python -m benchmarks.engines.matrix`, `….mutations`, `….memory`."""
