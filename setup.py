"""Entry point for tools that still call setup.py. All settings are in pyproject.toml."""

from setuptools import setup

setup()
