# SPDX-License-Identifier: Apache-2.0
"""Calls of the C ABI in a file, with the reference's answers, for ``replay.cpp``."""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from peftkern import functional, native
from peftkern.arguments import AttentionArgs
from peftkern.backends import plan_named
from peftkern.testing.bounds import DIFFERENTIABLE
from peftkern.testing.cases import FEATURES, Shape, feature, tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_REFERENCE = plan_named("reference")
_OPS = ("prefix_attention", "prefix_attention_backward", "soft_prompt_embedding", "soft_prompt_embedding_backward")


def _bytes(x: Tensor) -> bytes:
    """From the first element to the last; what lies between the rows of a slice is kept."""
    if x.numel() == 0:
        return b""
    count = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return ctypes.string_at(x.data_ptr(), count * x.element_size())


def _tolerance(x: Tensor) -> float:
    """A kernel of another instruction set rounds differently: 2e-5 of the largest value, or two roundings of it."""
    finite = x[x.isfinite()].abs()
    return max(2e-5, 2 * torch.finfo(x.dtype).eps) * (finite.max().item() if finite.numel() else 0.0)


def _with_bank(args: AttentionArgs, rows: Tensor | None) -> AttentionArgs:
    """The call with a bank of the tokens that ``rows`` names (``prefix_rows``), for the reference."""
    if rows is None:
        return args
    entries, places = rows.unbind(2)

    def read(bank: Tensor, sequence: Tensor) -> Tensor:
        of_sequence = sequence[0].transpose(0, 1)[places.clamp(max=sequence.shape[2] - 1)].float()
        if not bank.shape[0]:
            return of_sequence.transpose(1, 2)
        of_bank = bank[entries.clamp(min=0), :, places.clamp(max=bank.shape[2] - 1)]
        return torch.where((entries < 0)[:, :, None, None], of_sequence, of_bank).transpose(1, 2)

    return args._replace(prefix_k=read(args.prefix_k, args.k), prefix_v=read(args.prefix_v, args.v))


