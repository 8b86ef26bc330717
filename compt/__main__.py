"""`python -m compt` is `compt`."""

from compt.cli import main

if __name__ == "__main__":
    main()
