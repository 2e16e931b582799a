# SPDX-License-Identifier: Apache-2.0
"""Fused Triton kernels for CUDA and ROCm: forward and backward over [prefix blocks | sequence blocks].

With TRITON_INTERPRET=1 in the environment the kernels run in Triton's interpreter, on CPU tensors too: for tests, and
by name only (``backend="triton"``).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ...arguments import AttentionArgs, AttentionGradients, Call, allocate_gradients, allocate_outputs
from . import autotune
from .arguments import Matrices, Stats, dense, flags_of, options_of, sizes_of
from .tiles import ARCHITECTURES, INTERPRETER, MAX_HEAD_DIM, Direction, Tile, cuda_architecture, tile

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = _HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(call: Call) -> list[str]:
    return limits(call) + _lacks(call.device)


def limits(call: Call) -> list[str]:
    """What no machine can run here."""
    reasons = []
    if call.dtype not in _DTYPES:
        reasons.append(f"{_name(call.dtype)} is not supported: use fp32, fp16 or bf16, or backend='reference'")
    if call.op == "prefix_attention" and not 1 <= call.q_shape[-1] <= MAX_HEAD_DIM:
        reasons.append(f"head dim {call.q_shape[-1]} is not within 1 to {MAX_HEAD_DIM}: use backend='reference'")
    return reasons


def _lacks(device: torch.device) -> list[str]:
    """What this machine and ``device`` lack."""
    if not _HAS_TRITON:
        return ["the package triton is not installed: `pip install triton`"]
    if device.type == "cpu":
        return [] if _INTERPRETED else ["CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1, for tests"]
    if device.type != "cuda":
        return [f"no kernels for device type {device.type!r}"]
    if not torch.cuda.is_available():
        return ["torch sees no GPU"]
    if (arch := architecture(device)) not in ARCHITECTURES:
        if arch.startswith("sm_"):
            return [f"{arch} is older than sm_80, the first that Triton compiles for: use backend='reference'"]
        return [f"no tiles for {arch}, only for {', '.join(ARCHITECTURES)} and what is compatible with them"]
    return []


def architecture(device: torch.device) -> str:
    """The row of the tile table that serves a device."""
    if _INTERPRETED:
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return cuda_architecture(properties.major, properties.minor)


def _processors(device: torch.device) -> int:
    return 4 if _INTERPRETED else int(torch.cuda.get_device_properties(device).multi_processor_count)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any) -> None:
    if all(grid):
        if _INTERPRETED:
            from .interpreter import repair

            repair()
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](*arguments, **constants)


class _Attention:
    """One call as its kernels see it."""

    def __init__(self, args: AttentionArgs) -> None:
        self.device, self.dtype = args.q.device, args.q.dtype
        self.q, self.k, self.v = (Matrices.of(x) for x in (args.q, args.k, args.v))
        self.prefix = Matrices.of(args.prefix_k), Matrices.of(args.prefix_v)
        self.bank = args.prefix_k.shape[0] if args.prefix_k.dim() == 4 else 1
        self.sizes, self.options, self.flags = sizes_of(args), options_of(args), flags_of(args)
        self.scale, self.arch = args.scale, architecture(args.q.device)
        self._tiles: dict[Direction, Tile] = {}

    def round_prefix(self) -> None:
        """Round a prefix wider than q to q's dtype, once and not by each block of rows, which reads it in tiles that
        are made for that dtype."""
        if self.prefix[0].ptr.dtype.itemsize > self.dtype.itemsize:
            prefix_k, prefix_v = (Matrices.of(x.ptr.to(self.dtype)) for x in self.prefix)
            self.prefix = prefix_k, prefix_v

    def tile(self, direction: Direction) -> Tile:
        """The table's, or the tuned one; the same at each use in one call."""
        if direction not in self._tiles:
            block = self._table_tile(direction)
            if autotune.requested():
                block = autotune.chosen(direction, self._kind(direction), block)
            self._tiles[direction] = block
        return self._tiles[direction]

    def _table_tile(self, direction: Direction) -> Tile:
        return tile(self.arch, direction, self.flags.HEAD_DIM, self.dtype)

    def _kind(self, direction: Direction) -> str:
        """What calls share a tuned tile."""
        sizes = self.sizes
        tokens = {"D": self.flags.HEAD_DIM, "S": sizes.q_len, "T": sizes.kv_len, "P": sizes.prefix_len}
        options = [name for name, value in self.options._asdict().items() if value is not None]
        options += ["causal"] * self.flags.IS_CAUSAL + ["fp32_prefix"] * (self.prefix[0].ptr.dtype != self.dtype)
        tokens["H"] = sizes.batch * sizes.num_heads
        return autotune.key(self.arch, direction, self.dtype, tokens, tuple(options))

    def tune(self, direction: Direction, run: Callable[[], object]) -> None:
        """With PEFTKERN_AUTOTUNE=1 and a kind of call that is not known yet, time ``run`` with several tiles."""
        if autotune.enabled() and all(self.q.ptr.shape):
            autotune.tune(direction, self._kind(direction), self._table_tile(direction), run)

    def row_programs(self, direction: Direction) -> int:
        """One per block of rows, head and batch entry."""
        return _blocks(self.sizes.q_len, self.tile(direction).BLOCK_M) * self.sizes.num_heads * self.sizes.batch

    def decodes(self) -> bool:
        """Whether the kernels for few queries take this call."""
        queries, keys = self.sizes.q_len, self.sizes.prefix_len + self.sizes.kv_len
        return (
            1 <= queries <= _DECODE_QUERIES and keys >= _DECODE_KEYS
            and self.options.cu_seqlens is None and self.options.seed is None
        )  # fmt: skip

    def launch(self, kernel: Any, block: Direction | Tile, programs: int, *arguments: Any, **constants: Any) -> None:
        flags = {name: value for name, value in self.flags._asdict().items() if name in kernel.arg_names}
        block = block if isinstance(block, Tile) else self.tile(block)
        _launch(kernel, (programs,), self.device, *arguments, **constants, **flags, **block._asdict())


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def prefix_attention(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    from .kernels.forward import _prefix_attention_fwd_kernel

    out, lse = allocate_outputs(args)
    call = _Attention(args)
    if not call.decodes():  # which reads a prefix once, and has no time for a bank that few samples use
        call.round_prefix()
    call.tune("decode" if call.decodes() else "forward", lambda: prefix_attention(args))
    if call.decodes():
        _decode(call, out, lse)
        return out, lse
    call.launch(
        _prefix_attention_fwd_kernel, "forward", call.row_programs("forward"),
        call.q, call.k, call.v, *call.prefix, Matrices.of(out), lse, call.options, call.sizes, call.scale,
    )  # fmt: skip
    return out, lse


def _decode(call: _Attention, out: Tensor, lse: Tensor) -> None:
    """Partial softmaxes over splits of the prefix and of each sample's keys, then all joined in order."""
    from .kernels import decode

    sizes, options, flags = call.sizes, call.options, call.flags
    key_heads, rows = sizes.num_heads // sizes.group, sizes.group * sizes.q_len

    def part(tokens: int, rows: int, samples: int) -> tuple[Tile, int, int, int]:
        """(tile, programs per split, splits, tokens of a split)."""
        block = call.tile("decode")
        block = block._replace(BLOCK_M=min(block.BLOCK_M, max(16, 1 << (rows - 1).bit_length())))
        programs = _blocks(rows, block.BLOCK_M) * key_heads * samples
        wanted = _blocks(2 * _processors(call.device), max(1, programs))
        blocks = max(_blocks(_blocks(tokens, block.BLOCK_N), wanted), _SPLIT_BLOCKS)
        return block, programs, _blocks(tokens, blocks * block.BLOCK_N), blocks * block.BLOCK_N

    prefix_tile, prefix_programs, prefix_splits, prefix_size = part(sizes.prefix_len, rows * sizes.batch, 1)
    seq_tile, seq_programs, seq_splits, seq_size = part(sizes.kv_len, rows, sizes.batch)
    splits = prefix_splits + seq_splits
    partial = lse.new_empty(splits, *lse.shape, flags.HEAD_DIM)
    partial_lse = lse.new_empty(splits, *lse.shape)
    call.launch(
        decode._prefix_attention_decode_prefix_kernel, prefix_tile, prefix_programs * prefix_splits,
        call.q, *call.prefix, partial, partial_lse, options, sizes, call.scale, prefix_splits, prefix_size,
    )  # fmt: skip
    call.launch(
        decode._prefix_attention_decode_sequence_kernel, seq_tile, seq_programs * seq_splits,
        call.q, call.k, call.v, partial, partial_lse, options, sizes, call.scale, prefix_splits, seq_splits, seq_size,
    )  # fmt: skip
    _launch(
        decode._prefix_attention_decode_combine_kernel, (lse.numel(),), call.device,
        partial, partial_lse, Matrices.of(out), lse, options, sizes, prefix_splits, splits,
        HEAD_DIM=flags.HEAD_DIM, BLOCK_D=flags.BLOCK_D, BLOCK_N=16,
    )  # fmt: skip


def prefix_attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, args: AttentionArgs, needs: list[bool]
) -> AttentionGradients:
    from .kernels import backward

    gradients = allocate_gradients(args, needs)
    needed = dict(zip(AttentionGradients._fields, needs, strict=True))
    call = _Attention(args)
    call.round_prefix()
    for direction, names in _BACKWARD.items():
        only = [need and name in names for name, need in needed.items()]
        if any(only):
            call.tune(direction, functools.partial(prefix_attention_backward, dout, dlse, out, lse, args, only))
    douts = Matrices.of(dout)
    gated = args.gate is not None
    exact = gated or any(needed[name] for name in ("dsinks", "dbias", "dprefix_bias"))
    per_row = [lse.new_empty(lse.shape) for _ in range(4 if gated else 2)]
    stats = Stats(per_row[0], per_row[1], *(per_row[2:] or (None, None)))
    options, sizes, scale = call.options, call.sizes, call.scale
    call.launch(
        backward._prefix_attention_bwd_prepare_kernel, "forward", call.row_programs("forward"),
        call.q, call.k, call.v, *call.prefix, None if exact else Matrices.of(out), douts, lse.contiguous(),
        dense(dlse), stats, options, sizes, scale,
    )  # fmt: skip
    if needed["dq"]:
        call.launch(
            backward._prefix_attention_bwd_dq_kernel, "dq", call.row_programs("dq"),
            call.q, call.k, call.v, *call.prefix, douts, None, Matrices.of(gradients.dq), stats, options, sizes,
            scale,
        )  # fmt: skip
    if needed["dk"] or needed["dv"]:
        targets = (Matrices.of(x) if x.numel() else None for x in (gradients.dk, gradients.dv))
        key_heads = sizes.num_heads // sizes.group
        call.launch(
            backward._prefix_attention_bwd_dkv_kernel, "dkv",
            _blocks(sizes.kv_len, call.tile("dkv").BLOCK_N) * key_heads * sizes.batch,
            call.q, call.k, call.v, douts, *targets, stats, options, sizes, scale,
        )  # fmt: skip
    if needed["dprefix_k"] or needed["dprefix_v"] or needed["dprefix_bias"]:
        _prefix_gradients(call, douts, stats, gradients)
    if gradients.dbias.numel():
        block_m, block_n = call.tile("bias")[:2]
        entries, heads, rows, keys = gradients.dbias.shape
        call.launch(
            backward._prefix_attention_bwd_bias_kernel, "bias",
            _blocks(rows, block_m) * _blocks(keys, block_n) * heads * entries,
            call.q, call.k, call.v, douts, gradients.dbias, stats, options, sizes, scale, entries, heads, rows, keys,
        )  # fmt: skip
    if gradients.dsinks.numel():
        assert args.sinks is not None
        weights = torch.exp2(args.sinks[:, None] * _LOG2E - stats.lse)
        torch.sum(weights * stats.shift, (0, 2), out=gradients.dsinks)
    if gradients.dgate.numel():
        assert args.gate is not None
        assert stats.prefix_shift is not None
        gate = torch.tanh(args.gate)
        torch.mul(stats.prefix_shift.sum((0, 2)), gate * gate - 1, out=gradients.dgate)
    return gradients