class Recorder:
    """Stands in for the native library: keeps every call and answers it with the reference."""

    def __init__(self) -> None:
        self.calls: list[bytes] = []
        self.name = ""

    def _native(self, op: str, call: bytes, inputs: list[Tensor], outputs: list[tuple[Tensor, Tensor]]) -> None:
        words = struct.unpack(f"={len(call) // 8}q", call)
        pieces = [(x, _bytes(x), -1, 0.0) for x in inputs]
        for x, answer in outputs:
            x.copy_(answer)
            pieces.append((x, _bytes(x), native.cpu.DTYPES[x.dtype], _tolerance(x)))
        addresses = {x.data_ptr(): i for i, (x, *_) in enumerate(pieces) if x.numel()}
        found = [(word, pieces[addresses[value]]) for word, value in enumerate(words) if value in addresses]
        assert {id(piece) for _, piece in found} == {id(pieces[i]) for i in addresses.values()}, (
            "a tensor has no field"
        )
        name = f"{self.name} {op}".encode()
        record = struct.pack("=q", len(name)) + name + struct.pack("=qq", _OPS.index(op), len(words)) + call
        record += struct.pack("=q", len(found))
        for word, (_, data, dtype, tolerance) in found:
            record += struct.pack("=qqdq", word, dtype, tolerance, len(data)) + data
        self.calls.append(record)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While it lasts, calls of the cpu backend come here."""
        packed: dict[str, bytes] = {}
        originals = {op: getattr(native.cpu, op) for op in _OPS}

        def pack(op, *args, **kwargs) -> bytes:
            originals[op](*args, **kwargs)
            return packed[op]

        def given(xs) -> list[Tensor]:
            return [x for x in xs if isinstance(x, Tensor) and x.dim()]  # but for the seed, which is a number here

        def forward(args, out, lse, **prepared):
            call = pack(_OPS[0], args, out, lse, **prepared)
            rows = prepared.get("rows")
            answers = _REFERENCE.prefix_attention(_with_bank(args, rows))
            self._native(_OPS[0], call, given([*args, rows]), list(zip((out, lse), answers, strict=True)))

        def backward(dout, dlse, out, lse, args, gradients, **prepared):
            call = pack(_OPS[1], dout, dlse, out, lse, args, gradients, **prepared)
            needs, rows = [bool(x.numel()) for x in gradients], prepared.get("rows")
            answers = _REFERENCE.prefix_attention_backward(dout, dlse, out, lse, _with_bank(args, rows), needs)
            wanted = [(x, y) for x, y, need in zip(gradients, answers, needs, strict=True) if need]
            self._native(_OPS[1], call, given([*args, dout, dlse, out, lse, rows]), wanted)

        def embedding(input_ids, weight, prompt, prompt_ids, out):
            call = pack(_OPS[2], input_ids, weight, prompt, prompt_ids, out)
            answer = _REFERENCE.soft_prompt_embedding(input_ids, weight, prompt, prompt_ids)
            self._native(_OPS[2], call, given([input_ids, weight, prompt, prompt_ids]), [(out, answer)])

        def embedding_backward(dout, input_ids, weight, prompt, prompt_ids, dweight, dprompt):
            call = pack(_OPS[3], dout, input_ids, weight, prompt, prompt_ids, dweight, dprompt)
            answers = _REFERENCE.soft_prompt_embedding_backward(
                dout, input_ids, weight, prompt, prompt_ids, [True, True]
            )
            inputs = given([dout, input_ids, weight, prompt, prompt_ids])
            self._native(_OPS[3], call, inputs, list(zip((dweight, dprompt), answers, strict=True)))

        answers = dict(zip(_OPS, (forward, backward, embedding, embedding_backward), strict=True))
        with mock.patch.multiple(native.cpu, _call=packed.__setitem__, **answers):
            yield

    def attention(self, name: str, shape: Shape, dtype: torch.dtype, options: dict, backward: bool = True) -> None:
        """One call, and its backward with every gradient and a gradient of lse. The prefix is fp32."""
        self.name = f"{name} {shape} {dtype}"
        given = tensors(shape, dtype, torch.float32)
        given.update({n: x for n, x in options.items() if n in DIFFERENTIABLE})
        leaves = {n: x.detach().requires_grad_(backward) for n, x in given.items()}
        numbers = {n: x for n, x in options.items() if n not in leaves}
        with self.listening():
            out, lse = functional.prefix_attention(**leaves, **numbers, backend="cpu", return_lse=True)
            if backward:
                torch.autograd.grad((out, lse), list(leaves.values()), (torch.randn_like(out), torch.randn_like(lse)))

    def embedding(self, dtype: torch.dtype, bank: bool) -> None:
        """Embedding behind a prompt, and its backward."""
        self.name = f"embedding {dtype} {'bank' if bank else 'shared'}"
        weight = torch.randn(11, 24).to(dtype)[:, :19].detach().requires_grad_()
        prompt = (torch.randn(2, 3, 19) if bank else torch.randn(3, 19)).requires_grad_()
        ids = torch.randint(11, (3, 10), dtype=torch.int32)[:, ::2]
        with self.listening():
            out = functional.soft_prompt_embedding(
                ids, weight, prompt, prompt_ids=torch.tensor([1, 1, 0]) if bank else None, backend="cpu"
            )
            torch.autograd.grad(out, (weight, prompt), torch.randn_like(out))

    def write(self, path: Path) -> int:
        """Returns how many calls the file has."""
        path.write_bytes(struct.pack("=q", len(self.calls)) + b"".join(self.calls))
        return len(self.calls)


# More than one block of rows and more than one tile of keys of either part, none of them full.
_SMALL = {"Hq": 4, "Hkv": 2, "S": 37, "P": 50, "D": 20}
_MORE = (
    {"B": 2, "Hq": 6, "Hkv": 2, "S": 100, "P": 70, "D": 40},
    {"B": 1, "Hq": 1, "Hkv": 1, "S": 65, "P": 1, "D": 1},
    {"B": 2, "Hq": 5, "Hkv": 1, "S": 63, "P": 130, "D": 80},
    {"B": 1, "Hq": 2, "Hkv": 2, "S": 17, "P": 7, "D": 256},
)
_DECODE = (
    (Shape(B=3, Hq=4, Hkv=2, S=1, P=1100, D=24, T=1050), {}),
    (Shape(B=4, Hq=2, Hkv=2, S=1, P=60, D=17, T=70, A=3), {"prefix_ids": torch.tensor([2, -1, 0, 2]),
     "prefix_lens": torch.tensor([60, 5, 49]), "window": 75}),
    (Shape(B=20, Hq=8, Hkv=1, S=2, P=9, D=16, T=3), {"key_mask": torch.arange(60).reshape(20, 3) % 2 == 0}),
)  # fmt: skip


def write_calls(path: Path, *, everything: bool = False) -> int:
    """Every feature, forward and backward, decode, embedding. Returns the number of calls.

    The small set takes the three dtypes in turn, ``everything`` each with every feature, on larger shapes too.
    """
    torch.manual_seed(0)
    recorder = Recorder()
    for i, name in enumerate(FEATURES):
        for dtype in DTYPES if everything else (DTYPES[i % 3],):
            for sizes in (_SMALL, *_MORE) if everything else (_SMALL,):
                shape, options = feature(name, Shape(**sizes))
                if shape.T is not None:
                    shape = Shape(**{**vars(shape), "T": shape.S + 30})
                recorder.attention(name, shape, dtype, options)
    long = Shape(B=1, Hq=2, Hkv=1, S=420, P=20, D=16)  # its backward is cut into parts
    for i, dtype in enumerate(DTYPES):
        if everything or i == 1:
            recorder.attention("long", long, dtype, {})
            recorder.attention("empty", Shape(S=0), dtype, {})
        for shape, options in _DECODE if everything else (_DECODE[i],):
            recorder.attention("decode", shape, dtype, options, backward=False)
        for bank in (False, True):
            recorder.embedding(dtype, bank)
    return recorder.write(path)
