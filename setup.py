# SPDX-License-Identifier: MIT
"""The compiled parts; everything else about the package is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

INCLUDE = "kucomms/include"

setup(
    cffi_modules=["kucomms/_core/build_setup.py:ffi"],
    ext_modules=[
        Extension(
            "kucomms._core._ring",
            sources=["kucomms/_core/_ring.c"],
            include_dirs=[INCLUDE],
            depends=[str(path) for path in sorted(Path(INCLUDE).rglob("*.h"))],
            extra_compile_args=["-std=gnu11", "-Wall", "-Wextra"],
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