def _prefix_gradients(call: _Attention, dout: Matrices, stats: Stats, gradients: AttentionGradients) -> None:
    """Partial sums over splits of the rows, fixed by the sizes and the device, then their sum in order."""
    from .kernels import backward

    sizes, head_dim, block = call.sizes, call.flags.HEAD_DIM, call.tile("prefix")
    units = _blocks(sizes.q_len, block.BLOCK_M) * sizes.batch
    matrices = call.bank * sizes.num_heads
    tiles = _blocks(sizes.prefix_len, block.BLOCK_N) * matrices
    splits = max(1, min(units, _blocks(2 * _processors(call.device), max(1, tiles))))
    shape = (splits, call.bank, sizes.num_heads, sizes.prefix_len)
    dk, dv = stats.lse.new_empty(2, *shape, head_dim)
    dbias = stats.lse.new_empty(shape) if gradients.dprefix_bias.numel() else None
    call.launch(
        backward._prefix_attention_bwd_prefix_kernel, "prefix", tiles * splits,
        call.q, *call.prefix, dout, dk, dv, dbias, stats, call.options, sizes, call.scale, call.bank, units,
        _blocks(units, splits),
    )  # fmt: skip
    inner = sizes.prefix_len * head_dim
    for partial, total in ((dk, gradients.dprefix_k), (dv, gradients.dprefix_v)):
        _launch(
            backward._sum_partials_kernel, (_blocks(total.numel(), _WIDTH),), call.device,
            partial, total, splits, matrices * inner, sizes.group, inner, total.numel(), BLOCK=_WIDTH,
        )  # fmt: skip
    if dbias is not None:
        gradients.dprefix_bias.copy_(dbias.sum((0, 1)).sum_to_size(gradients.dprefix_bias.shape))


