"""The scripts that `pip install .` installs: all of them, so that a new one needs no line here."""

from glob import glob

from setuptools import setup

setup(py_modules=[file.removesuffix(".py") for file in glob("*.py") if file != "setup.py"])
