"""`python -m benchmarks.handoff`."""

from benchmarks.handoff.study import main

if __name__ == "__main__":
    main()
