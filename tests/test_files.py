# SPDX-License-Identifier: Apache-2.0
"""Files that are replaced: processes that are killed, other processes that write, and full disks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import itertools
import multiprocessing
import os
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch

from peftkern import PrefixKV, load_prefix, save_prefix
from peftkern.files import append_to_file, replace_file, replace_files
from peftkern.model_info import Origin

GEOMETRY = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

#: Makes processes from one that has imported everything and holds little memory, unlike the process of the tests.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__])

#: Before which call of a save a process is killed. Two files are flushed and renamed, then the folder is flushed.
STEPS = ("fsync 1", "fsync 2", "replace 1", "replace 2", "fsync 3")


def prefix(name: str, tokens: int = 3) -> PrefixKV:
    made = PrefixKV(None, tokens, **GEOMETRY)
    made.origin = Origin(f"owner/{name}")
    return made


def _save_until(step: str, folder: Path, ready=None) -> None:
    """Save a prefix, and be killed before a step; or with ``ready``, wait there."""
    torch.set_num_threads(1)
    torch.manual_seed(5)
    counts = {name: itertools.count(1) for name in ("fsync", "replace")}
    real = {name: getattr(os, name) for name in counts}

    def call(name, *args):
        if f"{name} {next(counts[name])}" == step:
            if ready is None:
                os.kill(os.getpid(), signal.SIGKILL)
            ready.send(step)
            ready.recv()
        return real[name](*args)

    for name in counts:
        setattr(os, name, functools.partial(call, name))
    save_prefix(prefix("new"), folder)


def killed_at(step: str, folder: Path) -> None:
    process = _FORKS.Process(target=_save_until, args=(step, folder))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def temporary(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith("."))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("old", ["the same shape", "another shape", "nothing"])
def test_a_killed_save_leaves_a_whole_prefix_and_the_next_one_tidies(old, step, tmp_path):
    before = None if old == "nothing" else prefix("old", 3 if old == "the same shape" else 5)
    if before is not None:
        save_prefix(before, tmp_path)
    killed_at(step, tmp_path)
    renamed = STEPS.index(step) >= STEPS.index("replace 2")
    between = step == "replace 2" and before is not None
    if before is not None or renamed:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = load_prefix(tmp_path)
        assert loaded.origin.base_model_name_or_path == ("owner/new" if renamed else "owner/old")
        assert loaded.lengths == ((3, 3) if renamed else before.lengths)
        said = [str(warning.message) for warning in caught]
        assert len(said) == between
        assert all(str(tmp_path / CONFIG) in text and "saving was interrupted" in text for text in said)
    left = temporary(tmp_path)
    assert len(left) == {"fsync 1": 1, "fsync 2": 2, "replace 1": 2, "replace 2": 1, "fsync 3": 0}[step]
    save_prefix(prefix("third"), tmp_path)
    assert set(os.listdir(tmp_path)) == {WEIGHTS, CONFIG}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_prefix(tmp_path).origin.base_model_name_or_path == "owner/third"


@pytest.mark.parametrize("step", STEPS)
def test_a_running_save_keeps_its_temporary_files(step, tmp_path):
    """While a process is in the middle of a save, saves of others remove nothing of it, and it ends well."""
    here, there = _FORKS.Pipe()
    process = _FORKS.Process(target=_save_until, args=(step, tmp_path, there))
    process.start()
    assert here.poll(60)
    assert here.recv() == step
    running = temporary(tmp_path)
    for name in ("second", "third"):
        save_prefix(prefix(name), tmp_path)
        assert temporary(tmp_path) == running
    here.send(None)
    process.join()
    assert process.exitcode == 0
    assert set(os.listdir(tmp_path)) == {WEIGHTS, CONFIG}
    with contextlib.nullcontext() if step != "replace 2" else pytest.warns(UserWarning, match="which is used"):
        load_prefix(tmp_path)


def test_only_unlocked_temporary_files_are_removed(tmp_path):
    token = "0123456789abcdef" * 2
    kept = [".weights", f".weights.{token}", f"weights.{token}.tmp", ".weights.0.tmp", f".weights.{token}.part"]
    for name in kept:
        (tmp_path / name).write_text("kept")
    (tmp_path / f".folder.{token}.tmp").mkdir()
    (tmp_path / f".link.{token}.tmp").symlink_to(tmp_path / ".weights")
    os.mkfifo(tmp_path / f".pipe.{token}.tmp")
    (tmp_path / f".other.{token}.tmp").write_text("abandoned by a save of another file")
    locked = tmp_path / f".locked.{token}.tmp"
    with locked.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        replace_files(tmp_path, {"weights": b"1"})
        assert locked.exists()
    special = [f".{name}.{token}.tmp" for name in ("folder", "link", "pipe")]
    assert set(os.listdir(tmp_path)) == {*kept, *special, locked.name, "weights"}
    replace_files(tmp_path, {"weights": b"2"})
    assert not locked.exists()


def test_a_file_that_is_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    """Another process may find a temporary file between its creation and its lock."""
    real, removed = fcntl.flock, []

    def flock(file, operation):
        if not removed and operation == fcntl.LOCK_EX:
            removed.extend(temporary(tmp_path))
            (tmp_path / removed[0]).unlink()
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    replace_file(tmp_path / "weights", b"1")
    assert len(removed) == 1
    assert os.listdir(tmp_path) == ["weights"]
    assert (tmp_path / "weights").read_bytes() == b"1"


def test_a_file_system_without_locks_keeps_what_was_abandoned(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (left := tmp_path / f".weights.{'0' * 32}.tmp").touch()
    monkeypatch.setattr(fcntl, "flock", flock)
    replace_file(tmp_path / "weights", b"1")
    assert set(os.listdir(tmp_path)) == {"weights", left.name}


def test_more_files_than_a_process_may_open(tmp_path):
    """An export of a large bank replaces more files than there are descriptors for locks."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 230, before[1]))
    try:
        replace_files(tmp_path, {str(i): b"1" for i in range(400)})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(os.listdir(tmp_path)) == 400


