# SPDX-License-Identifier: Apache-2.0
"""The command line: doctor on healthy and broken machines, help texts, exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch

from peftkern import native
from peftkern.tools import cli, doctor, versions


def _python(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)


def test_doctor_prints_every_section_and_passes(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for section in (
        "system",
        "packages",
        "build",
        "gpu",
        "backends that run here",
        "backends for other devices",
        "self-test",
    ):
        assert f"\n{section}\n" in f"\n{text}", f"section {section} is missing"
    assert "reference on cpu  ok" in text


def test_doctor_json_is_json(capsys):
    cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["self-test"]["passed"] is True
    assert set(report["packages"]) >= {"torch", "transformers", "peft"}


def test_doctor_runs_where_torch_is_broken():
    """Every probe that needs torch reports its failure in a line, and the exit status is 1."""
    script = (
        "import sys; sys.modules['torch'] = None; from peftkern.tools.cli import main; sys.exit(main(['doctor']))"
    )
    result = _python(script)
    assert result.returncode == 1, result.stderr
    assert "failed" in result.stdout
    assert "python" in result.stdout
    assert result.stderr == ""


def test_doctor_marks_untested_versions(monkeypatch):
    for version, remark in (
        ("99.0", " (untested; tested with 2.11 to 2.15)"),
        ("2.10.9", " (untested; tested with 2.11 to 2.15)"),
        ("2.14.1+cpu", ""),
    ):
        monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name, version=version: version)
        assert doctor._packages()["torch"] == version + remark


def test_doctor_reads_the_build_and_groups_backends_by_device():
    report = doctor.collect()
    assert ("compiler" in report["build"]) == (not native.cpu.MISSING)
    here, elsewhere = report["backends that run here"], report["backends for other devices"]
    assert here["reference on cpu"].startswith("float32, bfloat16")
    if native.cpu.MISSING:
        assert native.cpu.MISSING in here["cpu on cpu"]
    if not torch.cuda.is_available():
        assert set(elsewhere) == {"triton", "merge", "concat", "cuda"}
        assert not any("cuda" in words for words in here.values()), "a GPU's backend is listed for the CPU"


def test_doctor_says_that_the_commit_is_that_of_the_configuration(monkeypatch, tmp_path):
    (tmp_path / "_build_info.json").write_text(json.dumps({"git_sha": "abc", "libraries": ["cpu"], "cuda": None}))
    monkeypatch.setattr(doctor, "_PACKAGE", str(tmp_path))
    assert doctor._build() == {"configured at commit": "abc", "libraries": ["cpu"]}


def test_metadata_follow_the_tested_versions():
    with open(Path(__file__).parents[2] / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)
    lowest = {name: low for name, (low, _) in versions.TESTED.items()}
    python = project["project"]["requires-python"]
    assert python == f">={lowest['Python']}"
    assert project["tool"]["mypy"]["python_version"] == lowest["Python"]
    assert project["tool"]["ruff"]["target-version"] == "py" + lowest["Python"].replace(".", "")
    requirements = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["demo"]]
    for name in ("torch", "transformers", "peft"):
        assert f"{name}>={lowest[name]}" in requirements
    minors = [c.rpartition(".")[2] for c in project["project"]["classifiers"] if "Python :: 3." in c]
    assert [f"3.{minor}" for minor in minors] == [
        f"3.{i}" for i in range(*(int(v.split(".")[1]) + n for n, v in enumerate(versions.TESTED["Python"])))
    ]


def test_a_wrong_self_test_is_reported(monkeypatch):
    from peftkern import backends

    reference = backends.plan_named("reference")
    right = reference.prefix_attention
    monkeypatch.setattr(reference, "prefix_attention", lambda args: tuple(x + x.dtype.itemsize for x in right(args)))
    report = doctor._self_test()
    assert report["passed"] is False
    assert "WRONG" in report["reference on cpu"]


def test_a_backend_that_raises_does_not_end_the_self_test(monkeypatch):
    from peftkern import backends

    reference = backends.plan_named("reference")
    right = reference.prefix_attention

    def raises_in_fp32(args):
        if args.q.dtype == torch.float32:
            raise RuntimeError("no more registers")
        return right(args)

    monkeypatch.setattr(reference, "prefix_attention", raises_in_fp32)
    monkeypatch.setattr(backends, "available_backends", lambda *_: ("reference", "reference again"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = doctor._self_test()
    assert report["passed"] is False
    assert report["reference on cpu"] == "RAISED RuntimeError: no more registers"
    assert report["reference again on cpu"].startswith("RAISED ValueError: backend: expected"), "it was not reached"


def test_a_self_test_with_a_nan_is_wrong(monkeypatch):
    from peftkern import backends

    reference = backends.plan_named("reference")
    right = reference.prefix_attention_backward

    def nan_in_the_last(*args):
        gradients = right(*args)
        if gradients.dprefix_v.dtype == torch.float32:
            gradients.dprefix_v.fill_(float("nan"))
        return gradients

    monkeypatch.setattr(reference, "prefix_attention_backward", nan_in_the_last)
    report = doctor._self_test()
    assert report["passed"] is False
    assert report["reference on cpu"] == "WRONG, relative error nan"


@pytest.mark.parametrize(("hip", "architecture"), [(None, "sm_94"), ("7.0", "gfx942:sramecc+:xnack-")])
def test_doctor_names_the_architecture_as_its_maker_does(monkeypatch, hip, architecture):
    device = types.SimpleNamespace(
        name="a GPU", major=9, minor=4, gcnArchName="gfx942:sramecc+:xnack-", total_memory=1 << 30
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert doctor._gpu()["cuda:0"] == f"a GPU, {architecture}, 1024 MiB"


def test_doctor_reports_the_variables_that_change_results(monkeypatch):
    for name in ("PEFTKERN_AUTOTUNE", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "1")
    report = doctor.collect()["variables"]
    assert report["PEFTKERN_AUTOTUNE"] == report["TRITON_INTERPRET"] == "1"


def test_importing_the_package_imports_nothing_heavy_and_changes_nothing():
    script = (
        "import sys, peftkern\n"
        "heavy = {'torch', 'transformers', 'peft', 'triton', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import peftkern.huggingface, transformers\n"
        "assert 'peftkern' not in transformers.AttentionInterface._global_mapping\n"
    )
    result = _python(script)
    assert result.returncode == 0, result.stderr


def test_every_public_name_loads():
    import peftkern

    for name in peftkern.__all__:
        assert getattr(peftkern, name) is not None
    assert set(peftkern.__all__) <= set(dir(peftkern))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = peftkern.nonsense


@pytest.mark.parametrize(
    "arguments", [["--help"], ["doctor", "--help"], ["bench", "--help"], ["demo", "--help"], ["--version"]]
)
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(arguments)
    assert status.value.code == 0
    assert "peftkern" in capsys.readouterr().out


def test_wrong_arguments_have_status_2(capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(["nonsense"])
    assert status.value.code == 2
    assert "nonsense" in capsys.readouterr().err
