"""The encoder stage (V2V): reduce the tokens of each span between vision tower and decoder, at unchanged feature
counts.

Reduced spans keep their length: dropped tokens are marked with NaN, so the model's own checks, packing, position code
and beam expansion keep working; the marked rows are removed where the decoder begins. Users who call the encoder
themselves get the features of the stock model; the reduced ones are stored with the output, in case it comes back with
a prompt. With a point-wise projector tokens are dropped before it (only kept and merged tokens are projected); with a
grid merger, or a method that uses projected features, after the encoder call.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import Adapter, EncoderCall, Modality
from duet_vlm.ops.merge import merged_rows
from duet_vlm.ops.ragged import pad_rows, stacked
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.decoder import DecoderReducer
from duet_vlm.reducers.encoder import EncoderReducer
from duet_vlm.reducers.encoder_view import LayerView
from duet_vlm.reducers.inputs import FEATURE_INPUTS, QUESTION_INPUTS, VISION_LAYER_INPUTS, Input
from duet_vlm.runtime import compat
from duet_vlm.runtime.active_config import ActiveConfig
from duet_vlm.runtime.context import (
    ENCODED,
    EncodeAccounting,
    EncodeCall,
    EncodeContext,
    EncodedFeatures,
    FeatureChecks,
    LastRows,
    PromptText,
    ReceivedFeatures,
    ReducedRows,
    SpanSelection,
    ThreadState,
)
from duet_vlm.runtime.encode.build_view import (
    QuestionTextEncoder,
    SignalLayers,
    find_question,
    grid_of,
    layer_view,
    layer_views,
    projector_function,
    question_state,
)
from duet_vlm.runtime.encode.selection import part_sizes, plan_spans, reduces_per_crop, select_tokens, slots_of
from duet_vlm.runtime.encode.video_chunks import ChunkConfig, ChunkedFeatures, ChunkPlan
from duet_vlm.runtime.marks import MARK
from duet_vlm.runtime.validation import check_finite

Features = Callable[[], Tensor | None]


class EncoderHooks:
    """The hooks on the encoder calls of one model.

    Attributes
    ----------
    begin : callable
        Context manager of a call that yields its configuration, None for the full model.
    text_encoder : QuestionTextEncoder
        Encodes the text of a question.
    chunks : ChunkConfig
        Settings of chunked videos.
    skips_unused_layers : bool
        Tower layers with unused output are skipped.
    signal_layers : SignalLayers
        The vision layers that the method takes signals from.
    module : nn.Module or None
        The trainable module of the method.
    """

    def __init__(
        self,
        adapter: Adapter,
        state: ThreadState,
        begin: Callable[[], AbstractContextManager[ActiveConfig | None]],
        text_encoder: QuestionTextEncoder,
        chunks: ChunkConfig,
    ) -> None:
        self.adapter = adapter
        self.state = state
        self.begin = begin
        self.text_encoder = text_encoder
        self.chunks = chunks
        self.skips_unused_layers = False
        self.signal_layers = SignalLayers((), ())
        self.module: nn.Module | None = None

    def wrap(self, encode: Callable[..., Any], modality: Modality) -> Callable[..., Any]:
        """The encoder method of a modality with the reduction around it.

        Keeps its signature, which generate() inspects.
        """
        signature = inspect.signature(encode)

        @functools.wraps(encode)
        def encode_and_reduce(*args: Any, **kwargs: Any) -> Any:
            with self.begin() as config:
                if self.state.encode_contexts:
                    self._refuse_nested(modality)
                if config is None or self.state.encode_contexts:  # the full model, or one encoder method calls another
                    return encode(*args, **kwargs)
                bound = signature.bind_partial(*args, **kwargs)
                context = self._new_context(modality, modality.encoding(bound.arguments), config)
                pixels = bound.arguments.get(modality.pixels)
                if not context.call.standalone and isinstance(pixels, Tensor):
                    chunk_plan = self.chunks.plan_chunks(self.adapter, config.reducer, context.encoding, pixels)
                    if chunk_plan is not None:
                        return self._encode_in_chunks(
                            functools.partial(_call_bound, encode, signature), modality, context, chunk_plan
                        )
                stock_output = encode(*args, **kwargs) if context.call.run_stock_too else None
                self.state.encode_contexts.append(context)
                try:
                    output = encode(*args, **kwargs)
                finally:
                    self.state.encode_contexts.pop()
                output = self._store_result(output, context)
                return output if stock_output is None else self._attach_to_stock(stock_output, output, context)

        return encode_and_reduce

    def _encode_in_chunks(
        self, encode: Callable[[dict[str, Any]], Any], modality: Modality, context: EncodeContext, chunk_plan: ChunkPlan
    ) -> Any:
        """The output of an encoder call for videos, chunk by chunk."""
        chunked = ChunkedFeatures(chunk_plan)
        for chunk in chunk_plan.chunks:
            chunk_context = self._new_context(
                modality,
                self.adapter.slice_frames(context.encoding, chunk.video, chunk.steps),
                context.config,
                is_chunk=True,
            )
            self.state.encode_contexts.append(chunk_context)
            try:
                output = encode(chunk_context.encoding.arguments)
            finally:
                self.state.encode_contexts.pop()
            chunked.add(self.adapter, chunk, chunk_context, output)
        rows, levels, context.recorded.signals = chunked.concatenate()
        projects = chunked.projects
        del chunked, chunk_context  # frees the chunks: their features are in ``rows`` now
        if projects:
            rows = self._project_video(stacked(rows), context, chunk_plan)
        for name in ("last_hidden_state", "hidden_states", "attentions"):  # of the last chunk only
            if getattr(output, name, None) is not None:
                setattr(output, name, None)
        if levels:
            output.deepstack_features = levels
        output = self._store_result(output, context, rows)
        getattr(output, ENCODED).accounting.repeated_parts = chunk_plan.repeated_steps
        return output

    def _project_video(self, features: Tensor, context: EncodeContext, chunk_plan: ChunkPlan) -> list[Tensor]:
        """Project features of videos [B, N, C] with a point-wise projector; dropped rows are marked."""
        projector = self.adapter.pointwise_projector
        assert projector is not None
        merged = self._select_and_merge(context, features, features)
        if merged is None:
            return [
                chunk_plan.reused_steps(video, projector.forward(chunk_plan.encoded_steps(video, rows)[None])[0])
                for video, rows in enumerate(features)
            ]
        assert context.pending_features is not None
        return list(_expand_marked(projector.forward(merged), context.pending_features, features.shape[1]))

    def _new_context(
        self, modality: Modality, encoding: EncoderCall, config: ActiveConfig, is_chunk: bool = False
    ) -> EncodeContext:
        """The context of a new encoder call."""
        standalone = not (self.state.forward_contexts or self.state.generate_preparations)
        run_stock_too = standalone and config.tower_reducer is not None and config.tower_reducer.prunes_inside
        standalone = standalone and not run_stock_too
        return EncodeContext(
            encoding,
            config,
            EncodeCall(
                standalone=standalone,
                per_crop=reduces_per_crop(config.reducer, modality.each),
                skips_unused_layers=not standalone and self._can_skip_layers(config.reducer, encoding),
                prompt=self._current_prompt(),
                run_stock_too=run_stock_too,
                depth=self._depth(),
                is_chunk=is_chunk,
                needs_grad=self.module is not None and torch.is_grad_enabled(),
            ),
        )

    def _depth(self) -> tuple[int, int]:
        """Numbers of running forwards and generate() calls."""
        return len(self.state.forward_contexts), len(self.state.generate_prompts)

    def _refuse_nested(self, modality: Modality) -> None:
        """Refuse an encoder call from inside the tower; one encoder method may call that of another modality."""
        running = self.state.encode_contexts[-1]
        same_modality = any(context.encoding.stream == modality.name for context in self.state.encode_contexts)
        if running.call.depth != self._depth() or same_modality:
            raise RuntimeError(
                f"{type(self.adapter.model).__name__} was called with pictures from inside its own vision tower (by a hook?) while a reducer is "
                "attached: what both calls record would mix. Call it when this call has ended, or from a hook of the decoder"
            )

    def _current_prompt(self) -> PromptText | None:
        """The text around this encoder call."""
        if self.state.forward_contexts:
            context = self.state.forward_contexts[-1]
            embeds = context.call.input_embeds if context.call.input_ids is None else None
            return PromptText(context.call.input_ids, embeds, context.call.attention_mask, context.call.labels)
        if self.state.generate_preparations and self.state.generate_prompts:
            return self.state.generate_prompts[-1]
        return None

    def _attach_to_stock(self, stock_output: Any, output: Any, context: EncodeContext) -> Any:
        """The output of the stock encoder, with the reduced features of ``output`` stored on it."""
        encoded: EncodedFeatures = getattr(output, ENCODED)
        encoded.reduced = ReducedRows(encoded.rows, getattr(output, "deepstack_features", None) or [])
        encoded.rows = self.adapter.spans(stock_output, context.encoding)
        setattr(stock_output, ENCODED, encoded)
        return stock_output

    def _can_skip_layers(self, reducer: Reducer, encoding: EncoderCall) -> bool:
        """True if unused tower layers can be skipped.

        Training runs the whole tower: sharding and gradients need every layer.
        """
        reduces = isinstance(reducer, EncoderReducer | DecoderReducer)
        return (
            self.skips_unused_layers
            and reduces
            and not torch.is_grad_enabled()
            and self.adapter.uses_default_layers(encoding)
        )

    def skippable(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a tower layer whose output is unused: it is skipped where the call allows it."""

        def pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.state.encode_contexts and self.state.encode_contexts[-1].call.skips_unused_layers:
                return hidden_states
            return forward(hidden_states, *args, **kwargs)

        return pass_on

    def after_attention(self, attention: nn.Module, args: Any, output: Any) -> None:
        """Post-hook of a recorded attention: make signals of its queries and keys, and select tokens if nothing else is
        needed.

        The selection is made here so that recorded tensors are freed before the MLP of the layer needs memory.
        """
        context = self.state.encode_contexts[-1] if self.state.encode_contexts else None
        recorded = None if context is None else context.recorded.qk.pop(attention, None)
        if context is None or not recorded or not isinstance(context.config.reducer, EncoderReducer):
            return
        reducer, layer_numbers = context.config.reducer, self.signal_layers.numbers_of(attention)
        if context.selection is not None or context.recorded.captured_layers & set(layer_numbers):
            raise RuntimeError(
                "the vision tower ran twice in one encoder call: it is not known which of its attentions ranks the tokens"
            )
        context.recorded.captured_layers |= set(layer_numbers)
        if self._may_merge(context, sum(qk.key.shape[0] * qk.key.shape[2] for qk in recorded)):
            with torch.no_grad(), compat.without_autocast(recorded[0].key):
                recorded = (
                    recorded
                    if context.tower_work.state is None or context.call.standalone
                    else context.tower_work.state.record_attention(recorded)
                )
                layer_signals = layer_view(self.adapter, recorded, context.encoding, reducer)
            context.recorded.signals |= {
                number: context.recorded.signals.get(number, {}) | layer_signals for number in layer_numbers
            }
            if (
                len(context.recorded.captured_layers) == len(self.signal_layers.attentions)
                and _needs_attention_only(reducer)
                and not context.call.is_chunk
            ):
                counts = [len(rows) + self.adapter.feeds_cls for rows in next(iter(layer_signals.values()))]
                context.selection, context.recorded.signals = self._select(context, counts, lambda: None), {}

    def after_block(self, block: nn.Module, args: Any, output: Any) -> None:
        """Post-hook of a vision layer whose output the method uses."""
        context = self.state.encode_contexts[-1] if self.state.encode_contexts else None
        if context is None:
            return
        rows = output[0] if isinstance(output, tuple) else output
        layer_numbers = self.signal_layers.numbers_of(block)
        if (
            context.call.needs_grad
            and not torch.is_grad_enabled()
            and any(weight.requires_grad for weight in self.adapter.tower().parameters())
        ):
            raise ValueError(
                f"{context.config.reducer.name} uses layers of the vision tower, whose gradient re-entrant checkpointing "
                "loses: pass gradient_checkpointing_kwargs={'use_reentrant': False}, or freeze the tower"
            )
        # used after the tower: a checkpointed block must not save more than its second run does
        if rows.requires_grad and context.call.needs_grad:
            context.recorded.block_outputs |= dict.fromkeys(layer_numbers, rows)
        else:
            with torch.no_grad():
                self._store_block_output(context, layer_numbers, rows.detach())

    def _store_block_output(self, context: EncodeContext, layer_numbers: Iterable[int], rows: Tensor) -> None:
        """Store a block's output among the signals of its layers."""
        tokens = self.adapter.token_rows(rows, context.encoding)
        context.recorded.signals |= {
            number: context.recorded.signals.get(number, {}) | {"states": tokens} for number in layer_numbers
        }

    def record_projector_args(self, projector: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the projector, for methods that call it themselves."""
        if self.state.encode_contexts:
            self.state.encode_contexts[-1].recorded.projector_args = args, kwargs

    def _may_merge(self, context: EncodeContext, rows: int) -> bool:
        """True if spans can be reduced at all: no span is larger than all ``rows`` of the tower plus its newlines."""
        if context.tower_work.state is not None or context.call.is_chunk:
            return True
        try:
            return context.config.plan_span(
                (rows,), max(self.adapter.num_separator_rows(context.encoding, 1)), context.call.per_crop
            ).reduces_entry
        except ValueError:  # this many rows cannot be reduced so far (or not at all by these settings), fewer may
            return True

    def _tower_counts(self, context: EncodeContext, parts: list[Tensor]) -> list[list[int] | None]:
        """Per span how many tokens of each part a threshold in the tower kept; None where no threshold decides."""
        if context.tower_work.state is None or not context.config.by_threshold:
            return [None] * len(parts)
        survivors = iter(context.tower_work.state.counts)
        num_cls = self.adapter.num_cls_rows(context.encoding)
        tokens_per_crop = self.adapter.tokens_per_crop(context.encoding, [len(rows) for rows in parts])
        counts_of_spans: list[list[int] | None] = []
        for crops, rows in zip(tokens_per_crop, parts, strict=True):
            counts = [next(survivors) + num_cls for _ in crops]  # also of crops that packing drops completely
            counts_of_spans.append([min(n, size) for n, size in zip(counts, part_sizes(rows)[0], strict=False)])
        return counts_of_spans

    # ---- point-wise projector: before it

    def before_projector(self, projector: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Pre-hook of the projector: features [B, N, C] -> surviving rows [B, K, C]."""
        context = self.state.encode_contexts[-1] if self.state.encode_contexts else None
        if (
            context is None
            or not isinstance(context.config.reducer, EncoderReducer)
            or Input.PROJECTED_FEATURES in context.config.reducer.requires
        ):
            return None
        reducer = context.config.reducer
        pictures_per_span = self.adapter.projected_together(context.encoding)
        spans = features = args[0].unflatten(0, (-1, pictures_per_span)).flatten(1, 2)
        if context.call.is_chunk:  # one row of each frame instead: the projected output of a chunk is unused
            context.recorded.unprojected_rows = args[0]
            return (args[0][:, :1], *args[1:])
        if reducer.options.cls_token:
            features = torch.cat([_recorded_cls(context, self.adapter), features], 1)
        merged = self._select_and_merge(context, spans, features)
        if context.call.standalone:
            context.merged_rows = merged
            return None
        return None if merged is None else (merged, *args[1:])

    def _select_and_merge(self, context: EncodeContext, spans: Tensor, features: Tensor) -> Tensor | None:
        """Tokens kept of ``spans`` [B, N, C], selected among ``features`` (with a CLS row first if the method counts
        it): [B, K, C]; None: all."""
        reducer = context.config.reducer
        assert isinstance(reducer, EncoderReducer)
        span_selection = self._selection(context, [spans.shape[1]] * spans.shape[0], lambda: features)
        if span_selection.selection is None:
            return None
        slots = slots_of(span_selection.selection, reducer)
        context.pending_features = EncodedFeatures(
            modality=context.encoding.stream,
            rows=[],
            grids=(),
            plans=span_selection.plans,
            config=context.config,
            selection=span_selection.selection,
            slots=slots,
            last=LastRows(spans[:, -1].clone(), unprojected=True),
            checks=FeatureChecks(invalid_code=span_selection.invalid_code),
            accounting=EncodeAccounting(tower_survivors=span_selection.tower_survivors, sizes=span_selection.sizes),
        )
        return _merge(features, span_selection.selection)

    def after_projector(self, projector: nn.Module, args: tuple[Any, ...], projected: Tensor) -> Tensor | None:
        """Post-hook of the projector: rows [B, K, D] -> [B, N, D] with the dropped rows marked."""
        context = self.state.encode_contexts[-1] if self.state.encode_contexts else None
        if context is not None and context.recorded.unprojected_rows is not None:
            return projected.expand(-1, context.recorded.unprojected_rows.shape[1], -1)
        if context is None or context.pending_features is None:
            return None
        width = context.pending_features.plans[0].tokens
        if context.merged_rows is not None:
            expanded = _expand_marked(projector.forward(context.merged_rows), context.pending_features, width)
            context.pending_features.reduced = ReducedRows(list(expanded))
            return None
        pictures_per_span = self.adapter.projected_together(context.encoding)
        return (
            _expand_marked(projected, context.pending_features, width)
            .unflatten(1, (pictures_per_span, -1))
            .flatten(0, 1)
        )

    # ---- grid merger, or a method that uses projected features: after the call

    def _store_result(self, output: Any, context: EncodeContext, rows: list[Tensor] | None = None) -> Any:
        """Store the reduced features and their decisions on ``output``.

        ``rows`` of the spans, where they are not in it.
        """
        if not hasattr(output, "pooler_output"):
            raise TypeError(
                f"{self.adapter.family}: the encoder returned {type(output).__name__}; call it with return_dict=True or detach"
            )
        rows = self.adapter.spans(output, context.encoding) if rows is None else rows
        counts = [len(span_rows) for span_rows in rows]
        encoded = context.pending_features or self._reduce_after_encoder(
            rows, getattr(output, "deepstack_features", None), context
        )
        encoded.rows = rows
        encoded.grids = self.adapter.grids(context.encoding, counts)
        encoded.accounting.tokens_per_crop = tuple(self.adapter.tokens_per_crop(context.encoding, counts))
        encoded.accounting.tower_state = None if context.call.standalone else context.tower_work.state
        encoded.accounting.spare = self.adapter.spare(context.encoding)
        encoded.accounting.projected_rows = tuple(self.adapter.projected_rows(context.encoding, counts))
        encoded.accounting.skipped_layers = context.call.skips_unused_layers
        if encoded.checks.finite is None:
            encoded.checks.finite = compat.finite(
                torch.stack([span_rows.detach().sum(dtype=torch.float32) for span_rows in rows])
            )
        setattr(output, ENCODED, encoded)
        if not context.call.standalone:
            publish_features(output, encoded)
            if self.state.forward_contexts:  # inside forward: for the decoder of this call
                self.state.forward_contexts[-1].received[context.encoding.stream] = ReceivedFeatures(
                    encoded.rows, encoded
                )
        return output

    def _reduce_after_encoder(self, rows: list[Tensor], levels: Any, context: EncodeContext) -> EncodedFeatures:
        """Reduce spans after the encoder call.

        ``levels`` are deepstack features that decoder layers add to the same tokens.
        """
        span_selection = self._selection(context, [len(span_rows) for span_rows in rows], lambda: pad_rows(rows)[0])
        encoded = EncodedFeatures(
            context.encoding.stream,
            rows,
            (),
            span_selection.plans,
            context.config,
            span_selection.selection,
            accounting=EncodeAccounting(sizes=span_selection.sizes),
        )
        if span_selection.selection is not None:
            encoded.slots = slots_of(span_selection.selection, context.config.reducer)
            encoded.checks.invalid_code = span_selection.invalid_code
            encoded.accounting.tower_survivors = span_selection.tower_survivors
            encoded.last = LastRows(torch.stack([row[-1] for row in rows]))
            features, _ = pad_rows(rows)
            marked = _expand_marked(_merge(features, span_selection.selection), encoded, features.shape[1])
            deepstack = [type(level)(_expand_unmarked(list(level), encoded)) for level in levels or ()]
            encoded.reduced = ReducedRows(_unpad(marked, rows), deepstack)
        return encoded

    # ---- both

    def _selection(self, context: EncodeContext, counts: list[int], features: Features) -> SpanSelection:
        """The selection made before the features were known, or a new one with them."""
        if context.selection is None:
            span_selection = self._select(context, counts, features)
            context.recorded.signals = {}
            return span_selection
        selected_sizes = [plan.tokens for plan in context.selection.plans]
        if selected_sizes != counts:
            raise RuntimeError(
                f"{self.adapter.family}: tokens were chosen among {selected_sizes}, but the encoder made {counts} of them: call it with the "
                "settings of the model's config, or use handle.paused()"
            )
        return context.selection

    def _select(self, context: EncodeContext, counts: list[int], features: Features) -> SpanSelection:
        """Plans and selection for spans of ``counts`` rows.

        ``features`` computes [B, N, C], with a CLS row first if there is one, or None.
        """
        reducer = context.config.reducer
        parts = self.adapter.parts(context.encoding, counts)
        plans = plan_spans(
            context.config.plan_span,
            parts,
            context.call.per_crop,
            self._tower_counts(context, parts),
            self.adapter.num_cls_rows(context.encoding),
        )
        sizes = tuple(part_sizes(rows)[0] for rows in parts)
        if not isinstance(reducer, EncoderReducer) or not any(plan.reduces_entry for plan in plans):
            return SpanSelection(plans, sizes=sizes)
        if reducer.options.cls_token:
            self.adapter.cls_module()  # raises: no CLS row here
            parts = [nn.functional.pad(rows, (1, 0)) for rows in parts]
        width = max(map(len, parts))
        layers = self._layer_views(context, width) if reducer.requires & VISION_LAYER_INPUTS else ()
        rows = features()
        any_input = next(x for x in (*(x for layer in layers for x in layer.tensors()), rows) if x is not None)
        survivors = None
        if context.tower_work.state is not None:
            survivors = self._tower_survivors(context, width).to(any_input.device)
        with torch.set_grad_enabled(context.call.needs_grad), compat.without_autocast(any_input):
            further_inputs = self._further_inputs(context, counts, width, any_input.device, layers)
            selection, invalid_code, selectable = select_tokens(
                reducer,
                plans,
                parts,
                layers,
                rows,
                modality=context.encoding.stream,
                per_crop=context.call.per_crop,
                tower_survivors=survivors,
                further_inputs=further_inputs,
            )
        if context.tower_work.state is not None:
            invalid_code = torch.maximum(invalid_code, context.tower_work.state.invalid_code.to(invalid_code.device))
        return SpanSelection(plans, selection, invalid_code, None if survivors is None else selectable, sizes)

    def _tower_survivors(self, context: EncodeContext, width: int) -> Tensor:
        """[B, N] bool: the tokens that went through a reduced tower."""
        survivors, _ = pad_rows(
            [
                rows[:, 0] > 0.5
                for rows in self.adapter.patches_to_tokens(context.tower_work.state.survivors(), context.encoding)
            ]
        )
        # a CLS row before the tokens is always kept
        return nn.functional.pad(survivors, (width - survivors.shape[1], 0), value=True)

    def _layer_views(self, context: EncodeContext, width: int) -> tuple[LayerView, ...]:
        """Signals of all signal layers, padded to ``width`` rows."""
        for number, rows in context.recorded.block_outputs.items():
            self._store_block_output(context, (number,), rows)
        context.recorded.block_outputs = {}
        views, finite = layer_views(context, len(self.signal_layers.blocks), width)
        check_finite(finite, "the vision attention scores")
        return views

    def _further_inputs(
        self, context: EncodeContext, counts: list[int], width: int, device: torch.device, layers: tuple[LayerView, ...]
    ) -> dict[str, Any]:
        """The further inputs that the method declares beside layers and features, by their name in ``EncoderView``."""
        reducer = context.config.reducer
        assert isinstance(reducer, EncoderReducer)
        inputs: dict[str, Any] = {}
        if Input.GRID in reducer.requires:
            inputs |= grid_of(self.adapter, context.encoding, counts, width, device)
        if reducer.requires & QUESTION_INPUTS:
            question = find_question(
                self.adapter,
                context.call.prompt,
                context.encoding.stream,
                counts,
                reducer.name,
                context.call.needs_grad,
            )
            inputs["question"] = question.question
            if Input.QUESTION_STATE in reducer.requires:
                inputs["question_state"] = question_state(self.adapter, question, self.state)
            if Input.TEXT_SIMILARITY in reducer.requires:
                inputs |= self.text_encoder.text_similarity(layers[0].states, question, self.adapter.family)
        if Input.PROJECTOR in reducer.requires:
            inputs["project"] = projector_function(self.adapter, context)
        if reducer.trained_reducer is not None:
            inputs["module"] = self.module
        return inputs


def _needs_attention_only(reducer: EncoderReducer) -> bool:
    """True if a method needs only the attention of its signal layers, so that it can select before the tower ends."""
    return not reducer.requires & (FEATURE_INPUTS | {Input.STATES, Input.PROJECTOR})


def _call_bound(encode: Callable[..., Any], signature: inspect.Signature, arguments: dict[str, Any]) -> Any:
    """Call ``encode`` with bound arguments, by name: its wrappers add defaults by name, too."""
    by_name = dict(arguments)
    var_keywords = [
        by_name.pop(name, {})
        for name, parameter in signature.parameters.items()
        if parameter.kind is parameter.VAR_KEYWORD
    ]
    return encode(**by_name, **(var_keywords[0] if var_keywords else {}))


def publish_features(output: Any, encoded: EncodedFeatures) -> None:
    """Replace the features of an encoder output by the reduced ones, if there are any."""
    rows = encoded.rows if encoded.reduced is None else encoded.reduced.rows
    features = output.pooler_output
    output.pooler_output = stacked(rows) if isinstance(features, Tensor) else type(features)(rows)
    if encoded.reduced is not None and encoded.reduced.deepstack:
        output.deepstack_features = encoded.reduced.deepstack
    encoded.rows = list(output.pooler_output)
    encoded.reduced = None


def _expand_marked(rows: Tensor, encoded: EncodedFeatures, width: int) -> Tensor:
    """[B, K, D] -> [B, width, D]: kept rows at their positions, all others marked."""
    selection = encoded.selection
    assert selection is not None
    encoded.checks.finite = compat.finite(rows.masked_fill(~selection.valid[..., None], 0))
    return _write_at_positions(rows, encoded, rows.new_full((rows.shape[0], width + 1, rows.shape[2]), MARK))


def _expand_unmarked(rows: list[Tensor], encoded: EncodedFeatures) -> list[Tensor]:
    """Deepstack features [n, D] with merged rows at their positions; dropped rows are never used, so they stay
    unchanged.

    Rows that a trainable module made belong to the first level only; later levels are merged by weight.
    """
    features, _ = pad_rows(rows)
    assert encoded.selection is not None
    merged = _merge(features, dataclasses.replace(encoded.selection, custom_rows=None))
    return _unpad(_write_at_positions(merged, encoded, nn.functional.pad(features, (0, 0, 0, 1))), rows)


def _merge(features: Tensor, selection: Selection) -> Tensor:
    """[B, N, C] -> [B, K, C], in float32 also where autocast runs around it."""
    with compat.without_autocast(features):
        return merged_rows(features, selection)


def _write_at_positions(rows: Tensor, encoded: EncodedFeatures, target: Tensor) -> Tensor:
    """Write ``rows`` [B, K, D] at their positions of ``target`` [B, N + 1, D], padding at its last one; return the
    first N, [B, N, D]."""
    selection, slots = encoded.selection, encoded.slots
    assert selection is not None and slots is not None
    width = target.shape[1] - 1
    return target.scatter_(1, torch.where(selection.valid, slots, width)[..., None].expand_as(rows), rows)[:, :width]


def _unpad(padded: Tensor, rows: list[Tensor]) -> list[Tensor]:
    """Rows [B, N, D] cut to the lengths of ``rows``."""
    return [row[: len(span_rows)] for row, span_rows in zip(padded, rows, strict=True)]


def _recorded_cls(context: EncodeContext, adapter: Adapter) -> Tensor:
    """The recorded CLS row."""
    if context.recorded.cls_row is None:
        adapter.cls_module()
        raise RuntimeError("the CLS row was not recorded; detach and attach again")
    return context.recorded.cls_row
