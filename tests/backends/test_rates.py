# SPDX-License-Identifier: Apache-2.0
"""Measured rates are optional: whatever their file is, and wherever the user's files are, operations run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

import peftkern
from peftkern.backends import registry
from peftkern.backends.cost import measured
from peftkern.backends.machine import identity
from peftkern.tools import cli
from peftkern.tools.demo.assets import cache_folder
from peftkern.user_cache import expanded, user_cache

CPU = torch.device("cpu")
DEEP = '{"a":' * 100_000


def _content(**changes) -> str:
    return json.dumps({"format": 1, "machine": identity(CPU), "scales": {"x": [1.0, 2.0]}} | changes)


def _run() -> None:
    q, kv, prefix = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16), torch.randn(2, 4, 16)
    registry.forget()
    for dtype in (torch.float32, torch.bfloat16):  # each looks for rates
        peftkern.prefix_attention(*(x.to(dtype) for x in (q, kv, kv, prefix, prefix)))


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    registry.forget()
    yield tmp_path / "peftkern" / "rates_cpu.json"
    monkeypatch.undo()
    registry.forget()


DAMAGES = {
    "deep": (DEEP, "brackets that are nested too deeply"),
    "deep rates": (_content(scales=1).replace('"scales": 1', '"scales": ' + DEEP), "nested too deeply"),
    "400 digits": (_content(scales={"x": [10**399, 1]}), "a number of 400 digits"),
    "5000 digits": ('{"format": ' + "1" * 5000 + "}", "a number of 5000 digits"),
    "NaN": (_content(scales={"x": [float("nan"), 1]}), "the number NaN"),
    "a float without end": (_content().replace("2.0", "2e999"), "the number 2e999"),
    "negative": (_content(scales={"x": [-1, 1]}), "expected two finite, non-negative factors, got [-1, 1]"),
    "one factor": (_content(scales={"x": [1]}), "not enough values"),
    "three factors": (_content(scales={"x": [1, 2, 3]}), "too many values"),
    "a number for factors": (_content(scales={"x": 1}), "not iterable"),
    "a list of scales": (_content(scales=[1]), "has no attribute"),
    "null": (_content(scales=None), "has no attribute"),
    "a list": ("[]", "a JSON list"),
    "nothing": ("", "text that is not JSON"),
    "binary": (b'{"\xff": 1}', "bytes that are not text"),
    "a long format": (_content(format="1" * 10**6), "its format is '1111"),
    "another machine": (_content(machine=[[[["x"] * 10**5] * 9]]), "it was measured on ["),
    "no machine": ('{"format": 1}', "it lacks 'machine'"),
    "a huge file": (b" " * ((1 << 24) + 1), "more than 16777216 bytes"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_costs_one_warning(name, file):
    data, message = DAMAGES[name]
    file.parent.mkdir()
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _run()
        _run()
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 1, texts
    assert texts[0].startswith(f"the measured rates in {file} are ignored: ")
    assert message in texts[0]
    assert len(texts[0]) < 700


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to itself", "file for the folder", "no folder"])
def test_what_is_no_file_costs_at_most_one_warning(kind, file):
    if kind == "file for the folder":
        file.parent.touch()
    elif kind != "no folder":
        file.parent.mkdir()
        make = {"folder": Path.mkdir, "pipe": os.mkfifo, "link to itself": lambda path: path.symlink_to(path)}
        make[kind](file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _run()
        _run()
    assert len(caught) == (kind != "no folder")
    assert all(str(file) in str(warning.message) for warning in caught)


def test_whole_rates_are_used_in_silence(file):
    file.parent.mkdir()
    file.write_text(_content())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured.load(CPU, identity(CPU)) == (("x", (1.0, 2.0)),)


# Users without a home folder

#: Runs an operation, and autotuning's part of it, for a user whom nothing but a number describes.
SCRIPT = """
import os, pwd, sys, warnings
import torch
import peftkern
from peftkern.backends import registry
from peftkern.backends.cost import measured

