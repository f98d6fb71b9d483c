"""The native kernels of the CPU. pyproject.toml holds everything else.

The C++ sources are built once for each set of instructions, and the package picks a library when it
runs. The libraries use nothing of Python or torch, so one wheel serves every Python. They are
optional: where they cannot be built, the package installs without them and runs in plain torch.
"""

import copy
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("tritoncaps", "_native")
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]
# Lanes of float32 in a vector, and the instructions that have such vectors.
VARIANTS: dict[str, tuple[int, list[str]]] = {"portable": (4, [])}
if platform.machine().lower() in ("x86_64", "amd64"):
    VARIANTS["avx2"] = (8, ["-march=x86-64-v3"])
    VARIANTS["avx512"] = (16, ["-march=x86-64-v4"])
if os.name == "nt":
    VARIANTS = {}  # MSVC has no vector extensions.


def extension(variant: str) -> Extension:
    """Describe the library of a variant."""
    lanes, instructions = VARIANTS[variant]
    return Extension(
        f"tritoncaps._native._{variant}",
        sources=sorted(map(str, NATIVE.glob("*.cpp"))),
        depends=["setup.py", *sorted(map(str, NATIVE.glob("*.h")))],
        extra_compile_args=[*FLAGS, f"-DLANES={lanes}", *instructions],
        language="c++",
        optional=True,
    )


def has_gnu_openmp(compiler: list[str]) -> bool:
    """Whether a compiler's OpenMP is that of torch. Clang's calls a library of its own."""
    command = [*compiler, "-fopenmp", "-dM", "-E", "-x", "c++", os.devnull]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # There is no compiler.
        return False
    return "_OPENMP" in found.stdout and "__clang__" not in found.stdout


class BuildLibraries(build_ext):
    """Build plain libraries, all at once."""

    def initialize_options(self) -> None:
        """All variants are compiled at the same time."""
        super().initialize_options()
        self.parallel = True

    def build_extensions(self) -> None:
        """OpenMP is compiled in, but not linked: torch has loaded the one that both use."""
        if self.extensions and has_gnu_openmp(self.compiler.compiler_so_cxx):
            for each in self.extensions:
                each.extra_compile_args.append("-fopenmp")
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """Give each variant a folder for its objects, since all have the same sources."""
        own = copy.copy(self)
        own.build_temp = os.path.join(self.build_temp, ext.name)
        super(BuildLibraries, own).build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        """Leave out the Python of an extension module."""
        return os.path.join(*fullname.split(".")) + ".so"


class WheelOfAnyPython(bdist_wheel):
    """A wheel for one platform and every Python."""

    def get_tag(self) -> tuple[Any, ...]:
        """Keep only the platform of the usual tag."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[extension(variant) for variant in VARIANTS],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": WheelOfAnyPython},
)
