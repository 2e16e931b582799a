# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels on calls that hypothesis draws: sizes, layouts, dtypes, features, instruction sets, threads."""

from __future__ import annotations

import functools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from peftkern import native
from peftkern.testing.bounds import check_backend

from ..isas import running_on

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = {"B": (0, 1, 2, 3), "Hkv": (1, 2, 3), "G": (1, 2, 3, 5), "S": (0, 1, 2, 17, 31, 63, 64, 65, 97),
         "P": (0, 1, 7, 47, 48, 49, 130), "D": (1, 3, 8, 16, 20, 40, 64, 80)}  # fmt: skip


def _laid_out(draw, generator: torch.Generator, sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random values in a memory order of its own, cut out of a larger tensor; the last dimension is contiguous."""
    order = [*draw(st.permutations(range(len(sizes) - 1))), len(sizes) - 1]
    before, after = (draw(st.tuples(*[st.integers(0, 2)] * len(sizes))) for _ in range(2))
    memory = torch.randn([sizes[i] + before[i] + after[i] for i in order], generator=generator).to(dtype)
    x = memory.permute([order.index(i) for i in range(len(sizes))])
    return x[tuple(slice(b, b + n) for b, n in zip(before, sizes, strict=True))]


@st.composite
def calls(draw):
    """(tensors, options) of one prefix attention."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    size = {name: draw(st.sampled_from(values)) for name, values in SIZES.items()}
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(["batch", "packed", "cached"]))
    batch, q_len = 1 if kind == "packed" else size["B"], size["S"]
    kv_len = q_len + draw(st.sampled_from((1, 30, 100))) if kind == "cached" else q_len
    bank = draw(st.sampled_from((None, None, 1, 3)))
    heads, prefix_len = size["Hkv"] * size["G"], size["P"]
    laid_out = functools.partial(_laid_out, draw, generator)

    kv = (batch, size["Hkv"], kv_len, size["D"])
    prefix = (*(() if bank is None else (bank,)), size["Hkv"], prefix_len, size["D"])
    prefix_dtype = draw(st.sampled_from((dtype, torch.float32)))
    tensors = {
        "q": laid_out((batch, heads, q_len, size["D"]), dtype), "k": laid_out(kv, dtype), "v": laid_out(kv, dtype),
        "prefix_k": laid_out(prefix, prefix_dtype), "prefix_v": laid_out(prefix, prefix_dtype),
    }  # fmt: skip

    def maybe(values):
        return draw(st.one_of(st.none(), values))

    def floats(*sizes: int) -> st.SearchStrategy:
        """Every dim as it is, or 1."""
        return st.tuples(*(st.sampled_from((1, n)) for n in sizes)).map(lambda shape: laid_out(shape, torch.float32))

    options = {
        "causal": draw(st.booleans()),
        "scale": maybe(st.sampled_from([x * size["D"] ** -0.5 for x in (0.3, 1.5, -1.0)])),
        "window": maybe(st.integers(1, 140)), "prefix_in_window": draw(st.booleans()),
        "softcap": maybe(st.sampled_from((0.5, 5.0, 50.0))), "bias": maybe(floats(batch, heads, q_len, kv_len)),
        "prefix_bias": maybe(floats(heads, prefix_len)),
    }  # fmt: skip
    for name in ("sinks", "gate"):
        options[name] = maybe(st.just(torch.randn(heads, generator=generator)))
    if draw(st.booleans()):
        options["key_mask"] = torch.rand(batch, kv_len, generator=generator) < draw(st.sampled_from((0.1, 0.9)))
    if draw(st.integers(0, 3)) == 0:
        options |= {"dropout_p": draw(st.sampled_from((0.1, 0.5))), "dropout_seed": draw(st.integers(0, 2**63 - 1))}
    sequences = batch
    index = draw(st.sampled_from((torch.int32, torch.int64)))
    if kind == "packed":
        cuts = sorted(draw(st.lists(st.integers(0, q_len), max_size=4)))
        options["cu_seqlens"] = torch.tensor([0, *cuts, q_len], dtype=index)
        sequences = len(cuts) + 1
    if bank is not None:
        options["prefix_ids"] = torch.randint(-1, bank, (sequences,), generator=generator, dtype=index)
        if draw(st.booleans()):
            options["prefix_lens"] = torch.randint(0, prefix_len + 1, (bank,), generator=generator, dtype=index)
    return tensors, options


def _check(isa: str, threads: int, call) -> None:
    tensors, options = call
    torch.set_num_threads(threads)
    with running_on(isa) as asked:
        check_backend("cpu", tensors, options, dlse=True)
    assert set(asked) <= {native.abi.ISAS[isa]}, "native calls ran on other instruction sets"


# A failing call is small as it is, and smaller ones take minutes to find.
PHASES = [hypothesis.Phase.explicit, hypothesis.Phase.generate]


@pytest.mark.parametrize("isa", native.cpu.available_isas())
@hypothesis.given(threads=st.integers(1, 3), call=calls())
@hypothesis.settings(max_examples=40, phases=PHASES)
def test_any_call(isa, threads, call):
    _check(isa, threads, call)


@pytest.mark.slow
@pytest.mark.parametrize("isa", native.cpu.available_isas())
@hypothesis.given(threads=st.integers(1, 3), call=calls())
@hypothesis.settings(max_examples=500, phases=PHASES)
def test_many_more_calls(isa, threads, call):
    _check(isa, threads, call)
