# SPDX-License-Identifier: Apache-2.0
"""Rows of a tensor that are copied when an operation first reads them.

This module knows nothing about models; it maps tensors to tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_map_only

__all__ = ["DeferredTensor", "deferred_rows"]

#: Functions of a tensor whose result does not depend on its values.
_FACTS = frozenset(
    [getattr(Tensor, name) for name in ("size", "dim", "numel", "nelement", "is_floating_point", "__len__")]
    + [getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout", "requires_grad")]
)

#: Casts, which are deferred too: accelerate casts every output of a model that runs under autocast.
_CASTS = frozenset([Tensor.float, Tensor.half, Tensor.bfloat16])


class DeferredTensor(Tensor):
    """A tensor that knows its shape, dtype, device and gradient, and is computed when an operation reads its values.

    Operations called from Python get a plain tensor (:meth:`__torch_function__`), and so do those that C++ code
    dispatches, for example in the ``apply`` of an autograd function (:meth:`__torch_dispatch__`). Their results are
    plain tensors. The values are computed once.

    ``torch.compile(fullgraph=True)`` refuses a deferred tensor as an argument. Other compiled functions take it.

    Args:
        shape, dtype, device: of the tensor.
        compute: returns the values, without a gradient.
    """

    _compute: Callable[[], Tensor] | None
    _copied: Tensor | None
    _plain: Tensor | None

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, compute: Callable[[], Tensor]
    ) -> DeferredTensor:
        """A tensor without memory."""
        self: DeferredTensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self._compute, self._copied, self._plain = compute, None, None
        return self

    def values_without_gradient(self) -> Tensor:
        """The values, for operations below autograd."""
        if self._compute is not None:
            self._copied, self._compute = self._compute(), None
        assert self._copied is not None
        return self._copied

    def plain(self) -> Tensor:
        """The same values and gradient as a plain tensor; always the same one, which may be changed in place."""
        if self._plain is None:
            with torch.inference_mode(False), torch.enable_grad():
                self._plain = _Read.apply(self)
        return self._plain  # type: ignore[return-value]

    @classmethod
    @_disable_dynamo
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function that is called from Python."""
        with torch._C.DisableTorchFunctionSubclass():
            if func not in _FACTS and func not in _CASTS:
                args, kwargs = tree_map_only(DeferredTensor, DeferredTensor.plain, (args, kwargs))
            return func(*args, **(kwargs or {}))

    @classmethod
    @_disable_dynamo
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation of C++ code, or a cast, below autograd."""
        if func is torch.ops.aten._to_copy.default and set(kwargs) <= {"dtype"}:
            deferred, dtype = args[0], kwargs.get("dtype", args[0].dtype)
            compute = lambda: deferred.values_without_gradient().to(dtype)  # noqa: E731
            return cls(deferred.shape, dtype, deferred.device, compute)
        read = DeferredTensor.values_without_gradient
        args, kwargs = tree_map_only(DeferredTensor, read, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Read(torch.autograd.Function):
    """A deferred tensor -> a plain one."""

    @staticmethod
    def forward(ctx: Any, deferred: DeferredTensor) -> Tensor:
        return deferred.values_without_gradient()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        return dout


class _DeferredRows(torch.autograd.Function):
    """:func:`deferred_rows` with a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows, source = x.shape[0], x.detach()
        shape = (*rows.shape, x.shape[1])
        return DeferredTensor(shape, x.dtype, x.device, lambda: torch.embedding(source, rows))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        dx = dout.new_zeros(ctx.num_rows, dout.shape[-1])
        return dx.index_add(0, rows.flatten(), dout.flatten(0, -2)), None


def deferred_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]``, copied when an operation first reads it.

    Args:
        x: [N, V].
        rows: [B, S], from 0 to N - 1.

    Returns:
        [B, S, V], a :class:`DeferredTensor`.
    """
    return _DeferredRows.apply(x, rows)  # type: ignore[no-any-return]
