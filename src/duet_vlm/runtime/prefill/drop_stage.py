"""One decoder stage: the view of the method, its decision, and the tokens that continue."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.ops.merge import merged_rows
from duet_vlm.ops.ragged import gather_rows, pack_left, pack_right, upload
from duet_vlm.planning.tokens import Selection, TokenMap
from duet_vlm.reducers.decoder import DecoderReducer, DecoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.runtime.prefill.attention_scores import Signals, TextAttentionScorer, layer_device
from duet_vlm.runtime.prefill.span_rows import SpanRows
from duet_vlm.runtime.prompt import LayerGroup, PromptState
from duet_vlm.runtime.validation import check_mask, check_rows


@dataclass(frozen=True)
class StageDecision:
    """The decision of one stage.

    Attributes
    ----------
    kept : Tensor
        [B, T] bool, visual tokens that are kept.
    selection : Selection or None
        Where tokens are merged, the selection among ``rows``.
    rows : Tensor or None
        [B, V] row numbers of the visual tokens that the method ranked.
    """

    kept: Tensor
    selection: Selection | None = None
    rows: Tensor | None = None

    def by_prompt_position(self, tokens: TokenMap) -> Selection | None:
        """The selection with prompt positions instead of numbers of visual tokens."""
        if self.selection is None or self.rows is None:
            return None
        slot = tokens.prompt_index.gather(1, self.rows)
        return replace(
            self.selection,
            index=slot.gather(1, self.selection.index),
            source_tokens=slot.gather(1, self.selection.source_tokens),
        )


@dataclass(frozen=True)
class StageGather:
    """The tokens that continue after a stage.

    Attributes
    ----------
    index, valid : Tensor
        [B, T'] rows before the stage.
    decision : StageDecision
        The method's decision.
    positions : Tensor or None
        [B, K] rows that merged tokens are written to (T' for none).
    """

    index: Tensor
    valid: Tensor
    decision: StageDecision
    positions: Tensor | None = None

    @classmethod
    def of(cls, decision: StageDecision, keep: Tensor, width: int, in_order: bool) -> StageGather:
        """Gather of the tokens ``keep`` [B, T] bool, at most ``width`` per sample.

        ``in_order``: their order is unchanged.
        """
        index, valid = pack_left(keep, width)
        selection, rows = decision.selection, decision.rows
        if selection is None or rows is None:
            return cls(index, valid, decision)
        anchors = rows.gather(1, selection.index)
        if in_order:
            row_of = torch.zeros_like(keep, dtype=torch.long).scatter(
                1, index, torch.arange(width, device=keep.device).expand_as(index)
            )
            positions = row_of.gather(1, anchors)
        else:
            visual = decision.kept.gather(1, index) & valid
            positions = pack_right(visual, width)[0][:, : anchors.shape[1]]
            positions = nn.functional.pad(positions, (0, anchors.shape[1] - positions.shape[1]))
        positions = positions.masked_fill(~selection.valid, width)
        if not in_order:
            padded = nn.functional.pad(index, (0, 1))
            index = padded.scatter(1, positions, anchors)[:, :-1]
        return cls(index, valid, decision, positions)

    def rows_of(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> [B, T', D]."""
        kept = gather_rows(hidden, self.index.to(hidden.device))
        selection, rows = self.decision.selection, self.decision.rows
        if selection is None or rows is None or self.positions is None:
            return kept
        merged = merged_rows(gather_rows(hidden, rows), selection)
        padded = nn.functional.pad(kept, (0, 0, 0, 1))
        return padded.scatter(1, self.positions[..., None].expand_as(merged), merged)[:, :-1]


def replay(earlier: LayerGroup, tokens: TokenMap, prompt_len: int, num_prunable: int) -> StageDecision:
    """The decision of an earlier pass over the same prompt, for the current tokens; after a shorter prompt new
    positions are text."""
    kept = tokens.visual.new_zeros(len(tokens.prompt_index), prompt_len, dtype=torch.long)
    before = earlier.tokens.to(kept.device)
    kept = kept.scatter_add(1, before.prompt_index, before.visual.long())
    still_kept = tokens.visual & kept.gather(1, tokens.prompt_index).bool()
    if earlier.merged_into is None:
        return StageDecision(still_kept)
    rows, valid = pack_right(tokens.prunable, num_prunable)
    position = tokens.prompt_index.gather(1, rows).masked_fill(~valid, prompt_len)
    number = torch.zeros(len(position), prompt_len + 1, dtype=torch.long, device=position.device)
    number = number.scatter(1, position, torch.arange(position.shape[1], device=position.device).expand_as(position))
    index = number.gather(1, earlier.merged_into.index.to(position.device))
    members = number.gather(1, earlier.merged_into.source_tokens.to(position.device))
    return StageDecision(still_kept, replace(earlier.merged_into, index=index, source_tokens=members), rows)


def decide_stage(
    prompt_state: PromptState, scorer: TextAttentionScorer, index: int, tokens: TokenMap, signals: Signals
) -> StageDecision:
    """The method's decision for the visual tokens before layer ``index``; ``signals`` have one row for each token."""
    reducer = scorer.reducer
    num_before = prompt_state.num_prunable(prompt_state.candidate_layer(index))
    num_kept = prompt_state.num_prunable(index)
    rows, valid = pack_right(tokens.prunable, max(map(sum, num_before)))
    columns = {
        name: gather_rows(x, rows)
        for name, x in signals.items()
        if name != "hidden_states" or Input.HIDDEN_STATES in reducer.requires
    }
    if Input.POSITIONS in reducer.requires:
        signals["positions"] = (
            prompt_state.prompt.valid.to(rows.device).long().cumsum(1).sub(1).gather(1, tokens.prompt_index)
        )
        columns["positions"] = gather_rows(signals["positions"], rows)
    if Input.TAGS in reducer.requires:
        columns["tags"] = gather_rows(_tags(prompt_state, tokens), rows)
    text = (
        _text_signals(scorer, tokens, signals)
        if reducer.requires & {Input.TEXT_HIDDEN_STATES, Input.DECODER_KEYS, Input.POSITIONS}
        else {}
    )
    fields: dict[str, Any] = {"method": reducer.name, "final_norm": functools.partial(_final_norm, scorer)}
    if Input.TOKENS in reducer.requires:
        fields["spans"], columns["span_index"], columns["token_index"] = _span_and_token(prompt_state, tokens, rows)
        fields["grids"] = tuple(span.grid for sample in prompt_state.spans for span in sample)
    if reducer.options.multi_image == "joint":
        counts = tuple(zip(map(sum, num_before), map(sum, num_kept), strict=True))
        return _checked_decision(
            prompt_state, reducer, _view(valid, counts, fields | columns | text), tokens, rows, None
        )
    layout = SpanRows.of(num_before, rows.shape[1], rows.device)
    counts = tuple(
        pair for before, after in zip(num_before, num_kept, strict=True) for pair in zip(before, after, strict=True)
    )
    owner = upload(layout.owners, rows.device)
    columns = {name: layout.take(x) for name, x in columns.items()} | {name: x[owner] for name, x in text.items()}
    return _checked_decision(prompt_state, reducer, _view(layout.valid, counts, fields | columns), tokens, rows, layout)


def _view(valid: Tensor, counts: tuple[tuple[int, int], ...], fields: dict[str, Any]) -> DecoderView:
    """The view of the method; ``counts`` are (before, kept) per row."""
    return DecoderView(valid, upload([num_kept for _, num_kept in counts], valid.device), host_counts=counts, **fields)


def _checked_decision(
    prompt_state: PromptState,
    reducer: DecoderReducer,
    view: DecoderView,
    tokens: TokenMap,
    rows: Tensor,
    layout: SpanRows | None,
) -> StageDecision:
    """The method's decision on ``view``, checked.

    ``rows`` [B, V] are the numbers of its columns among ``tokens``, by ``layout`` if given.
    """
    result = reducer.prune_tokens(view)
    if isinstance(result, Selection):
        selection, invalid_code = check_rows(reducer, result, view)
        kept = torch.zeros_like(view.valid).scatter_reduce(1, selection.index, selection.valid, "amax")
        selection = (
            selection if layout is None else layout.join(selection, [num_kept for _, num_kept in view.host_counts])
        )
    else:
        selection = None
        kept, invalid_code = check_mask(reducer, result, view.valid, view.num_keep)
    prompt_state.pending.invalid_code.append(invalid_code)
    kept = kept if layout is None else layout.put(kept)
    kept = torch.zeros_like(tokens.visual).scatter(1, rows, kept)
    return StageDecision(kept, selection, None if selection is None else rows)


def _text_signals(scorer: TextAttentionScorer, tokens: TokenMap, signals: Signals) -> Signals:
    """The declared signals of the text queries."""
    index, valid = scorer.text_rows(tokens)
    text_signals = {"text_valid": valid}
    if Input.TEXT_HIDDEN_STATES in scorer.reducer.requires:
        text_signals["text_hidden_states"] = gather_rows(signals["hidden_states"], index)
    for name in {"keys", "positions"} & signals.keys():
        text_signals[f"text_{name}"] = gather_rows(signals[name], index)
    return text_signals


def _final_norm(scorer: TextAttentionScorer, rows: Tensor) -> Tensor:
    """Hidden states after the decoder's final norm."""
    norm = scorer.adapter.text_model.norm
    return norm(rows.to(layer_device(norm, rows))).to(rows.device)


def _tags(prompt_state: PromptState, tokens: TokenMap) -> Tensor:
    """The tags that the encoder stage gave the current tokens: [B, T] float32."""
    device = tokens.prompt_index.device
    sources = iter(prompt_state.sources)
    table = torch.zeros(
        len(prompt_state.spans),
        max(1, *(sum(span.tokens for span in row) for row in prompt_state.spans)),
        device=device,
    )
    for sample_tags, spans in zip(table, prompt_state.spans, strict=True):
        for span, (encoded, number) in zip(spans, sources, strict=False):
            selection = encoded.selection
            if selection is not None and selection.tags is not None:
                assert encoded.slots is not None
                positions = torch.where(selection.valid[number], encoded.slots[number], span.tokens).to(device)
                span_tags = torch.zeros(span.tokens + 1, device=device).scatter(
                    0, positions, selection.tags[number].to(device)
                )
                sample_tags[span.offset : span.offset + span.tokens] = span_tags[:-1]
    rank = (
        (prompt_state.prompt.visual.to(device).cumsum(1) - 1)
        .clamp(0, table.shape[1] - 1)
        .gather(1, tokens.prompt_index)
    )
    return table.gather(1, rank).masked_fill(~tokens.visual, 0)


def _span_and_token(
    prompt_state: PromptState, tokens: TokenMap, rows: Tensor
) -> tuple[tuple[tuple[int, int], ...], Tensor, Tensor]:
    """For the visual tokens ``rows`` [B, V]: the spans as (number in the sample, size), and each token's span and
    number in it."""
    device = rows.device
    spans = tuple((number, span.tokens) for row in prompt_state.spans for number, span in enumerate(row))
    rank = (prompt_state.prompt.visual.to(device).cumsum(1) - 1).clamp(min=0)  # visual rank of every prompt position
    rank = gather_rows(rank, gather_rows(tokens.prompt_index, rows))
    per_sample = max(len(row) for row in prompt_state.spans)
    offsets = [
        [s.offset for s in row] + [prompt_state.prompt_len] * (per_sample - len(row)) for row in prompt_state.spans
    ]
    starts = upload(offsets, device)
    first = upload(
        [sum(len(other) for other in prompt_state.spans[:b]) for b in range(len(prompt_state.spans))], device
    )
    number = ((rank[..., None] >= starts[:, None]).sum(-1) - 1).clamp(min=0)
    token = rank - starts.gather(1, number).clamp(max=prompt_state.prompt_len)
    return spans, (first[:, None] + number).clamp(max=len(spans) - 1), token.clamp(min=0)
