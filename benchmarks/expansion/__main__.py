"""`python -m benchmarks.expansion`."""

from benchmarks.expansion.study import main

if __name__ == "__main__":
    main()
