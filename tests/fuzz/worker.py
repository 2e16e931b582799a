# SPDX-License-Identifier: Apache-2.0
"""Runs cases whose names it reads, one a line, and answers with a line of JSON each. It may crash."""

from __future__ import annotations

import faulthandler
import json
import sys
import traceback

import torch
from torch import Tensor

from peftkern import functional, native, reference
from peftkern.testing.bounds import Results, assert_within, errors, roundings_of, run

from ..isas import running_on
from . import cases, guards
from .cases import Case


def check(case: Case) -> None:
    """Runs a case at the start of its pages, then at the end, and compares the results with fp64 and each other.

    Raises:
        AssertionError: if a result exceeds its bound, or depends on where the memory lies.
    """
    torch.set_num_threads(case.threads)
    _check_embedding(case) if case.is_embedding else _check_attention(case)


def _check_attention(case: Case) -> None:
    first, second = (_attention(case, place) for place in ("start", "end"))
    for name, one, two in _pairs(first, second):
        assert torch.equal(one.nan_to_num(1e30), two.nan_to_num(1e30)), f"{name} depends on where the memory lies"
    for one in errors(first, case.tensors, case.options, case.dout, case.dlse, roundings_of("cpu")).values():
        assert_within(one)


def _attention(case: Case, place: guards.Place) -> Results:
    def guarded(x):
        return guards.moved(x, place) if isinstance(x, Tensor) else x

    def attention(**inputs):
        return functional.prefix_attention(**inputs, backend="cpu", return_lse=True)

    tensors, options = ({n: guarded(x) for n, x in xs.items()} for xs in (case.tensors, case.options))
    with guards.allocating(place), running_on(case.isa) as asked:
        got = run(attention, tensors, options, guarded(case.dout), guarded(case.dlse))
    assert set(asked) == {native.abi.ISAS[case.isa]}, f"native calls ran on {asked}"
    for name, before in {**case.tensors, **case.options}.items():
        after = {**tensors, **options}[name]
        if isinstance(before, Tensor):
            assert torch.equal(before, after), f"the call changed {name}"
    return got


def _pairs(first: Results, second: Results) -> list[tuple[str, Tensor, Tensor]]:
    gradients = [(f"d{name}", x, second.gradients[name]) for name, x in first.gradients.items()]
    return [("out", first.out, second.out), ("lse", first.lse, second.lse), *gradients]


def _check_embedding(case: Case) -> None:
    for place in ("start", "end"):
        tensors = {n: guards.moved(x, place).requires_grad_(case.dout is not None) for n, x in case.tensors.items()}
        options = {n: guards.moved(x, place) for n, x in case.options.items()}
        exact = {n: x.double().requires_grad_() for n, x in case.tensors.items()}
        prompt = case.tensors["prompt"].to(case.tensors["weight"].dtype).double()
        exact["prompt"] = prompt.requires_grad_()
        with guards.allocating(place):
            out = functional.soft_prompt_embedding(**tensors, **options, backend="cpu")
            want = reference.soft_prompt_embedding(**exact, **{"prompt_ids": None, **case.options})
            assert torch.equal(out.double(), want), "the embeddings are not those of their tokens"
            if case.dout is None:
                continue
            got = torch.autograd.grad(out, list(tensors.values()), guards.moved(case.dout, place))
        wanted = torch.autograd.grad(want, [exact[name] for name in tensors], case.dout.double())
        for name, x, y in zip(tensors, got, wanted, strict=True):
            tolerance = max(1e-5, torch.finfo(x.dtype).eps)
            difference = (x.double() - y).abs().max().item() if x.numel() else 0.0
            assert difference <= tolerance * max(1.0, y.abs().max().item() if y.numel() else 0.0), (
                f"d{name} differs by {difference:.1e}"
            )


def main() -> None:
    faulthandler.enable()
    isas = native.cpu.available_isas()
    for line in sys.stdin:
        case = cases.draw(line.strip(), isas)
        print(json.dumps({"start": str(case)}), flush=True)
        try:
            check(case)
            print(json.dumps({"passed": case.name}), flush=True)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            if not isinstance(error, AssertionError):
                message = traceback.format_exc()
            print(json.dumps({"failed": message}), flush=True)


if __name__ == "__main__":
    main()
