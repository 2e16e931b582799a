# SPDX-License-Identifier: Apache-2.0
"""Choosing a backend: an explicit one runs or raises, 'auto' takes the first that can, and everything says why."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import warnings
from dataclasses import replace

import pytest
import torch

import peftkern
from peftkern import backends
from peftkern.backends import torch_attention
from peftkern.testing.cases import Shape, feature, tensors

FP64 = tensors(Shape())
FP32 = tensors(Shape(), torch.float32)


def _ran(monkeypatch, **call):
    """The backend whose forward was entered."""
    entered = []
    for name in ("cpu", "cuda", "triton", "reference"):
        plan = backends.plan_named(name)
        forward = plan.prefix_attention
        monkeypatch.setattr(plan, "prefix_attention", lambda args, n=name, f=forward: entered.append(n) or f(args))
    peftkern.prefix_attention(**call)
    return entered


def test_an_explicit_backend_never_falls_back():
    with pytest.raises(peftkern.BackendUnavailable) as error:
        peftkern.prefix_attention(**FP64, backend="cpu")
    message = str(error.value)
    assert message.startswith("backend='cpu' cannot run prefix_attention: q [2, 4, 7, 8] · k [2, 2, 7, 8] float64")
    assert "\n  cpu: " in message, "the reason is missing"
    assert "cpu: ok" not in message
    assert "reference: ok" in message, "the way out is missing"


def test_auto_takes_the_first_that_can(monkeypatch):
    assert _ran(monkeypatch, **FP64) == ["reference"]
    assert peftkern.explain(**FP64).chosen == "reference"


def test_the_argument_beats_the_context_beats_the_variable(monkeypatch):
    call = backends.Call("prefix_attention", torch.device("cpu"), torch.float32, torch.float32, (1, 1, 1, 8),
                         (1, 1, 1, 8), (1, 1, 8))  # fmt: skip
    monkeypatch.setenv("PEFTKERN_BACKEND", "reference")
    assert backends.resolve(call) == "reference"
    monkeypatch.setenv("PEFTKERN_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        backends.resolve(call)
    with peftkern.use_backend("reference"):
        assert backends.resolve(call) == "reference"
        with pytest.raises(ValueError, match="other"):
            backends.resolve(call, "other")
    with pytest.raises(ValueError, match="nonsense"):
        backends.resolve(call)


def test_use_backend_restores_after_an_exception():
    with pytest.raises(KeyError), peftkern.use_backend("reference"):
        raise KeyError
    assert backends.registry._overrides == []
    with pytest.raises(ValueError, match="nonsense"), peftkern.use_backend("nonsense"):
        pass


def test_use_backend_holds_for_other_threads(monkeypatch):
    """Autograd recomputes checkpointed layers in threads of its own."""
    entered = []
    with peftkern.use_backend("reference"):
        thread = threading.Thread(target=lambda: entered.extend(_ran(monkeypatch, **FP32)))
        thread.start()
        thread.join()
    assert entered == ["reference"]


def test_every_backend_explains_every_refusal():
    calls = [
        peftkern.explain(**FP64).call,
        peftkern.explain(**tensors(Shape(D=264), torch.float32)).call,
        backends.Call("soft_prompt_embedding", torch.device("cuda"), torch.half, torch.float, (1, 2), (3, 4), (5, 4)),
    ]
    for call in calls:
        for name, reasons in backends.explain(call).reasons.items():
            assert all(isinstance(reason, str) and reason for reason in reasons), name
    assert backends.explain(calls[-1]).reasons["cpu"], "the CPU backend claims to run CUDA tensors"


def test_explain_reads_like_a_table():
    text = str(peftkern.explain(**FP64, window=3, dropout_p=0.5, dropout_seed=1))
    assert "window · dropout" in text
    assert "reference: ok, chosen by 'auto'" in text
    with pytest.raises(ValueError, match="got an unexpected keyword argument 'windw'"):
        peftkern.explain(**FP64, windw=3)


def test_explain_says_that_prefixes_are_gathered():
    gathered = "every backend but reference and cpu copies the prefixes into a bank first"
    for name in ("packed_several", "packed_shared", "packed_bank"):
        shape, options = feature(name, Shape())
        text = str(peftkern.explain(**tensors(shape, torch.float32), **options))
        assert (gathered in text) == (name != "packed_bank")


def test_explain_names_the_backend_that_runs(monkeypatch):
    assert "cpu: ok, chosen by 'auto'" in str(peftkern.explain(**FP32))
    assert "cpu: ok, requested by backend" in str(peftkern.explain(**FP32, backend="cpu"))
    with peftkern.use_backend("reference"):
        assert "reference: ok, requested by use_backend" in str(peftkern.explain(**FP32))
    monkeypatch.setenv("PEFTKERN_BACKEND", "reference")
    assert "reference: ok, requested by PEFTKERN_BACKEND" in str(peftkern.explain(**FP32))
    assert peftkern.explain(**FP32).chosen == "reference"
    assert peftkern.explain(**FP64, backend="cpu").chosen is None


def test_available_backends():
    assert peftkern.available_backends()[-1] == "reference"
    assert peftkern.available_backends("cuda") == ("reference",)


def test_auto_announces_the_slow_path_once():
    call = backends.Call("prefix_attention", torch.device("cuda"), torch.float32, torch.float32, (1, 1, 1, 8),
                         (1, 1, 1, 8), (1, 1, 8))  # fmt: skip
    backends.registry._warned.clear()
    with pytest.warns(UserWarning, match="eager reference on cuda"):
        backends.resolve(call)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.resolve(call)


def test_overlapping_blocks_of_two_threads_leave_nothing_behind():
    """A enters, B enters, A leaves, B leaves: the override of B ends with B."""
    first, second = peftkern.use_backend("reference"), peftkern.use_backend("cpu")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert peftkern.explain(**FP32).requested == "cpu"
    second.__exit__(None, None, None)
    assert peftkern.explain(**FP32).requested == "auto"


def test_a_call_keeps_its_hash_in_another_process():
    call = peftkern.explain(**FP32).call
    hash(call)
    script = "import pickle, sys; c = pickle.load(sys.stdin.buffer); assert c in {eval(sys.argv[1]): 1}"
    fields = "__import__('dataclasses').replace(c)"
    done = subprocess.run([sys.executable, "-c", script, fields], input=pickle.dumps(call), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("name", ["merge", "merge/none/triton", "merge/flash/none", "cpu/flash", "nonsense"])
def test_a_name_that_is_no_plans_is_refused(name):
    with pytest.raises(ValueError, match="plan: expected "):
        backends.plan_named(name)


def test_the_environments_mistake_is_named(monkeypatch):
    monkeypatch.setenv("PEFTKERN_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="PEFTKERN_BACKEND: expected 'auto' or one of"):
        peftkern.prefix_attention(**FP32)


def test_the_compiler_shows_why_a_backend_is_unavailable():
    torch._dynamo.reset()
    compiled = torch.compile(peftkern.prefix_attention, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="supports cuda tensors only"):
        compiled(**FP32, backend="cuda")


def test_explain_describes_the_call_that_would_run():
    inputs = {name: x.clone().requires_grad_() for name, x in FP32.items()}
    assert peftkern.explain(**inputs).call.needs_grad
    with torch.no_grad():
        assert not peftkern.explain(**inputs).call.needs_grad
    state = torch.get_rng_state()
    call = peftkern.explain(**inputs, dropout_p=0.5).call
    assert torch.equal(torch.get_rng_state(), state), "explain has drawn a seed"
    assert peftkern.explain(call, backend="reference").requested == "reference"
    with pytest.raises(ValueError, match="explain: expected backend with a Call, got"):
        peftkern.explain(call, window=3)


def test_a_kernel_that_is_not_deterministic_refuses_to_train_where_torch_must_be():
    call = backends.Call("prefix_attention", torch.device("cuda"), torch.half, torch.half, (1, 1, 128, 64),
                         (1, 1, 128, 64), (1, 8, 64), needs_grad=True)  # fmt: skip
    cudnn = next(kernel for kernel in torch_attention.KERNELS if kernel.name == "cudnn").on_any_machine()
    assert not cudnn.why_not(call, (), 128)
    before = backends.registry._state(call.device)
    torch.use_deterministic_algorithms(True)
    try:
        assert cudnn.why_not(call, (), 128) == [
            "its gradients are not deterministic, as torch.use_deterministic_algorithms requires"
        ]
        assert not cudnn.why_not(replace(call, needs_grad=False), (), 128)
        assert backends.registry._state(call.device) != before, "a plan chosen before would be taken again"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_plan_can_be_requested_by_its_name():
    with peftkern.use_backend("reference"):
        assert peftkern.explain(**FP32).chosen_plan == "reference"
    with pytest.raises(ValueError, match=r"plan: expected merge/KERNEL/PREFIX_KERNELS, got merge/flash"):
        peftkern.prefix_attention(**FP32, backend="merge/flash")
    with pytest.raises(peftkern.BackendUnavailable, match=r"merge/cpu flash/triton: "):
        peftkern.prefix_attention(**FP32, backend="merge/cpu flash/triton")