# What decoding is for: few queries, and so many keys that cutting them into splits pays two more launches.
_DECODE_QUERIES, _DECODE_KEYS = 16, 1024
_SPLIT_BLOCKS = 2  # blocks of keys in a split, at least
# the gradients that each kernel of the backward is for
_BACKWARD: dict[Direction, tuple[str, ...]] = {
    "dq": ("dq",), "dkv": ("dk", "dv"), "prefix": ("dprefix_k", "dprefix_v", "dprefix_bias"), "bias": ("dbias",),
}  # fmt: skip
_LOG2E = 1.4426950408889634
_WIDTH = 1024  # elements that a program of an elementwise kernel handles


def soft_prompt_embedding(input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None) -> Tensor:
    from .kernels.embedding import _soft_prompt_embedding_fwd_kernel

    batch, seq_len = input_ids.shape
    vocabulary, width = weight.shape
    length = prompt.shape[-2] + seq_len
    out = weight.new_empty(batch, length, width)
    prompt = prompt if prompt.dim() == 3 else prompt[None]
    _launch(
        _soft_prompt_embedding_fwd_kernel, (batch * length, _blocks(width, _WIDTH)), weight.device,
        input_ids, *input_ids.stride(), weight, *weight.stride(), prompt, *prompt.stride(), dense(prompt_ids),
        out, length, length - seq_len, vocabulary, width, BLOCK=_WIDTH,
    )  # fmt: skip
    return out


