# SPDX-License-Identifier: Apache-2.0
"""Builds the native libraries with CMake and ninja; all other metadata is in pyproject.toml.

PEFTKERN_BUILD=auto|none|cpu|cuda|all chooses the libraries. ``auto``, the default, builds the CPU library if its
tools are installed. TORCH_CUDA_ARCH_LIST, CUDA_HOME, NVCC_THREADS, MAX_JOBS, CMAKE_ARGS and CXX have their usual
meaning. An isolated build without nvcc takes nvcc from NVIDIA's packages. The libraries have a C ABI and depend on
neither torch nor Python, so one wheel serves every version of both. The version of a wheel with CUDA kernels names
the toolkit and the GPUs: ``0.1.0+cu130.sm80.sm90``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARIES = {"auto": ["cpu"], "none": [], "cpu": ["cpu"], "cuda": ["cuda"], "all": ["cpu", "cuda"]}


def nvcc() -> str | None:
    """Path of nvcc: from CUDA_HOME, else from PATH, else from the package nvidia-cuda-nvcc (extra ``build-cuda``)."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which(str(Path(home, "bin", "nvcc")))
    if found := shutil.which("nvcc"):
        return found
    package = importlib.util.find_spec("nvidia")
    folders = package.submodule_search_locations if package else None
    found = (
        shutil.which(str(path)) for folder in folders or () for path in sorted(Path(folder).glob("cu*/bin/nvcc"))
    )
    return next(filter(None, found), None)


def cuda_toolkit() -> list[str]:
    """Requirements in the extra ``build-cuda``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return list(project["optional-dependencies"]["build-cuda"])


def missing_tools(libraries: list[str]) -> list[str]:
    """What the libraries need and this machine lacks, as words for a message."""
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    missing = [] if any(shutil.which(shlex.split(c)[0]) for c in compilers) else ["a C++ compiler"]
    # egg_info runs first: it tells an isolated build which packages to install, nvcc among them
    if "cuda" in libraries and nvcc() is None and "egg_info" not in sys.argv:
        missing.append("nvcc (a CUDA toolkit in PATH or CUDA_HOME, or the extra build-cuda)")
    return missing + [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]


def chosen_libraries() -> list[str]:
    """Names of the libraries to build."""
    choice = os.environ.get("PEFTKERN_BUILD", "auto")
    if choice not in LIBRARIES:
        raise SystemExit(f"PEFTKERN_BUILD: expected one of {', '.join(LIBRARIES)}, got {choice!r}")
    missing = missing_tools(LIBRARIES[choice]) if LIBRARIES[choice] else []
    if missing and choice == "auto":
        print(f"peftkern: the CPU library is not built: {' and '.join(missing)} not found")
        return []
    if missing:
        raise SystemExit(f"PEFTKERN_BUILD={choice} needs {' and '.join(missing)}")
    return LIBRARIES[choice]


def local_version(libraries: list[str]) -> str:
    """Local version of a build with CUDA kernels, its toolkit and architectures: ``+cu130.sm80.sm90ptx``."""
    if "cuda" not in libraries or nvcc() is None:
        return ""
    output = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", output)
    assert release is not None, f"nvcc --version says {output!r}"
    default = re.search(r"set\(all_capabilities (.*)\)", (ROOT / "csrc" / "cuda" / "CMakeLists.txt").read_text())
    assert default is not None
    names = re.split(r"[ ,;]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or default[1])
    tags = [f"sm{name.replace('.', '').replace('+PTX', 'ptx')}" for name in names if name]
    return f"+cu{release[1]}{release[2]}.{'.'.join(tags)}"


#: Variables that CMake reads once, when it configures a build folder for the first time.
CONFIGURED_BY = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDAHOSTCXX", "CUDAFLAGS", "TORCH_CUDA_ARCH_LIST")
#: Programs in CMake's cache. Those of pip's build environment vanish with it.
TOOLS = r"^CMAKE_(?:AR|LINKER|RANLIB|(?:CXX|CUDA|CUDA_HOST)_COMPILER):\w+=(/.+)$"


def is_stale(build: Path, configuration: dict[str, object]) -> bool:
    """Whether ``build`` was configured otherwise, or with programs that are no longer there.

    CMake keeps options in its cache that a later command leaves out, and full paths of its programs.
    """
    cache, configured = build / "CMakeCache.txt", build / "configuration.json"
    if not cache.exists():
        return False
    if not configured.exists() or json.loads(configured.read_text()) != configuration:
        return True
    return not all(os.path.exists(path) for path in re.findall(TOOLS, cache.read_text(), re.M))


class CMakeBuild(build_ext):
    """One CMake build in place of setuptools' compiler; each extension is a library without a Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def get_source_files(self) -> list[str]:
        """Files that a source distribution needs in addition to the package."""
        sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
        return [str(path.relative_to(ROOT)) for path in [ROOT / "CMakeLists.txt", *sources]]

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        output.mkdir(parents=True, exist_ok=True)
        environment, cuda = dict(os.environ), []
        if "cuda" in libraries:
            compiler = Path(str(nvcc()))
            cuda = [f"-DCMAKE_CUDA_COMPILER={compiler}"]
            # NVIDIA's packages keep their libraries in lib, a folder that their nvcc does not search
            environment["LIBRARY_PATH"] = f"{compiler.parent.parent / 'lib'}:{os.environ.get('LIBRARY_PATH', '')}"
        options = [
            f"-DPEFTKERN_OUTPUT_DIR={output}",
            *(f"-DPEFTKERN_{name.upper()}={'ON' if name in libraries else 'OFF'}" for name in ("cpu", "cuda")),
            *cuda, *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        configuration = {"options": options, **{name: os.environ.get(name) for name in CONFIGURED_BY}}
        fresh = ["--fresh"] if is_stale(build, configuration) else []
        ninja = f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"  # not the one of an earlier build's environment
        command = ["cmake", *fresh, "-S", ROOT, "-B", build, "-G", "Ninja", ninja, *options]
        subprocess.run(command, check=True, env=environment)
        (build / "configuration.json").write_text(json.dumps(configuration))
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run(["cmake", "--build", build, *(["-j", jobs] if jobs else [])], check=True, env=environment)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib, *ext.name.split(".")[:-1], "_build_info.json")
            self.copy_file(str(built), str(ROOT.joinpath(*ext.name.split(".")[:-1], "_build_info.json")))


class PlatformWheel(bdist_wheel):
    """A wheel for a platform and every interpreter; on Linux for the oldest glibc that has the symbols in use."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        paths = Path(self.bdist_dir).rglob("libpeftkern_*.so") if self.bdist_dir else ()
        built = [path.read_bytes() for path in paths]
        versions = [tuple(map(int, v)) for data in built for v in re.findall(rb"\0GLIBC_(\d+)\.(\d+)(?=[.\0])", data)]
        if versions and platform.startswith("linux_"):
            major, minor = max([(2, 17), *versions])
            platform = f"manylinux_{major}_{minor}_{platform.removeprefix('linux_')}"
        return "py3", "none", platform if libraries else "any"


libraries = chosen_libraries()
setup(
    ext_modules=[Extension(f"peftkern.libpeftkern_{name}", sources=[]) for name in libraries],
    exclude_package_data={"peftkern": ["libpeftkern_*.so", "_build_info.json"]},  # of another build
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    options={"egg_info": {"tag_build": local_version(libraries)}},
    setup_requires=cuda_toolkit() if "cuda" in libraries and nvcc() is None else [],
)
