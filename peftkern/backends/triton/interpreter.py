# SPDX-License-Identifier: Apache-2.0
"""Corrects bf16 and masks in Triton's interpreter (TRITON_INTERPRET=1), and makes its function calls faster.

The interpreter stores bf16 as uint16. Triton 3.9 then adds, multiplies and takes dot products of those bits as
integers. Here bf16 operations compute in fp32 and round the result to nearest even, and dot products accumulate in
fp32. Comparisons return the type int1: the interpreter gives them the type of their operands, and then a mask
broadcast from a scalar becomes a number.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Builder, _Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


@functools.cache
def repair() -> None:
    """Patch the interpreter, once per process."""
    binary_op, unary_op, ternary_op = _Builder.binary_op, _Builder.unary_op, _Builder.ternary_op
    cast, fp_to_fp, dot = _Builder.cast_impl, _Builder.create_fp_to_fp, _Builder.create_dot

    def repaired_binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if _is_bf16(lhs) and op not in _BITWISE:
            result = _narrow(binary_op(self, _widen(lhs), _widen(rhs), op))
        else:
            result = binary_op(self, lhs, rhs, op)
        return _Handle(result.data, tl.int1) if result.data.dtype == np.bool_ else result

    def repaired_unary_op(self: Any, arg: Any, op: Any) -> Any:
        return _narrow(unary_op(self, _widen(arg), op)) if _is_bf16(arg) else unary_op(self, arg, op)

    def repaired_ternary_op(self: Any, lhs: Any, rhs: Any, other: Any, op: Any) -> Any:
        if op is np.where or not _is_bf16(rhs):
            return ternary_op(self, lhs, rhs, other, op)
        return _narrow(ternary_op(self, _widen(lhs), _widen(rhs), _widen(other), op))

    def repaired_cast(self: Any, src: Any, dst_type: Any) -> Any:
        if _is_bf16(src) and dst_type.scalar != tl.bfloat16:
            return _widen(src) if dst_type.scalar == tl.float32 else cast(self, _widen(src), dst_type)
        if dst_type.scalar == tl.bfloat16 and not _is_bf16(src):
            return _narrow(_Handle(src.data.astype(np.float32), tl.float32))
        return cast(self, src, dst_type)

    def repaired_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        dtypes = {src.dtype.scalar, dst_type.scalar}
        if dtypes <= {tl.bfloat16, tl.float16, tl.float32}:
            return repaired_cast(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def repaired_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        a, b = (_widen(x) if _is_bf16(x) else _Handle(x.data.astype(np.float32), tl.float32) for x in (a, b))
        return dot(self, a, b, d, *precision)

    launch = interpreter.GridExecutor.__call__
    prepared: set[Any] = set()  # modules that the running launch has patched

    def repaired_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared.clear()
        return launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in prepared:  # the interpreter itself patches triton.language at every call
            interpreter._patch_lang(self.fn)
            prepared.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    _Builder.binary_op, _Builder.unary_op, _Builder.ternary_op = (
        repaired_binary_op, repaired_unary_op, repaired_ternary_op,
    )  # fmt: skip
    _Builder.cast_impl, _Builder.create_fp_to_fp, _Builder.create_dot = repaired_cast, repaired_fp_to_fp, repaired_dot
    interpreter.InterpretedFunction.__call__ = call
    interpreter.GridExecutor.__call__ = repaired_launch


def _is_bf16(handle: Any) -> bool:
    return isinstance(handle, _Handle) and handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    if not _is_bf16(handle):
        return handle
    return _Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(handle: Any) -> Any:
    """Round fp32 to the nearest bf16, ties to even. Other types (comparisons) are returned as they are."""
    if handle.data.dtype != np.float32:
        return _Handle(handle.data, tl.bfloat16)
    bits = np.ascontiguousarray(handle.data).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return _Handle(np.where(np.isnan(handle.data), 0x7FFF, rounded).astype(np.uint16), tl.bfloat16)