WRITERS = {
    "replace_files": lambda path: replace_files(path.parent, {path.name: b"1"}),
    "replace_file": lambda path: replace_file(path, b"1"),
    "append_to_file": lambda path: append_to_file(path, b"1"),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_error_of_the_disk_names_the_file_and_the_disk(name, number, tmp_path, monkeypatch):
    def fsync(file):
        raise OSError(number, os.strerror(number))

    path = tmp_path / "weights"
    path.write_bytes(b"0")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Errno") as error:
        WRITERS[name](path)
    assert error.value.errno == number
    assert str(error.value).endswith(f": '{path}'")
    mount = next(parent for parent in path.parents if os.path.ismount(parent))
    assert (f"(the disk at {mount} has " in str(error.value)) == (number != errno.EIO)
    assert os.listdir(tmp_path) == ["weights"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_device_is_named():
    with pytest.raises(OSError, match=r"No space left on device \(the disk at .*\): '/dev/full'"):
        append_to_file(Path("/dev/full"), b"1")


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "weights").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        replace_file(tmp_path / "weights", b"1")
    assert str(error.value).endswith(f"directory: '{tmp_path / 'weights'}'")
    assert os.listdir(tmp_path) == ["weights"]


# Weights and config that do not agree


def test_an_edited_model_is_used_and_said(tmp_path):
    save_prefix(prefix("old"), tmp_path)
    path = tmp_path / CONFIG
    path.write_text(path.read_text().replace("owner/old", "/my/model"))
    with pytest.warns(UserWarning, match="base_model_name_or_path: expected 'owner/old', as in the weights, got "):
        assert load_prefix(tmp_path).origin.base_model_name_or_path == "/my/model"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"num_virtual_tokens": 4}', "num_virtual_tokens: expected 3, as in the weights, got 4"),
        ('{"peft_type"', "expected PEFT's config, a JSON object, got text that is not JSON"),
        ("[]", "expected PEFT's config, a JSON object, got a JSON list"),
    ],
)
def test_a_config_of_something_else_is_not_used_and_said(text, message, tmp_path):
    save_prefix(prefix("old"), tmp_path)
    (tmp_path / CONFIG).write_text(text)
    with pytest.warns(UserWarning, match="the config in adapter_model.safetensors is used") as caught:
        assert load_prefix(tmp_path).origin.base_model_name_or_path == "owner/old"
    assert str(tmp_path / CONFIG) in str(caught[0].message)
    assert message in str(caught[0].message)


def test_weights_that_were_copied_into_another_folder(tmp_path):
    save_prefix(prefix("old", 5), tmp_path)
    save_prefix(prefix("new"), tmp_path / "new")
    shutil.copy(tmp_path / "new" / WEIGHTS, tmp_path)
    with pytest.warns(UserWarning, match="num_virtual_tokens: expected 3, as in the weights, got 5"):
        assert load_prefix(tmp_path).origin.base_model_name_or_path == "owner/new"


def test_files_that_agree_say_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("old", "new", "new"):
            save_prefix(prefix(name), tmp_path)
            assert load_prefix(tmp_path).origin.base_model_name_or_path == f"owner/{name}"
        (tmp_path / CONFIG).unlink()
        load_prefix(tmp_path)