def run():
    registry.forget()
    x, prefix = torch.randn(1, 2, 3, 16), torch.randn(2, 4, 16)
    peftkern.prefix_attention(x, x, x, prefix, prefix)

os.environ["XDG_CACHE_HOME"] = os.devnull + "/nothing"
warnings.simplefilter("ignore")
run()  # imports everything, because the user may not read it
del os.environ["XDG_CACHE_HOME"]
warnings.simplefilter("error")
if sys.argv[1] == "real":
    os.setuid(54321)
else:
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")
    pwd.getpwuid = unknown
run()
try:
    measured.path(torch.device("cpu"))
except FileNotFoundError as error:
    print(error)
"""


def _has_entry(uid: int) -> bool:
    import pwd

    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


USERS = ["described by nothing", *(["real"] if os.geteuid() == 0 and not _has_entry(54321) else [])]


@pytest.mark.parametrize("user", USERS)
def test_operations_run_without_a_home_folder(user):
    environment = {"PYTHONPATH": str(Path(peftkern.__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), user]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        "~/.cache: expected a home folder for ~, got none: set HOME, or XDG_CACHE_HOME for what peftkern keeps\n"
    )


@pytest.fixture
def nobody(monkeypatch):
    """A user without HOME and without an entry in the table of users."""
    import pwd

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    registry.forget()


@pytest.mark.skipif(sys.platform == "win32", reason="the home folder comes from other variables")
@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "--calibrate", "--seconds", "0", "--device", "cpu"],
        ["demo", "--quick", "--data", "~/reviews.csv"],
    ],
    ids=" ".join,
)
def test_commands_that_need_the_folder_say_what_is_missing(arguments, nobody, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("peftkern.tools.calibrate.measure", lambda *_: iter(()))
    assert cli.main(arguments) == 2
    assert "expected a home folder for ~, got none: set HOME" in capsys.readouterr().err


def test_the_demo_has_no_folder_for_its_model(nobody, tmp_path):
    assert cache_folder(tmp_path / "chosen") == tmp_path / "chosen"
    for chosen in (None, Path("~/chosen")):
        with pytest.raises(FileNotFoundError, match="expected a home folder for ~, got none: set HOME"):
            cache_folder(chosen)


def test_tiles_are_tuned_without_a_file(nobody, monkeypatch):
    pytest.importorskip("triton")
    from peftkern.backends.triton import autotune
    from peftkern.backends.triton.tiles import Tile

    table, best = Tile(64, 64, 4, 2), Tile(32, 32, 4, 2)
    monkeypatch.setenv("PEFTKERN_AUTOTUNE", "1")
    monkeypatch.setattr(autotune, "_tiles", {})
    monkeypatch.setattr(autotune, "candidates", lambda default: [default, best])
    monkeypatch.setattr(autotune, "_time", lambda run: 1.0 if autotune._trial.get()[1] == best else 2.0)
    assert autotune.chosen("dq", "kind", table) == table
    with pytest.warns(UserWarning, match="the tuned tiles are not saved: .*expected a home folder"):
        autotune.tune("dq", "kind", table, lambda: None)
    assert autotune.chosen("dq", "kind", table) == best


@pytest.mark.parametrize("text", [DEEP, '{"kind": {"tile": [' + "9" * 400 + ", 1, 1, 1]}}"], ids=["deep", "huge"])
def test_damaged_tiles_are_ignored(text, monkeypatch, tmp_path):
    from peftkern.backends.triton import autotune

    (tmp_path / "peftkern_tiles.json").write_text(text)
    with pytest.warns(UserWarning, match="peftkern_tiles.json holds no readable tiles"):
        assert autotune._load(tmp_path / "peftkern_tiles.json") == {}


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="these keep caches elsewhere")
def test_where_the_folder_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, expected in (("", ".cache"), ("~/other", "other"), (str(tmp_path / "x"), "x")):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert user_cache() == tmp_path / expected / "peftkern"
    assert expanded("~/a") == tmp_path / "a"
    assert expanded("a/b") == Path("a/b")
