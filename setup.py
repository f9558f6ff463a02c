"""Builds what pyproject.toml cannot say: two C extensions (limited API) and the static in-guest agent."""

import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
C_FLAGS = ["-std=c11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE"]


class BuildNative(build_ext):
    """Also builds sandloom-agent, PID 1 of each guest, sandloom-monitor, which each OCI sandbox has beside it, and
    sandloom-nopunch, which restored guests are started by."""

    def run(self) -> None:
        super().run()
        subprocess.run(["make", "-s", "-C", str(ROOT / "guestagent" / "src")], check=True)
        subprocess.run(["make", "-s", "-C", str(ROOT / "hostd" / "drivers" / "oci" / "src")], check=True)
        subprocess.run(["make", "-s", "-C", str(ROOT / "hostd" / "drivers" / "qemu" / "src")], check=True)


def files(*patterns: str) -> list[str]:
    """Files of native/ by pattern, from the root, in a stable order."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "native").glob(pattern))


def extension(name: str) -> Extension:
    """`native._NAME` for the stable ABI of Python 3.11: thin binding native/NAME*.c, pure core native/src/NAME*.c."""
    return Extension(
        f"native._{name}",
        sources=files(f"{name}*.c", f"src/{name}*.c"),
        depends=files("*.h", "src/*.h"),
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
