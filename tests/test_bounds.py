# SPDX-License-Identifier: Apache-2.0
"""The error bound can fail: planted faults of the size that a real bug has are caught."""

from __future__ import annotations

import contextlib

import pytest
import torch

from peftkern.backends import reference

from .bounds import check_backend
from .cases import Shape, tensors


def _more(field, factor):
    def fault(gradients):
        return gradients._replace(**{field: getattr(gradients, field) * factor})

    return fault


FAULTS = {
    "dq of 3 % more": _more("dq", 1.03),
    "dprefix_v of 1 % more": _more("dprefix_v", 1.01),
    "dk and dv exchanged": lambda g: g._replace(dk=g.dv, dv=g.dk),
    "last prefix row dropped": lambda g: g._replace(dprefix_k=g.dprefix_k.index_fill(1, torch.tensor([4]), 0.0)),
    "one element of dv is NaN": lambda g: g._replace(dv=g.dv.masked_fill(g.dv == g.dv.max(), torch.nan)),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_gradient_is_caught(fault, dtype, monkeypatch):
    backward = reference.prefix_attention_backward
    monkeypatch.setattr(reference, "prefix_attention_backward", lambda *args: fault(backward(*args)))
    with pytest.raises(AssertionError, match="exceeds"):
        check_backend("reference", tensors(Shape(B=4, S=40), dtype, prefix_dtype=torch.float32), {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_output_is_caught(dtype, monkeypatch):
    forward = reference.prefix_attention

    def last_query_sees_one_key_less(args):
        out, lse = forward(args)
        short, _ = forward(args._replace(k=args.k[:, :, :-1], v=args.v[:, :, :-1], q=args.q[:, :, :-1]))
        out[:, :, -1] = short[:, :, -1]
        return out, lse

    monkeypatch.setattr(reference, "prefix_attention", last_query_sees_one_key_less)
    with pytest.raises(AssertionError, match="out: error"):
        check_backend("reference", tensors(Shape(), dtype), {}, backward=False)


@pytest.mark.parametrize(("roundings", "caught"), [(0.9, False), (3.0, True)])
def test_where_gradients_cancel_a_rounding_of_delta_passes_and_three_do_not(roundings, caught, monkeypatch):
    """Every query sees one key: dq is 0, and a backward that is wrong in delta = rowsum(out * dout) shows it."""
    backward = reference.prefix_attention_backward

    def rounded(dout, dlse, out, lse, args, needs):
        gradients = backward(dout, dlse, out, lse, args, needs)
        delta = torch.finfo(torch.float32).eps * (out * dout).abs().sum(-1, keepdim=True)
        keys = args.k.repeat_interleave(args.q.shape[1] // args.k.shape[1], 1)
        return gradients._replace(dq=gradients.dq - roundings * delta * args.scale * keys)

    monkeypatch.setattr(reference, "prefix_attention_backward", rounded)
    with pytest.raises(AssertionError, match="dq: error") if caught else contextlib.nullcontext():
        check_backend("reference", tensors(Shape(S=1, P=0), torch.float32), {})
