# SPDX-License-Identifier: Apache-2.0
"""Builds the native libraries with CMake and ninja; all other metadata is in pyproject.toml.

PEFTKERN_BUILD=auto|none|cpu|cuda|all chooses the libraries (auto: the CPU library where the tools for it are there).
MAX_JOBS, CMAKE_ARGS and CXX keep their usual meaning. The libraries have a C ABI and know neither torch nor Python,
so one wheel serves every version of both.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "none", "cpu", "cuda", "all")


def missing_tools() -> list[str]:
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    missing = [] if any(shutil.which(shlex.split(c)[0]) for c in compilers) else ["a C++ compiler"]
    return missing + [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]


def libraries() -> list[str]:
    """Names of the libraries to build."""
    choice = os.environ.get("PEFTKERN_BUILD", "auto")
    if choice not in CHOICES:
        raise SystemExit(f"PEFTKERN_BUILD: expected one of {', '.join(CHOICES)}, got {choice!r}")
    if choice in ("cuda", "all"):
        raise SystemExit(f"PEFTKERN_BUILD={choice}: CUDA kernels are not part of this version; use 'cpu'")
    if choice == "none":
        return []
    missing = missing_tools()
    if missing and choice == "cpu":
        raise SystemExit(f"PEFTKERN_BUILD=cpu needs {' and '.join(missing)}")
    if missing:
        print(f"peftkern: skipping the CPU library, for want of {' and '.join(missing)}")
        return []
    return ["cpu"]


class CMakeBuild(build_ext):
    """One CMake build in place of setuptools' compiler; each extension is a library without a Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def get_source_files(self) -> list[str]:
        """What a source distribution needs beside the package."""
        sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp")]
        return [str(path.relative_to(ROOT)) for path in [ROOT / "CMakeLists.txt", *sources]]

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        output.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DPEFTKERN_OUTPUT_DIR={output}",
             *shlex.split(os.environ.get("CMAKE_ARGS", ""))],
            check=True,
        )  # fmt: skip
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run(["cmake", "--build", build, *(["-j", jobs] if jobs else [])], check=True)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib, *ext.name.split(".")[:-1], "_build_info.json")
            self.copy_file(str(built), str(ROOT.joinpath(*ext.name.split(".")[:-1], "_build_info.json")))


class PlatformWheel(bdist_wheel):
    """The libraries depend on the platform, not on the interpreter."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", platform


setup(
    ext_modules=[Extension(f"peftkern.libpeftkern_{name}", sources=[]) for name in libraries()],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
