# SPDX-License-Identifier: Apache-2.0
"""The registered ops check their arguments themselves: no call through ``torch.ops`` reads outside of its tensors.

Each argument of each op is perturbed: every size, the number of dims, dtype, device, strides and values. The calls
run in processes of their own, since a call that is not refused may end its process.
"""

from __future__ import annotations

import faulthandler
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import peftkern
from peftkern import backends, op_checks, ops, validation
from peftkern.arguments import AttentionArgs, AttentionGradients
from peftkern.backends.registry import BackendUnavailable
from peftkern.testing.cases import FEATURES, Shape, feature, tensors

Arguments = dict[str, Any]
OPS = ("prefix_attention", "prefix_attention_backward", "soft_prompt_embedding", "soft_prompt_embedding_backward")
NUM_GRADIENTS = len(AttentionGradients._fields)
NAMES = {argument.name for op in OPS for argument in getattr(ops, op)._schema.arguments}
#: Perturbations after which some of the calls are other valid calls: fewer queries than keys, another number of
#: tokens, a bias that is broadcast, several prefixes instead of one.
FITTING = re.compile(
    r"\w+: (q: size 2 .*|bias: size 0 .*|prefix_ids: (size 1 .*|one dim more)"
    r"|input_ids: size .*|weight: (size 0 \+ 1|torch\.\w*float.*)|prompt: size .*)"
)


def _attention(name: str) -> Arguments:
    shape, options = feature(name, Shape())
    given = inspect.signature(peftkern.prefix_attention).bind(**tensors(shape, torch.float32), **options)
    given.apply_defaults()
    inputs = AttentionArgs(**{name: given.arguments[name] for name in AttentionArgs._fields})
    return validation.validate_attention(inputs._replace(dropout_seed=None), inputs.dropout_seed)._asdict()


def _calls(op: str) -> dict[str, Arguments]:
    """Valid calls of an op by name, without the plan."""
    if op.startswith("soft_prompt"):
        ids, weight = torch.tensor([[0, 3, 7], [1, 1, 2]]), torch.randn(8, 16)[:, :9]
        shared = {"input_ids": ids, "weight": weight, "prompt": torch.randn(4, 9), "prompt_ids": None}
        calls = {
            "shared": shared,
            "bank": {**shared, "prompt": torch.randn(3, 4, 9), "prompt_ids": torch.tensor([2, 0])},
        }
        if op.endswith("backward"):
            calls = {
                name: {"dout": torch.randn(2, 7, 9), **call, "needs": [True, True]} for name, call in calls.items()
            }
        return calls
    calls = {name: _attention(name) for name in FEATURES}
    if op.endswith("backward"):
        for name, call in calls.items():
            out, lse = ops.prefix_attention(*call.values(), "cpu")
            needs = [x is not None for x in list(call.values())[:NUM_GRADIENTS]]
            results = {"dout": torch.randn_like(out), "dlse": torch.randn_like(lse), "out": out, "lse": lse}
            calls[name] = {**results, **call, "needs": needs}
    return calls


