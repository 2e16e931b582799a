# SPDX-License-Identifier: Apache-2.0
"""Wheels have the right names, builds ask for the right tools, and (slow) wheels build, load and are complete."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import peftkern
from peftkern.tools import cli

from . import skips

ROOT = Path(__file__).parent.parent


def _setup(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("setuptools")
    environment = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@skips.needs("nvcc")
@pytest.mark.parametrize(
    ("choice", "architectures", "local"),
    [
        ("none", "8.0", ""),
        ("cpu", "8.0", ""),
        ("cuda", "8.0;9.0", r"\+cu\d+\.sm80\.sm90"),
        ("all", "8.6, 9.0a+PTX", r"\+cu\d+\.sm86\.sm90aptx"),
        ("cuda", "", r"\+cu\d+\.sm80\.sm86\.sm89\.sm90\.sm100\.sm120ptx"),
    ],
)
def test_the_version_names_toolkit_and_architectures(tmp_path, choice, architectures, local):
    variables = {"PEFTKERN_BUILD": choice, "TORCH_CUDA_ARCH_LIST": architectures}
    done = _setup("-q", "egg_info", "--egg-base", str(tmp_path), **variables)
    assert done.returncode == 0, done.stderr
    version = re.search(r"^Version: (.*)$", (tmp_path / "peftkern.egg-info" / "PKG-INFO").read_text(), re.M)[1]
    assert re.fullmatch(re.escape(peftkern.__version__) + local, version), version


def test_an_unknown_choice_is_refused():
    done = _setup("--version", PEFTKERN_BUILD="gpu")
    assert "PEFTKERN_BUILD: expected one of auto, none, cpu, cuda, all, got 'gpu'" in done.stderr


def test_a_missing_compiler_is_named(tmp_path):
    done = _setup("--version", PEFTKERN_BUILD="cuda", CUDA_HOME=str(tmp_path))
    assert (
        "PEFTKERN_BUILD=cuda needs nvcc (a CUDA toolkit in PATH or CUDA_HOME, or the extra build-cuda)" in done.stderr
    )


@skips.needs("c++", "cmake", "ninja")
def test_a_second_build_ignores_the_cache_of_the_first(tmp_path):
    """As with pip, the ninja of the first build is gone, and the second build has other options."""
    pytest.importorskip("setuptools")
    ninja = shutil.which("ninja")

    def build(name: str, *options: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "ninja").write_text(f'#!/bin/sh\nexec "{ninja}" "$@"\n')
        (folder / "ninja").chmod(0o755)
        done = _setup(
            "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"),
            PEFTKERN_BUILD="cpu", PATH=f"{folder}:{os.environ['PATH']}",
            CMAKE_ARGS=" ".join(["-DPEFTKERN_PORTABLE_ONLY=ON", "-DCMAKE_BUILD_TYPE=Debug", *options]),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        shutil.rmtree(folder)
        return (tmp_path / "temp" / "cmake" / "CMakeCache.txt").read_text()

    first, second = build("first", "-DCMAKE_SHARED_LINKER_FLAGS=-Wl,--build-id=none"), build("second")
    assert "--build-id=none" in first
    assert "--build-id=none" not in second, "an option of the first build is still in force"
    assert str(tmp_path / "first") not in second
    assert (tmp_path / "lib" / "peftkern" / "libpeftkern_cpu.so").exists()


@skips.needs("nvcc", "cmake")
@pytest.mark.parametrize("architectures", ["7.5", "ampere", "8.0 sm_90"])
def test_other_architectures_are_refused_by_name(tmp_path, architectures):
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DPEFTKERN_CPU=OFF", "-DPEFTKERN_CUDA=ON",
               f"-DPEFTKERN_OUTPUT_DIR={tmp_path}"]  # fmt: skip
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": architectures}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"TORCH_CUDA_ARCH_LIST: {'7.5 has no' if architectures == '7.5' else 'expected compute'}" in done.stderr


def test_build_wheel_asks_pip_for_what_it_was_told(monkeypatch, tmp_path):
    asked = []

    def run(command, env, **kwargs):
        asked.append((command, env["PEFTKERN_BUILD"], env["TORCH_CUDA_ARCH_LIST"]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    options = ["--arch", "8.0", "--arch", "9.0+PTX", "--source", str(ROOT), "--output", str(tmp_path)]
    assert cli.main(["build-wheel", *options]) == 0
    assert cli.main(["build-wheel", "--no-cpu", *options]) == 0
    assert [x[1:] for x in asked] == [("all", "8.0;9.0+PTX"), ("cuda", "8.0;9.0+PTX")]
    assert asked[0][0][2:] == ["pip", "wheel", str(ROOT), "--no-deps", "--wheel-dir", str(tmp_path)]


def test_build_wheel_outside_a_checkout_says_so(tmp_path, capsys):
    assert cli.main(["build-wheel", "--arch", "9.0", "--source", str(tmp_path)]) == 2
    assert "not a checkout of peftkern" in capsys.readouterr().err


def test_build_wheel_without_gpu_or_arch_says_so(capsys):
    assert cli.main(["build-wheel", "--source", str(ROOT)]) == 2
    assert "--arch 9.0" in capsys.readouterr().err


WHEELS = [("none", ""), ("cpu", ""), ("cuda", "8.0"), ("cuda", "9.0"), ("cuda", "8.0;8.6;8.9;9.0;10.0;12.0"),
          ("all", "9.0+PTX")]  # fmt: skip
LIBRARIES = {"none": set(), "cpu": {"cpu"}, "cuda": {"cuda"}, "all": {"cpu", "cuda"}}


@pytest.mark.slow
@pytest.mark.parametrize(("choice", "architectures"), WHEELS)
def test_a_wheel_builds_installs_and_holds_what_it_says(tmp_path, choice, architectures):
    """Build in pip's isolated environment, which has no torch. Prints time and size."""
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, tracked):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    start = time.perf_counter()
    environment = {**os.environ, "PEFTKERN_BUILD": choice, "TORCH_CUDA_ARCH_LIST": architectures}
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--wheel-dir", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (wheel,) = tmp_path.glob("*.whl")
    print(f"{wheel.name}: {time.perf_counter() - start:.0f} s, {wheel.stat().st_size / 1e6:.1f} MB")
    assert wheel.name.endswith("-py3-none-any.whl" if choice == "none" else "_x86_64.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "installed")
    package = tmp_path / "installed" / "peftkern"
    built = {path.name for path in package.glob("*.so")}
    assert built == {f"libpeftkern_{name}.so" for name in LIBRARIES[choice]}
    if "cuda" in LIBRARIES[choice]:
        _check_architectures(package, architectures.split(";"))
    if built:
        _check_platform(wheel)


def _check_platform(wheel: Path) -> None:
    """auditwheel finds no library outside the platform's and no glibc newer than the tag's."""
    pytest.importorskip("auditwheel", reason="auditwheel (pip install auditwheel) knows what a platform tag promises")
    command = [sys.executable, "-m", "auditwheel", "show", "--json", "--disable-isa-ext-check", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["external_libs"] == {}, verdict
    glibc = [int(re.search(r"manylinux_2_(\d+)", name)[1]) for name in (wheel.name, verdict["overall_tag"])]
    # its policies have gaps: 2.29 is within the next one, 2.31
    assert glibc[0] <= glibc[1] <= glibc[0] + 2, verdict


def _check_architectures(package: Path, architectures: list[str]) -> None:
    library = ctypes.CDLL(str(package / "libpeftkern_cuda.so"))
    library.peftkern_cuda_architectures.restype = ctypes.c_char_p
    assert library.peftkern_cuda_architectures().decode() == ",".join(architectures)
    info = json.loads((package / "_build_info.json").read_text())
    assert info["cuda"]["architectures"] == architectures
    tools = Path(pytest.importorskip("triton").__file__).parent / "backends" / "nvidia" / "bin"
    for kind, suffix in (("elf", ""), ("ptx", "+PTX")):
        command = [tools / "cuobjdump", f"--list-{kind}", package / "libpeftkern_cuda.so"]
        listed = subprocess.run(command, capture_output=True, text=True).stdout
        expected = {f"sm_{a.removesuffix('+PTX').replace('.', '')}" for a in architectures if a.endswith(suffix)}
        assert set(re.findall(r"\.(sm_\d+)\.", listed)) == expected, listed
