"""Builds what pyproject.toml cannot say: two C extensions (limited API) and the static in-guest agent."""

import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
C_FLAGS = ["-std=c11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE"]


class BuildNative(build_ext):
    """Also builds guestagent/_build/sandloom-agent, the program that is PID 1 in each guest."""

    def run(self) -> None:
        super().run()
        subprocess.run(["make", "-s", "-C", str(ROOT / "guestagent" / "src")], check=True)


def extension(name: str) -> Extension:
    """`native._NAME` from its thin binding and its pure core, against the stable ABI of Python 3.11."""
    return Extension(
        f"native._{name}",
        sources=[f"native/{name}module.c", f"native/src/{name}.c"],
        depends=[f"native/src/{name}.h"],
        include_dirs=["native/src"],
        define_macros=[("Py_LIMITED_API", "0x030B0000")],
        py_limited_api=True,
        extra_compile_args=C_FLAGS,
    )


setup(
    ext_modules=[extension("balloon"), extension("dax")],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