def soft_prompt_embedding_backward(
    dout: Tensor,
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    prompt_ids: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    from .kernels.embedding import _soft_prompt_embedding_bwd_kernel

    prefix_len, width = prompt.shape[-2:]
    dweight = weight.new_zeros(weight.shape if needs[0] else 0, dtype=torch.float32)
    dprompt = prompt.new_empty(prompt.shape if needs[1] else 0, dtype=torch.float32)
    if needs[0]:
        rows = dout[:, prefix_len:].float().flatten(0, 1)
        dweight.index_put_((input_ids.flatten(),), rows, accumulate=True)
    if needs[1] and dprompt.numel():
        _launch(
            _soft_prompt_embedding_bwd_kernel, (dprompt.numel() // width, _blocks(width, _WIDTH)), dout.device,
            dout, *dout.stride()[:2], dense(prompt_ids), dprompt, dout.shape[0], prefix_len, width,
            BLOCK=_WIDTH,
        )  # fmt: skip
    return dweight, dprompt


# TEMPORARY until the Triton room lands
from ..base import Backend as _B  # noqa: E402
from ..base import Plan as _P
from ..base import PrefixKernels as _K
from ..base import Refusal as _R
from ..cost import model as _m  # noqa: E402


class TritonPlan(_P):
    name = "triton"

    def prefix_attention(self, args):
        return prefix_attention(args)

    def prefix_attention_backward(self, *a):
        return prefix_attention_backward(*a)

    def soft_prompt_embedding(self, *a):
        return soft_prompt_embedding(*a)

    def soft_prompt_embedding_backward(self, *a):
        return soft_prompt_embedding_backward(*a)


class TritonBackend(_B):
    name = "triton"

    def plan(self, call):
        r = tuple(why_not(call))
        return _R(r, call.device.type == "cpu" and not _INTERPRETED) if r else TritonPlan()

    def limits(self, call):
        return limits(call)

    def restore(self, choices):
        return TritonPlan()

    def cost(self, call, machine):
        if call.device.type == "cpu":
            return None
        if call.op == "soft_prompt_embedding":
            return _m.embedding_passes(call, "triton")
        x = _m.sizes_of(call)
        kernels = 3 if 1 <= x.queries <= 16 and x.keys + x.prefix >= 1024 else 1
        passes = _m.attention_passes(call, "triton", kernels, 6, 3.5)
        if call.needs_grad and _m.recomputes_softmax(call):
            passes.append(_m.softmax_sums_pass(call, "triton"))
        return passes


class TritonPrefixKernels(_K):
    name, title = "triton", "Triton"
    attention = TritonPlan()

    def merge_prefix(self, args, part_out, part_lse):
        from . import prefix_kernels as p

        return p.merge_prefix(args, part_out, part_lse)

    def merge_prefix_backward(self, *a):
        from . import prefix_kernels as p

        return p.merge_prefix_backward(*a)

    def concat_prefix(self, args):
        from . import prefix_kernels as p

        return p.lay_slot(args)

    def sum_prefix_gradient(self, *a):
        from . import prefix_kernels as p

        return p.sum_slot(*a)
