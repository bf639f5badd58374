"""Compiles the native helper, and puts the benchmarks into the package; everything else about it is in pyproject.toml.

In place, for development: `python setup.py build_ext --inplace`.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages("src"), "peerload.bench"],
    package_dir={"": "src", "peerload.bench": "bench"},
    cffi_modules=["src/peerload/native/build.py:builder"],
)
