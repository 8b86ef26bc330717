"""`python -m benchmarks.data`."""

from benchmarks.data.study import main

if __name__ == "__main__":
    main()
