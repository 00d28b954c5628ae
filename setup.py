"""Shim for tools that still call setup.py; everything is declared in pyproject.toml."""

from setuptools import setup

# The explicit script name keeps this file itself out of the wheel: the package root is this folder.
setup(script_name="setup.py")