def _perturbed(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Versions of a tensor that do not fit the call."""
    for dim, size in enumerate(x.shape):
        for change in (-1, 1) if size else (1,):
            sizes = [n + change if i == dim else n for i, n in enumerate(x.shape)]
            other = torch.zeros(sizes, dtype=x.dtype)
            kept = tuple(slice(0, min(a, b)) for a, b in zip(sizes, x.shape, strict=True))
            other[kept] = x[kept]
            yield f"size {dim} {'+' if change > 0 else '-'} 1", other
    yield "one dim more", x.unsqueeze(0).expand(2, *x.shape)
    if x.dim():
        yield "one dim less", x.select(0, 0) if x.shape[0] else x.flatten(0, 1) if x.dim() > 1 else x.sum(0)
    for dtype in (torch.float16, torch.bfloat16, torch.int16, torch.complex64):
        yield str(dtype), x.to(dtype)
    yield "meta", x.to("meta")


def _strided(x: Tensor) -> Tensor:
    """The same values with stride 2 along the last dim."""
    return torch.stack([x, x], -1)[..., 0]


NEEDS_UNIT_STRIDE = ("q", "k", "v", "prefix_k", "prefix_v", "dout", "out")


def _wrong_calls(op: str) -> Iterator[tuple[str, Arguments]]:
    """(description, arguments) of calls that must be refused, and of those that :data:`FITTING` excepts."""
    for name, call in _calls(op).items():
        for argument, x in call.items():
            if not isinstance(x, Tensor):
                continue
            for what, other in _perturbed(x):
                yield f"{name}: {argument}: {what}", {**call, argument: other}
            if argument in NEEDS_UNIT_STRIDE and x.numel() and x.shape[-1] > 1:
                yield f"{name}: {argument}: strides", {**call, argument: _strided(x)}
        if "needs" in call:
            yield f"{name}: needs: one more", {**call, "needs": [*call["needs"], True]}
            yield f"{name}: needs: one less", {**call, "needs": call["needs"][:-1]}


def _wrong_values(op: str) -> Iterator[tuple[str, Arguments]]:
    calls = _calls(op)

    def wrong(name: str, **changes: Any) -> tuple[str, Arguments]:
        return f"{name}: {', '.join(f'{n}: {x}' for n, x in changes.items())}", {**calls[name], **changes}

    if op.startswith("soft_prompt"):
        for name in calls:
            yield wrong(name, input_ids=torch.tensor([[0, 3, 8], [1, 1, 2]]))
            yield wrong(name, input_ids=torch.tensor([[0, -1, 7], [1, 1, 2]]))
        yield wrong("bank", prompt_ids=torch.tensor([3, 0]))
        yield wrong("bank", prompt_ids=torch.tensor([-1, 0]))
        return
    for offsets in ([0, 2, 2, 8], [0, 5, 2, 7], [-1, 2, 2, 7], [1, 2, 2, 7], [0, 2, 2, 6]):
        yield wrong("packed", cu_seqlens=torch.tensor(offsets))
    for prefix_id in (3, -2, 2**40):
        yield wrong("bank", prefix_ids=torch.tensor([prefix_id, 0]))
        yield wrong("several_prefixes", prefix_ids=torch.tensor([[0, prefix_id], [0, 0]]))
    for length in (6, -1, 2**40):
        yield wrong("ragged_bank", prefix_lens=torch.tensor([5, length, 3]))
        yield wrong("packed_several", prefix_lens=torch.tensor([5, length]))
    for start in (-1, 7, 2**40):
        yield wrong("packed_shared", prefix_starts=torch.tensor([start]))
    numbers = {
        "scale": (float("inf"), float("nan")), "window": (0, -1), "softcap": (-1.0, float("nan"), float("inf")),
        "dropout_p": (-0.1, 1.0, 1.5, float("nan"), 0.5), "max_seqlen": (-1, 3), "prefix_start": (0,),
        "max_prefix_len": (4,),
    }  # fmt: skip
    for name, values in numbers.items():
        for value in values:
            yield wrong("plain", **{name: value})
    yield wrong("dropout", dropout_seed=None)
    yield wrong("packed", max_seqlen=4)


def _run(op: str, backend: str, wrong: Callable[[str], Iterator[tuple[str, Arguments]]]) -> None:
    """Run wrong calls of an op, announcing each, and end with the number of those that were not refused by name."""
    faulthandler.disable()
    run, failed, count = getattr(ops, op), 0, 0
    for what, arguments in wrong(op):
        print(what, flush=True)
        count += 1
        try:
            run(*arguments.values(), backend)
        except ValueError as error:
            if re.match(r"\w+", str(error))[0] in NAMES and ": expected " in str(error):
                continue
            print(f"  ValueError: {error}", flush=True)
        except Exception as error:
            print(f"  {type(error).__name__}: {error}".partition("\n")[0], flush=True)
        else:
            if FITTING.fullmatch(what):
                continue
            print("  not refused", flush=True)
        failed += 1
    print(f"{failed} of {count} failed", flush=True)


def _check(op: str, backend: str, wrong: str) -> None:
    script = f"from tests import test_op_checks as t; t._run({op!r}, {backend!r}, t.{wrong})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"the process ended with {done.returncode} in the call {lines[-1]}\n{done.stderr}"
    unrefused = [f"{lines[i - 1]}:{line}" for i, line in enumerate(lines) if line.startswith("  ")]
    assert lines[-1].startswith("0 of "), "\n".join([lines[-1], *unrefused[:40]])
    assert int(lines[-1].split()[2]) >= 6


BACKENDS = [name for name in backends.available_backends() if name in ("cpu", "reference")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_tensors_that_do_not_fit_are_refused(op, backend):
    _check(op, backend, "_wrong_calls")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_values_out_of_range_are_refused(op, backend):
    _check(op, backend, "_wrong_values")


@pytest.mark.parametrize("op", OPS)
def test_the_calls_that_are_perturbed_are_valid(op):
    for arguments in _calls(op).values():
        getattr(ops, op)(*arguments.values(), "cpu")


def _all_devices(op: str, plan: str) -> None:
    getattr(ops, op)(*next(iter(_calls(op).values())).values(), plan)


@pytest.mark.parametrize("op", OPS)
def test_a_plan_for_another_device_is_refused(op):
    with pytest.raises(BackendUnavailable, match="plan='cuda' cannot run"):
        _all_devices(op, "cuda")


@pytest.mark.parametrize("plan", ["nonsense", "auto", "", "cpu/more"])
def test_an_unknown_plan_is_refused(plan):
    with pytest.raises(ValueError, match="plan: expected"):
        _all_devices("prefix_attention", plan)


def test_a_plan_for_other_dtypes_and_head_dims_is_refused():
    for change in ({"dtype": torch.float64}, {"D": 257}):
        args = _attention_of(Shape(D=change.get("D", 8)), change.get("dtype", torch.float32))
        with pytest.raises(BackendUnavailable, match="plan='cpu' cannot run"):
            ops.prefix_attention(*args, "cpu")


def _attention_of(shape: Shape, dtype: torch.dtype) -> AttentionArgs:
    numbers = (0.25, True, None, True, 0.0, 0.0)
    return AttentionArgs(*tensors(shape, dtype).values(), *[None] * 10, *numbers)


def test_a_sparse_tensor_is_refused():
    args = _attention_of(Shape(), torch.float32)
    with pytest.raises(ValueError, match=r"prefix_k: expected a dense tensor"):
        op_checks.check_attention_op(args._replace(prefix_k=args.prefix_k.to_sparse()), "cpu")


def test_shapes_are_checked_while_tracing():
    """A fake tensor with the wrong shape is refused when a graph is made, not when it runs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        args = _attention_of(Shape(), torch.float32)
        with pytest.raises(ValueError, match=r"v: expected shape"):
            ops.prefix_attention(*args._replace(v=args.v[:, :1]), "cpu")


def test_calls_like_one_seen_before_cost_a_lookup():
    """Each combination of sizes, strides, dtypes and numbers is checked once."""
    args = _attention_of(Shape(S=9), torch.float32)
    ops.prefix_attention(*args, "cpu")
    before = op_checks._check_attention.cache_info()
    for _ in range(5):
        ops.prefix_attention(*args, "cpu")
    after = op_checks._check_attention.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 5)
    assert after.maxsize is not None, "the cache has no bound"
