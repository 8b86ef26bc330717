"""`python -m benchmarks.peers`."""

from benchmarks.peers.study import main

if __name__ == "__main__":
    main()
