# SPDX-License-Identifier: Apache-2.0
"""Runs a model on a few tokens to check that the patched model agrees with the stock model.

The stock model has the same prefix in its cache. Compared are a batch without padding, rows padded on the left and on
the right, one decoding step, a packed batch, and the output layer on packed rows. A difference is reported as a
reason not to use the patch. Errors that are unrelated to the model, such as out of memory, are raised.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model_info import cache_name
from ..recurrent_state import LayerState
from .cache import KeyValue, PrefixCache, PrefixOptions
from .call_arguments import forward_arguments
from .layout import Layout
from .packed_cache import PackedCache
from .packing import PackedBatch
from .positions import PositionTable
from .probing import beside_encoder, is_transient, some_tokens
from .sharing import share_rows
from .survey import PrefixLayerInfo

__all__ = ["Outputs", "Trial", "difference", "prefix_like", "tolerance"]

#: ``layout_of(tokens, mask, from_first)`` gives the layout of a packed batch.
LayoutOf = Callable[[Tensor, Tensor, bool], Layout]

#: [B, S, ...] each.
Outputs = list[Tensor]

_PREFIX_LEN = 2
#: Compiles no kernel for these sizes. The trial checks the code around attention, not attention itself.
BACKEND = "reference"


class Trial:
    """Runs of one backbone on a few tokens.

    Args:
        backbone: with peftkern's attention implementation, in eval mode and without gradients
            (:func:`.probing.quiet`).
        prefix_layers: its attention modules that read the prefix.
        samples: per layer of the cache, keys and values [1, Hkv, _PREFIX_LEN, D] of that many tokens.
        options: for the attention function.
        stock_layers: those of a stock cache of the model; empty if all layers attend.
        every_layer: whether the prefix is in all layers of the cache, instead of those that self-attention reads.
        encoded: whether the backbone needs the output of an encoder.
    """

    #: Whether windows count the prefix, as those of the stock model do.
    in_window = True

    def __init__(
        self,
        backbone: PreTrainedModel,
        prefix_layers: dict[nn.Module, PrefixLayerInfo],
        samples: dict[int, KeyValue],
        options: PrefixOptions,
        *,
        stock_layers: Sequence[Any] = (),
        every_layer: bool = True,
        encoded: bool = False,
    ) -> None:
        self.backbone = backbone
        self.stock_layers = stock_layers
        self.encoded = encoded
        self._read_layers = None if every_layer else frozenset(samples)
        self.prefix_layers = prefix_layers
        self.options = replace(options, in_window=self.in_window, backend=BACKEND)
        self.kind = type(backbone).__name__
        self.cache_name = cache_name(forward_arguments(backbone))
        self.prefix_len = _PREFIX_LEN
        self.prefix = _some_prefix(backbone, samples)
        self.ids = some_tokens(backbone, 3 * 3).view(3, 3)
        self.mask = torch.ones_like(self.ids)
        self.mask[1, 0] = 0
        self.mask[2, -1] = 0
        #: Output of the last run of the backbone, and the names of the embeddings that the run has read.
        self.output: Any = None
        self._read: set[str] = set()
        #: Those that it reads if it is given tokens, except the embeddings of the tokens.
        self._read_with_tokens: set[str] = set()
        #: Names of the embeddings that have been called on the token ids, other than the input embeddings.
        self._token_tables: set[str] = set()
        #: Whether the model counts positions from 0 whatever its cache contains. Runs then give it the positions.
        self.ignores_cache = False
        self._stock: Outputs = []
        #: Per output and row, the change of the stock model's output when the prefix is rounded differently.
        self._rounding: list[list[float]] = []
        #: Relative error of the model's linear layers, at most that of bf16.
        self._linear_error = 0.0

    def try_prefix(self) -> str | None:
        """How a prefix read by attention differs from a prefix in the stock cache; None if it does not."""
        return self.guarded(self._try_prefix, "with a prefix")

    def _try_prefix(self) -> str | None:
        ids, mask = self.ids, self.mask
        stock, cache = self._stock_cache(self.cache()), self.cache()
        with self.measured_linear_layers():
            self._stock = self.run(stock, ids, mask)
        self._read_with_tokens = self._read
        round_otherwise = self.round_otherwise
        moved = self.cache(prefix=[kv and (round_otherwise(kv[0]), round_otherwise(kv[1])) for kv in self.prefix])
        self._rounding = self.measure_rounding(self.run(self._stock_cache(moved), ids, mask), self._stock, mask)
        what = f"{self.kind} with prefix keys in its cache"
        got = self.run(self.cache(stores=False), ids[:1], None)
        reason = self.compare(what, got, [x[:1] for x in self._stock], None, self._rounding)
        if reason is None:
            got = self.run(cache, ids, mask)
            reason = self.compare(f"{what} and padding", got, self._stock, mask, self._rounding)
        if reason is not None:
            return reason
        longer = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
        want, got = self.run(stock, ids[:, :1], longer), self.run(cache, ids[:, :1], longer)
        return self.compare(f"{what}, decoding", got, want, None, self.worst_rounding())

    def worst_rounding(self) -> list[list[float]]:
        """A bound for tokens other than those whose rounding was measured."""
        return [[4 * max(rows)] * len(rows) for rows in self._rounding]

    @contextlib.contextmanager
    def measured_linear_layers(self) -> Iterator[None]:
        """Measure the error of the linear layers that run within the block."""
        with _linear_errors(self.backbone) as errors:
            yield
        self._linear_error = min(max(errors, default=0.0), torch.finfo(torch.bfloat16).eps)

    def try_positions(self, tables: list[PositionTable]) -> str | None:
        """Why positions cannot count the prefix; None if they can, as they do in a model with a cache.

        Args:
            tables: the backbone's tables of learned positions.
        """
        return None

    @property
    def reads_tokens(self) -> bool:
        """Whether the backbone reads more embeddings of its tokens than those of ``get_input_embeddings``."""
        return bool(self._token_tables)

    def try_packed(self, layout_of: LayoutOf, *, as_tokens: bool, replaces_tokens: bool) -> str | None:
        """How a packed batch with a prefix differs from the padded batch; None if it does not.

        Args:
            layout_of: see :data:`LayoutOf`.
            as_tokens: whether packed batches give the backbone tokens, and not their embeddings.
            replaces_tokens: whether batches without packing give the backbone tokens.
        """

        def run() -> str | None:
            packed = PackedBatch(layout_of(self.ids, self.mask, False))
            tokens = self.backbone.get_input_embeddings()(self.ids) if not as_tokens else self.ids
            got = self._run_packed(self.cache(), packed, tokens)
            unread = self._read_with_tokens - self._read
            if unread and replaces_tokens and not as_tokens:  # the parameters may be 0 now, and change in training
                names = ", ".join(sorted(unread))
                return f"{self.kind} reads {names} only if it is given tokens instead of embeddings"
            return self.compare(f"{self.kind} on packed rows", got, self._stock, self.mask, self._rounding)

        return self.guarded(run, "on packed rows")

    def try_prompt(self, layout_of: LayoutOf) -> str | None:
        """How a packed batch with a prompt differs from a batch with the prompt in every row; None if it does not."""

        def run() -> str | None:
            mask = self.mask[[0, 2]]  # without left padding, which would move the text
            samples, length = mask.shape
            ids = some_tokens(self.backbone, mask.numel() + _PREFIX_LEN)
            prompt, tokens = self.backbone.get_input_embeddings()(ids).split([_PREFIX_LEN, mask.numel()])
            tokens = tokens.view(samples, length, -1)
            padded = torch.cat([mask.new_ones(samples, _PREFIX_LEN), mask], 1)
            batch = torch.cat([prompt.expand(samples, -1, -1), tokens], 1)
            want = self.recorded(inputs_embeds=batch, attention_mask=padded, use_cache=False)
            # Without a mask, some models attend in both directions.
            alone = self.recorded(inputs_embeds=batch[:1], attention_mask=None, use_cache=False)
            rounding = self.worst_rounding()
            if self._eps(batch.dtype) > 1e-4:  # as in half precision, where a measured bound is tighter
                moved = self.round_otherwise(batch)
                moved_outputs = self.recorded(inputs_embeds=moved, attention_mask=padded, use_cache=False)
                rounding = self.measure_rounding(moved_outputs, want, padded)
            packed = PackedBatch(layout_of(tokens, mask, True), prompt[None], show_prompts=True)
            got = self._run_packed(self._packed_cache(packed), packed, tokens)
            what = f"{self.kind} on packed rows with a prompt"
            reason = self.compare(what, got, want, padded, rounding)
            return reason or self.compare(f"{what} and no mask", [x[:1] for x in got], alone, None, rounding)

        return self.guarded(run, "on packed rows with a prompt")

    def try_shared(self, layout_of: LayoutOf) -> str | None:
        """How a packed batch with shared text differs from the padded batch; None if it does not."""

        def run() -> str | None:
            a, b, c, d, e, f = some_tokens(self.backbone, 6).tolist()
            ids = torch.tensor([[a, b, c, d], [a, b, c, e], [a, b, f, f]], device=self.ids.device)
            mask = torch.ones_like(ids)
            mask[2, -1] = 0
            tokens = self.backbone.get_input_embeddings()(ids)
            want = self.recorded(inputs_embeds=tokens, attention_mask=mask, use_cache=False)
            # Without a mask, some models attend in both directions.
            alone = self.recorded(inputs_embeds=tokens[:1], attention_mask=None, use_cache=False)
            moved = self.recorded(inputs_embeds=self.round_otherwise(tokens), attention_mask=mask, use_cache=False)
            rounding = self.measure_rounding(moved, want, mask)
            layout = share_rows(layout_of(ids.cpu(), mask.cpu(), False), ids.cpu(), min_saved=1)
            assert layout is not None
            packed = PackedBatch(layout.to(ids.device))
            got = self._run_packed(self._packed_cache(packed), packed, tokens)
            what = f"{self.kind} on packed rows with shared text"
            reason = self.compare(what, got, want, mask, rounding)
            return reason or self.compare(f"{what} and no mask", [x[:1] for x in got], alone, None, rounding)

        return self.guarded(run, "on packed rows with shared text")

    def _eps(self, dtype: torch.dtype) -> float:
        """Relative error of one operation of the model on tensors of a dtype."""
        return max(torch.finfo(dtype).eps, self._linear_error)

    def round_otherwise(self, x: Tensor) -> Tensor:
        """Each element moved by one rounding error, alternately away from and towards zero."""
        signs = (torch.arange(x.numel(), device=x.device) % 2 * 2 - 1).view(x.shape).to(x.dtype)
        return x * (1 + signs * self._eps(x.dtype))

    def measure_rounding(self, moved: Outputs, outputs: Outputs, mask: Tensor | None) -> list[list[float]]:
        """Per output and row, the change of the stock model's output when its input is rounded differently.

        Raises:
            ValueError: if the change is too large for rounding.
        """
        rounding = [
            [difference(a[row][_real(mask, row)], b[row][_real(mask, row)]) for row in range(len(b))]
            for a, b in zip(moved, outputs, strict=True)
        ]
        if max(map(max, rounding)) > max(_MAX_ROUNDING.get(outputs[0].dtype, 1e-3), 64 * self._linear_error):
            raise ValueError("the stock model's outputs change from call to call")
        return rounding

    def compare(
        self, what: str, got: Outputs, want: Outputs, mask: Tensor | None, rounding: list[list[float]]
    ) -> str | None:
        """A sentence about a difference that rounding does not explain; None if there is none.

        Compares the output of every attention module and the last hidden states, each relative to its own norm.
        Rounding grows from layer to layer, whereas an error of the patch shows in the first layer.

        Args:
            what: subject of the sentence.
            got, want: outputs of the patched and of the stock model.
            mask: 0 for places that are not compared.
            rounding: per output and row, the stock model's change by rounding; eight times as much is allowed.
        """
        for index, (x, y) in enumerate(zip(got, want, strict=True)):
            if x.shape != y.shape:
                return f"{what} returns {list(x.shape)}, but the stock model returns {list(y.shape)}"
            allowed = max(tolerance(y.dtype), 4 * self._linear_error)
            for row in range(x.shape[0]):
                real = _real(mask, row)
                off = difference(x[row][real], y[row][real])
                if off > max(allowed, 8 * rounding[index][row]):
                    where = "last hidden states are" if index == len(got) - 1 else f"attention of layer {index} is"
                    return f"{what} differs from the stock model: its {where} off by {off:.1e}"
        return None

    def _packed_cache(self, packed: PackedBatch) -> PackedCache:
        return PackedCache(len(self.prefix), packed, stores=False, options=self.options)

    def guarded(self, run: Callable[[], str | None], what: str) -> str | None:
        """The result of ``run``, or a sentence about the error that it raises."""
        try:
            return run()
        except Exception as error:
            if is_transient(error):
                raise
            return f"{self.kind} could not be run {what}: {_first_line(error)}"

    def cache(
        self, stores: bool = True, prefix: Sequence[KeyValue | None] = (), states: Sequence[Sequence[LayerState]] = ()
    ) -> PrefixCache:
        """A cache with a prefix, by default that of the trial, and states."""
        return PrefixCache(
            prefix or self.prefix, offset=_PREFIX_LEN, stores=stores, offset_outside=True, options=self.options,
            as_stored=True, like=self.stock_layers, states=states, read_layers=self._read_layers,
        )  # fmt: skip

    def _stock_cache(self, cache: PrefixCache) -> Any:
        return cache.as_stock(self.ids.shape[0], self.backbone.dtype, self.backbone.config)

    def run(self, cache: Any, tokens: Tensor, mask: Tensor | None, also: Sequence[nn.Module] = ()) -> Outputs:
        """:meth:`recorded` behind a cache, stock or with a prefix."""
        if mask is not None:
            mask = torch.cat([mask.new_ones(mask.shape[0], _PREFIX_LEN), mask], 1)
        arguments = {"input_ids": tokens, "attention_mask": mask, str(self.cache_name): cache, "use_cache": True}
        if self.ignores_cache:
            places = torch.arange(tokens.shape[1], device=tokens.device)[None]
            arguments["position_ids"] = places + cache.get_seq_length()
        if not isinstance(cache, PrefixCache):
            return self.recorded(also, **arguments)
        return self.recorded_with(cache, also, **arguments)

    def recorded_with(self, cache: PrefixCache, also: Sequence[nn.Module] = (), **arguments: Any) -> Outputs:
        """:meth:`recorded`, if every attention module receives its prefix."""
        cache.begin()
        outputs = self.recorded(also, **arguments, peftkern_prefix=cache)
        missing = cache.finish({info.name: len(info.layers) for info in self.prefix_layers.values()})
        if missing:
            raise ValueError(f"attention ran without its prefix in {', '.join(missing)}")
        return outputs

    def _run_packed(self, cache: PrefixCache, packed: PackedBatch, tokens: Tensor) -> Outputs:
        cache.packed = packed
        rows = packed.layout.pack(tokens)
        inputs: dict[str, Any] = (
            {"inputs_embeds": packed.embeddings(rows)} if tokens.dim() > 2 else {"input_ids": rows}
        )
        outputs = self.recorded(
            **inputs, position_ids=packed.positions(cache.offset), attention_mask=None, use_cache=False,
            peftkern_prefix=cache, **{str(self.cache_name): cache},
        )  # fmt: skip
        return [packed.unpack(x) for x in outputs]

    def recorded(self, also: Sequence[nn.Module] = (), **arguments: Any) -> Outputs:
        """Outputs of the attention and other modules in the order of their calls, then the last hidden states."""
        outputs: Outputs = []
        if "inputs_embeds" in arguments:  # CTRL changes them
            arguments["inputs_embeds"] = arguments["inputs_embeds"].clone()

        def record(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and first.dim() == 3:
                outputs.append(first)

        def record_table(module: nn.Module, args: Any, *, name: str) -> None:
            self._read.add(name)
            ids = arguments.get("input_ids")
            if ids is not None and isinstance(args[0], Tensor) and torch.equal(args[0], ids):
                self._token_tables.add(name)

        self._read = set()
        handles = [module.register_forward_hook(record) for module in (*self.prefix_layers, *also)]
        handles += [
            module.register_forward_pre_hook(partial(record_table, name=name))
            for name, module in self.backbone.named_modules()
            if isinstance(module, nn.Embedding) and module is not self.backbone.get_input_embeddings()
        ]
        try:
            arguments = beside_encoder(self.backbone, arguments) if self.encoded else arguments
            self.output = self.backbone(**arguments)
            return [*outputs, self.output[0]]
        finally:
            for handle in handles:
                handle.remove()


def _some_prefix(backbone: PreTrainedModel, samples: dict[int, KeyValue]) -> list[KeyValue | None]:
    """Keys and values of _PREFIX_LEN tokens per layer."""
    generator = torch.Generator().manual_seed(0)
    layers = {layer: prefix_like(pair, generator) for layer, pair in samples.items()}
    if not layers:
        return []
    config = backbone.config.get_text_config(decoder=True)
    num_layers = max(1 + max(layers), getattr(config, "num_hidden_layers", None) or 0)
    return [layers.get(layer, next(iter(layers.values()))) for layer in range(num_layers)]


def prefix_like(pair: KeyValue, generator: torch.Generator) -> KeyValue:
    """[Hkv, _PREFIX_LEN, D] each: the first keys and values of a sample [1, Hkv, T, D] with a little noise.

    A prefix that differs much from the model's own keys and values would amplify rounding.
    """

    def vary(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape[1], _PREFIX_LEN, x.shape[3], generator=generator).to(x.device, x.dtype)
        return x[0, :, :_PREFIX_LEN] + 0.1 * x.float().square().mean().sqrt().to(x.dtype) * noise

    return vary(pair[0]), vary(pair[1])


@contextlib.contextmanager
def _linear_errors(backbone: nn.Module) -> Iterator[list[float]]:
    """Fill a list with the relative error of every linear layer that runs within the block.

    ``f(a) + f(b) = f(a + b) + f(0)`` holds up to the rounding of the dtype, unless the layer quantises its inputs or
    computes in a lower precision.
    """
    errors: list[float] = []

    def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or args[0].dim() < 2:
            return
        rows = args[0].flatten(0, -2)
        a, b = rows[0], rows[-1]
        outputs = module.forward(torch.stack([a, b, a + b, torch.zeros_like(a)]))  # not a call, which runs hooks
        if isinstance(outputs, Tensor):  # a router of experts returns more
            of_a, of_b, of_sum, of_zero = outputs.float()
            errors.append(difference(of_a + of_b - of_zero, of_sum))

    layers = [m for m in backbone.modules() if hasattr(m, "in_features") and hasattr(m, "out_features")]
    handles = [layer.register_forward_pre_hook(measure, with_kwargs=True) for layer in layers]
    try:
        yield errors
    finally:
        for handle in handles:
            handle.remove()


#: Per dtype, the largest change that rounding explains. A model that keeps a state between calls changes more.
_MAX_ROUNDING = {torch.bfloat16: 0.5, torch.float16: 0.1}


def _real(mask: Tensor | None, row: int) -> Any:
    """Index of the places of a row that are compared."""
    return slice(None) if mask is None else mask[row].bool()


def difference(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, in the Euclidean norm."""
    got, want = got.float(), want.float().to(got.device)
    if bool(want.isnan().any()) and torch.equal(want.isnan(), got.isnan()):
        got, want = got.nan_to_num(), want.nan_to_num()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def tolerance(dtype: torch.dtype) -> float:
    """The relative difference that always counts as rounding."""
    if dtype in (torch.bfloat16, torch.float16):
        return 4 * torch.finfo(dtype).eps
    return 2e-3 if torch.get_float32_matmul_precision() != "highest" else 2e-5


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
