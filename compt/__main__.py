"""`python -m compt` is `compt`."""

from compt.cli.main import run

if __name__ == "__main__":
    run()
