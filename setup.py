"""Compiles the native helper; everything else about the package is in pyproject.toml.

In place, for development: `python setup.py build_ext --inplace`.
"""

from setuptools import setup

setup(cffi_modules=["src/peerload/native/build.py:builder"])
