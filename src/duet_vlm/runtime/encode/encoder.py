"""V2V: reduce the rows of each span between vision tower and decoder, without changing how many rows the model counts.

Reduced spans keep their length: rows that are gone are marked, so the model's own checks, packing, position code and beam expansion
keep working; the marked rows are removed where the decoder begins. Users who call the encoder themselves get what the stock model gives;
the reduced rows ride along, in case its output comes back with a prompt. Point-wise projectors are reduced in front (only the surviving
rows are projected, merged ones included); grid mergers, and methods that read projected rows, after the encoder call.
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

from duet_vlm.models.adapter import Adapter, Encoding, Modality
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
from duet_vlm.runtime.context import ENCODED, EncodeContext, EncodedFeatures, PromptText, ReceivedFeatures, SpanSelection, ThreadState
from duet_vlm.runtime.encode.build_view import (
    QuestionTextEncoder,
    SignalLayers,
    grid_of,
    layer_view,
    layer_views,
    projector_function,
    question_of,
    question_state,
)
from duet_vlm.runtime.encode.selection import part_sizes, plan_spans, reduces_per_crop, select_tokens, slots_of
from duet_vlm.runtime.encode.video_chunks import ChunkConfig, ChunkedFeatures, ChunkPlan
from duet_vlm.runtime.validation import not_finite

Features = Callable[[], Tensor | None]

MARK = float("nan")  # of rows that do not exist any more; real rows are checked to be finite


def is_marked(rows: Tensor) -> Tensor:
    """[..., D] -> [...] bool."""
    return rows[..., 0].isnan()


class EncoderHooks:
    """Wraps the encoder call of one model. ``begun`` says by which rules a call runs (None: the full model), ``words`` who reads a question."""

    def __init__(
        self,
        adapter: Adapter,
        state: ThreadState,
        begun: Callable[[], AbstractContextManager[ActiveConfig | None]],
        words: QuestionTextEncoder,
        pieces: ChunkConfig,
    ) -> None:
        self.adapter, self.state, self.begin, self.text_encoder, self.chunks = adapter, state, begun, words, pieces
        self.skips_unused_layers = False  # whether layers that nobody reads were found
        self.signal_layers = SignalLayers((), ())  # the vision layers that the method reads
        self.module: nn.Module | None = None  # of a method that has one

    def wrap(self, encode: Callable[..., Any], stream: Modality) -> Callable[..., Any]:
        """The encoder method of a stream with V2V around it; keeps its signature, which generate() reads."""
        signature = inspect.signature(encode)

        @functools.wraps(encode)
        def encode_and_reduce(*args: Any, **kwargs: Any) -> Any:
            with self.begin() as rules:
                if self.state.encode_contexts:
                    self._check_nested(stream)
                if rules is None or self.state.encode_contexts:  # nobody reduces, or one encoder method calls another
                    return encode(*args, **kwargs)
                bound = signature.bind_partial(*args, **kwargs)
                call = self._call(stream, stream.encoding(bound.arguments), rules)
                pixels = bound.arguments.get(stream.pixels)
                if not call.standalone and isinstance(pixels, Tensor):
                    cut = self.chunks.plan_chunks(self.adapter, rules.reducer, call.encoding, pixels)
                    if cut is not None:
                        return self._in_pieces(functools.partial(_with_arguments, encode, signature), stream, call, cut)
                plain = encode(*args, **kwargs) if call.run_stock_too else None
                self.state.encode_contexts.append(call)
                try:
                    output = encode(*args, **kwargs)
                finally:
                    self.state.encode_contexts.pop()
                output = self._finish(output, call)
                return output if plain is None else self._beside(plain, output, call)

        return encode_and_reduce

    def _in_pieces(self, encode: Callable[[dict[str, Any]], Any], stream: Modality, call: EncodeContext, cut: ChunkPlan) -> Any:
        """The output of an encoder call for clips, piece by piece."""
        gathered = ChunkedFeatures(cut)
        for piece in cut.chunks:
            one = self._call(stream, self.adapter.slice_frames(call.encoding, piece.video, piece.steps), call.config)
            one.is_chunk = True
            self.state.encode_contexts.append(one)
            try:
                output = encode(one.encoding.arguments)
            finally:
                self.state.encode_contexts.pop()
            gathered.add(self.adapter, piece, one, output)
        rows, levels, call.signals = gathered.concatenate()
        projects = gathered.projects
        del gathered, one  # what they hold of the whole clip is in ``rows`` now
        if projects:
            rows = self._projected(stacked(rows), call, cut)
        for name in ("last_hidden_state", "hidden_states", "attentions"):  # of the last piece only
            if getattr(output, name, None) is not None:
                setattr(output, name, None)
        if levels:
            output.deepstack_features = levels
        output = self._finish(output, call, rows)
        getattr(output, ENCODED).repeated_parts = cut.repeated_steps
        return output

    def _projected(self, features: Tensor, call: EncodeContext, cut: ChunkPlan) -> list[Tensor]:
        """Rows of clips [B, N, C] in front of a point-wise projector -> those behind it, the missing ones marked."""
        projector = self.adapter.pointwise_projector
        assert projector is not None
        merged = self._reduced(call, features, features)
        if merged is None:
            return [cut.reused_steps(clip, projector.forward(cut.encoded_steps(clip, rows)[None])[0]) for clip, rows in enumerate(features)]
        assert call.pending_features is not None
        return list(_marked(projector.forward(merged), call.pending_features, features.shape[1]))

    def _call(self, stream: Modality, encoding: Encoding, rules: ActiveConfig) -> EncodeContext:
        aside = not (self.state.forward_contexts or self.state.generate_preparations)
        twice = aside and rules.tower_reducer is not None and rules.tower_reducer.prunes_inside
        aside = aside and not twice
        skips = not aside and self._skips(rules.reducer, encoding)
        begun = len(self.state.forward_contexts), len(self.state.generate_prompts)
        each, learns = reduces_per_crop(rules.reducer, stream.each), self.module is not None and torch.is_grad_enabled()
        return EncodeContext(encoding, rules, aside, each, skips, self._prompt(), twice, begun, learns=learns)

    def _check_nested(self, stream: Modality) -> None:
        """An encoder method may call that of another stream; whoever encodes pictures from inside the tower that works on some is refused."""
        running = self.state.encode_contexts[-1]
        if running.begun != (len(self.state.forward_contexts), len(self.state.generate_prompts)) or any(c.encoding.stream == stream.name for c in self.state.encode_contexts):
            raise RuntimeError(
                f"{type(self.adapter.model).__name__} was called with pictures from inside its own vision tower (by a hook?) while a reducer is "
                "attached: what both calls record would mix. Call it when this call has ended, or from a hook of the decoder"
            )

    def _prompt(self) -> PromptText | None:
        """The text around this encoder call."""
        if self.state.forward_contexts:
            call = self.state.forward_contexts[-1]
            return PromptText(call.input_ids, call.input_embeds if call.input_ids is None else None, call.attention_mask, call.labels)
        return self.state.generate_prompts[-1] if self.state.generate_preparations and self.state.generate_prompts else None

    def _beside(self, plain: Any, output: Any, call: EncodeContext) -> Any:
        """What the stock model gives to who calls the encoder himself, with the rows that ``output`` of a reduced tower holds beside it."""
        encoded: EncodedFeatures = getattr(output, ENCODED)
        encoded.reduced_rows, encoded.rows = encoded.rows, self.adapter.spans(plain, call.encoding)
        setattr(plain, ENCODED, encoded)
        return plain

    def _skips(self, reducer: Reducer, encoding: Encoding) -> bool:
        """Training runs the tower as it is: whoever shards or differentiates it counts on every layer."""
        reduces = isinstance(reducer, EncoderReducer | DecoderReducer)
        return self.skips_unused_layers and reduces and not torch.is_grad_enabled() and self.adapter.uses_default_layers(encoding)

    def instead_of(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a tower layer that nobody reads."""

        def pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.state.encode_contexts and self.state.encode_contexts[-1].skips_unused_layers:
                return hidden_states
            return forward(hidden_states, *args, **kwargs)

        return pass_on

    def after_attention(self, attention: nn.Module, args: Any, output: Any) -> None:
        """Post-hook of a recorded attention: nothing of it may live on beside what the layer's MLP needs, unless the choice still waits
        for the features, or for another layer."""
        call = self.state.encode_contexts[-1] if self.state.encode_contexts else None
        recorded = None if call is None else call.recorded_qk.pop(attention, None)
        if call is None or not recorded or not isinstance(call.config.reducer, EncoderReducer):
            return
        reducer, slots = call.config.reducer, self.signal_layers.slots(attention)
        if call.selection is not None or call.captured_layers & set(slots):
            raise RuntimeError("the vision tower ran twice in one encoder call: nobody knows which of its attentions ranks the tokens")
        call.captured_layers |= set(slots)
        if self._may_merge(call, sum(one.key.shape[0] * one.key.shape[2] for one in recorded)):
            with torch.no_grad(), compat.without_autocast(recorded[0].key):
                recorded = recorded if call.tower_state is None or call.standalone else call.tower_state.record_attention(recorded)
                made = layer_view(self.adapter, recorded, call.encoding, reducer)
            call.signals |= {slot: call.signals.get(slot, {}) | made for slot in slots}
            if len(call.captured_layers) == len(self.signal_layers.attentions) and _chooses_early(reducer) and not call.is_chunk:
                counts = [len(rows) + self.adapter.feeds_cls for rows in next(iter(made.values()))]
                call.selection, call.signals = self._choose(call, counts, lambda: None), {}

    def after_block(self, block: nn.Module, args: Any, output: Any) -> None:
        """Post-hook of a vision layer whose rows the method reads."""
        call = self.state.encode_contexts[-1] if self.state.encode_contexts else None
        if call is None:
            return
        rows = output[0] if isinstance(output, tuple) else output
        slots = self.signal_layers.slots(block)
        if call.learns and not torch.is_grad_enabled() and any(w.requires_grad for w in self.adapter.tower().parameters()):
            raise ValueError(
                f"{call.config.reducer.name} reads layers of the vision tower, whose gradient re-entrant checkpointing "
                "loses: pass gradient_checkpointing_kwargs={'use_reentrant': False}, or freeze the tower"
            )
        if rows.requires_grad and call.learns:  # read behind the tower: what is checkpointed must not save more than its second run
            call.states |= dict.fromkeys(slots, rows)
        else:
            with torch.no_grad():
                self._tell_states(call, slots, rows.detach())

    def _tell_states(self, call: EncodeContext, slots: Iterable[int], rows: Tensor) -> None:
        """Put rows as the blocks have them among the signals of the layers that they are of."""
        tokens = self.adapter.token_rows(rows, call.encoding)
        call.signals |= {slot: call.signals.get(slot, {}) | {"states": tokens} for slot in slots}

    def asks_projector(self, projector: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the projector, for methods that ask it themselves."""
        if self.state.encode_contexts:
            self.state.encode_contexts[-1].projector_args = args, kwargs

    def _may_merge(self, call: EncodeContext, rows: int) -> bool:
        """Whether spans can be reduced at all: no span is larger than all the ``rows`` that the tower looked at and its newlines."""
        if call.tower_state is not None or call.is_chunk:
            return True
        try:
            return call.config.plan_span((rows,), max(self.adapter.num_separator_rows(call.encoding, 1)), call.per_crop).merges
        except ValueError:  # so many rows cannot be reduced so far (or not at all by these settings), fewer may
            return True

    def _left_of(self, call: EncodeContext, parts: list[Tensor]) -> list[list[int] | None]:
        """Per span how many tokens of each part a threshold in the tower left."""
        if call.tower_state is None or not call.config.by_threshold:
            return [None] * len(parts)
        left, fed = iter(call.tower_state.counts), self.adapter.num_cls_rows(call.encoding)
        passes = self.adapter.tokens_per_crop(call.encoding, [len(rows) for rows in parts])
        found = [[next(left) + fed for _ in pictures] for pictures in passes]  # of crops, too, of which packing leaves nothing
        return [[min(n, size) for n, size in zip(some, part_sizes(rows)[0], strict=False)] for some, rows in zip(found, parts, strict=True)]

    # ---- point-wise projector: before it

    def before_projector(self, projector: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Pre-hook of the projector: features [B, N, C] -> surviving rows [B, K, C]."""
        call = self.state.encode_contexts[-1] if self.state.encode_contexts else None
        if call is None or not isinstance(call.config.reducer, EncoderReducer) or Input.PROJECTED_FEATURES in call.config.reducer.requires:
            return None
        reducer = call.config.reducer
        together = self.adapter.projected_together(call.encoding)
        spans = features = args[0].unflatten(0, (-1, together)).flatten(1, 2)
        if call.is_chunk:  # a row of each frame instead: nobody reads what is made of it
            call.unprojected_rows = args[0]
            return (args[0][:, :1], *args[1:])
        if reducer.cls_token:
            features = torch.cat([_cls_of(call, self.adapter), features], 1)
        merged = self._reduced(call, spans, features)
        if call.standalone:
            call.merged_rows = merged
            return None
        return None if merged is None else (merged, *args[1:])

    def _reduced(self, call: EncodeContext, spans: Tensor, features: Tensor) -> Tensor | None:
        """What stays of ``spans`` [B, N, C], chosen among ``features`` (with a CLS row in front if that is fed): [B, K, C]; None: all of them."""
        reducer = call.config.reducer
        assert isinstance(reducer, EncoderReducer)
        choice = self._choice(call, [spans.shape[1]] * spans.shape[0], lambda: features)
        if choice.selection is None:
            return None
        slots = slots_of(choice.selection, reducer)
        call.pending_features = EncodedFeatures(
            call.encoding.stream, [], (), choice.plans, call.config, choice.selection, slots, reducer.cls_token,
            invalid_code=choice.invalid_code, last_rows=spans[:, -1].clone(), last_rows_unprojected=True, tower_survivors=choice.tower_survivors, sizes=choice.sizes,
        )  # fmt: skip
        return _merged(features, choice.selection)

    def after_projector(self, projector: nn.Module, args: tuple[Any, ...], projected: Tensor) -> Tensor | None:
        """Post-hook of the projector: rows [B, K, D] -> [B, N, D] with the missing rows marked."""
        call = self.state.encode_contexts[-1] if self.state.encode_contexts else None
        if call is not None and call.unprojected_rows is not None:
            return projected.expand(-1, call.unprojected_rows.shape[1], -1)
        if call is None or call.pending_features is None:
            return None
        width = call.pending_features.plans[0].tokens
        if call.merged_rows is not None:
            call.pending_features.reduced_rows = list(_marked(projector.forward(call.merged_rows), call.pending_features, width))
            return None
        together = self.adapter.projected_together(call.encoding)
        return _marked(projected, call.pending_features, width).unflatten(1, (together, -1)).flatten(0, 1)

    # ---- grid merger, or a method that reads projected rows: after the call

    def _finish(self, output: Any, call: EncodeContext, rows: list[Tensor] | None = None) -> Any:
        """``rows``: those of the spans, where they are not in ``output``."""
        if not hasattr(output, "pooler_output"):
            raise TypeError(f"{self.adapter.family}: the encoder returned {type(output).__name__}; call it with return_dict=True or detach")
        rows = self.adapter.spans(output, call.encoding) if rows is None else rows
        counts = [len(r) for r in rows]
        encoded = call.pending_features or self._behind(rows, getattr(output, "deepstack_features", None), call)
        encoded.rows = rows
        encoded.grids, encoded.tokens_per_crop = self.adapter.grids(call.encoding, counts), tuple(self.adapter.tokens_per_crop(call.encoding, counts))
        encoded.tower_state = None if call.standalone else call.tower_state
        encoded.spare = self.adapter.spare(call.encoding)
        encoded.projected_rows, encoded.skipped_layers = tuple(self.adapter.projected_rows(call.encoding, counts)), call.skips_unused_layers
        if encoded.finite is None:
            encoded.finite = compat.finite(torch.stack([r.detach().sum(dtype=torch.float32) for r in rows]))
        setattr(output, ENCODED, encoded)
        if not call.standalone:
            publish_features(output, encoded)
            if self.state.forward_contexts:  # inside forward: the decoder of this very call wants them
                self.state.forward_contexts[-1].received[call.encoding.stream] = ReceivedFeatures(encoded.rows, encoded)
        return output

    def _behind(self, rows: list[Tensor], levels: Any, call: EncodeContext) -> EncodedFeatures:
        """Spans reduced behind the encoder call; ``levels`` are rows that later layers add to the same ones."""
        choice = self._choice(call, [len(r) for r in rows], lambda: pad_rows(rows)[0])
        encoded = EncodedFeatures(call.encoding.stream, rows, (), choice.plans, call.config, choice.selection, sizes=choice.sizes)
        if choice.selection is not None:
            encoded.slots, encoded.invalid_code = slots_of(choice.selection, call.config.reducer), choice.invalid_code
            encoded.tower_survivors = choice.tower_survivors
            encoded.last_rows = torch.stack([row[-1] for row in rows])
            features, _ = pad_rows(rows)
            encoded.reduced_rows = _cut(_marked(_merged(features, choice.selection), encoded, features.shape[1]), rows)
            encoded.deepstack_rows = [type(level)(_overwritten(list(level), encoded)) for level in levels or ()]
        return encoded

    # ---- both

    def _choice(self, call: EncodeContext, counts: list[int], features: Features) -> SpanSelection:
        """What was chosen in front of the features, or is chosen now that they are there."""
        if call.selection is None:
            choice = self._choose(call, counts, features)
            call.signals = {}
            return choice
        chosen_for = [plan.tokens for plan in call.selection.plans]
        if chosen_for != counts:
            raise RuntimeError(
                f"{self.adapter.family}: tokens were chosen among {chosen_for}, but the encoder made {counts} of them: call it with the "
                "settings of the model's config, or use handle.paused()"
            )
        return call.selection

    def _choose(self, call: EncodeContext, counts: list[int], features: Features) -> SpanSelection:
        """Plans and selection for spans of ``counts`` rows; ``features`` makes [B, N, C], a CLS row in front if it is fed, or None."""
        reducer = call.config.reducer
        parts = self.adapter.parts(call.encoding, counts)
        plans = plan_spans(call.config.plan_span, parts, call.per_crop, self._left_of(call, parts), self.adapter.num_cls_rows(call.encoding))
        sizes = tuple(part_sizes(rows)[0] for rows in parts)
        if not isinstance(reducer, EncoderReducer) or not any(plan.merges for plan in plans):
            return SpanSelection(plans, sizes=sizes)
        if reducer.cls_token:
            self.adapter.cls_module()  # raises: no CLS row here
            parts = [nn.functional.pad(rows, (1, 0)) for rows in parts]
        width = max(map(len, parts))
        layers = self._layers(call, width) if reducer.requires & VISION_LAYER_INPUTS else ()
        rows = features()
        shown = next(x for x in (*(x for layer in layers for x in layer.tensors()), rows) if x is not None)
        left = None if call.tower_state is None else self._left(call, width).to(shown.device)
        with torch.set_grad_enabled(call.learns), compat.without_autocast(shown):
            read = self._read(call, counts, width, shown.device, layers)
            selection, wrong, content = select_tokens(
                reducer, plans, parts, layers, rows, stream=call.encoding.stream, each=call.per_crop, left=left, read=read
            )
        if call.tower_state is not None:
            wrong = torch.maximum(wrong, call.tower_state.invalid_code.to(wrong.device))
        return SpanSelection(plans, selection, wrong, None if left is None else content, sizes)

    def _left(self, call: EncodeContext, width: int) -> Tensor:
        """[B, N] bool: the rows that went through the tower."""
        left, _ = pad_rows([rows[:, 0] > 0.5 for rows in self.adapter.patches_to_tokens(call.tower_state.survivors(), call.encoding)])
        return nn.functional.pad(left, (width - left.shape[1], 0), value=True)  # a CLS row in front never leaves

    def _layers(self, call: EncodeContext, width: int) -> tuple[LayerView, ...]:
        for slot, rows in call.states.items():
            self._tell_states(call, (slot,), rows)
        call.states = {}
        views, finite = layer_views(call, len(self.signal_layers.blocks), width)
        check_finite(finite, "the vision attention scores")
        return views

    def _read(self, call: EncodeContext, counts: list[int], width: int, device: torch.device, layers: tuple[LayerView, ...]) -> dict[str, Any]:
        """The inputs beside layers and features that the method requires."""
        reducer = call.config.reducer
        assert isinstance(reducer, EncoderReducer)
        made: dict[str, Any] = {}
        if Input.GRID in reducer.requires:
            made |= grid_of(self.adapter, call.encoding, counts, width, device)
        if reducer.requires & QUESTION_INPUTS:
            asked = question_of(self.adapter, call.prompt, call.encoding.stream, counts, reducer.name, call.learns)
            made["question"] = asked.question
            if Input.QUESTION_STATE in reducer.requires:
                made["question_state"] = question_state(self.adapter, asked, self.state)
            if Input.TEXT_SIMILARITY in reducer.requires:
                made |= self.text_encoder.similar(layers[0].states, asked, self.adapter.family)
        if Input.PROJECTOR in reducer.requires:
            made["project"] = projector_function(self.adapter, call)
        if reducer.trained_reducer is not None:
            made["module"] = self.module
        return made


def _chooses_early(reducer: EncoderReducer) -> bool:
    """Whether a method needs nothing of what comes behind the attention of the layers that it names."""
    return not reducer.requires & (FEATURE_INPUTS | {Input.STATES, Input.PROJECTOR})


def _with_arguments(encode: Callable[..., Any], signature: inspect.Signature, arguments: dict[str, Any]) -> Any:
    """``encode`` called with what it was bound to, by name: its wrappers add defaults by name, too."""
    named = dict(arguments)
    more = [named.pop(name, {}) for name, known in signature.parameters.items() if known.kind is known.VAR_KEYWORD]
    return encode(**named, **(more[0] if more else {}))


def publish_features(output: Any, encoded: EncodedFeatures) -> None:
    """Put the reduced rows in the place of those that the encoder made, if it has reduced any."""
    rows = encoded.rows if encoded.reduced_rows is None else encoded.reduced_rows
    made = output.pooler_output
    output.pooler_output = stacked(rows) if isinstance(made, Tensor) else type(made)(rows)
    if encoded.deepstack_rows:
        output.deepstack_features = encoded.deepstack_rows
    encoded.rows, encoded.reduced_rows = list(output.pooler_output), None


def _marked(rows: Tensor, encoded: EncodedFeatures, width: int) -> Tensor:
    """[B, K, D] -> [B, width, D]: rows in their slots, all others marked."""
    selection = encoded.selection
    assert selection is not None
    encoded.finite = compat.finite(rows.masked_fill(~selection.valid[..., None], 0))
    return _placed(rows, encoded, rows.new_full((rows.shape[0], width + 1, rows.shape[2]), MARK))


def _overwritten(rows: list[Tensor], encoded: EncodedFeatures) -> list[Tensor]:
    """Rows of a later level [n, D] with merged ones in their slots; nobody reads those that left, so they stay as they are. What a module made of
    the first level is nothing to the later ones, which are merged by weight."""
    features, _ = pad_rows(rows)
    assert encoded.selection is not None
    merged = _merged(features, dataclasses.replace(encoded.selection, custom_rows=None))
    return _cut(_placed(merged, encoded, nn.functional.pad(features, (0, 0, 0, 1))), rows)


def _merged(features: Tensor, selection: Selection) -> Tensor:
    """[B, N, C] -> [B, K, C], in float32 also where autocast runs around it."""
    with compat.without_autocast(features):
        return merged_rows(features, selection)


def _placed(rows: Tensor, encoded: EncodedFeatures, onto: Tensor) -> Tensor:
    """``rows`` [B, K, D] written in their slots of ``onto`` [B, N + 1, D], those that do not exist in its last one: its others [B, N, D]."""
    selection, slots = encoded.selection, encoded.slots
    assert selection is not None and slots is not None
    width = onto.shape[1] - 1
    return onto.scatter_(1, torch.where(selection.valid, slots, width)[..., None].expand_as(rows), rows)[:, :width]


def _cut(padded: Tensor, rows: list[Tensor]) -> list[Tensor]:
    return [row[: len(old)] for row, old in zip(padded, rows, strict=True)]


def _cls_of(call: EncodeContext, adapter: Adapter) -> Tensor:
    if call.cls_row is None:
        adapter.cls_module()
        raise RuntimeError("the CLS row was not recorded; detach and attach again")
    return call.cls_row


def check_finite(flag: Tensor, what: str) -> None:
    """Raise if a device flag says that something is not finite. Read at once on the CPU only: elsewhere the entry read covers the rows."""
    if flag.device.type == "cpu" and not bool(flag):
        raise not_finite(what)
