"""One drop inside the decoder: what the method is shown, what it decides, and the rows that go on."""

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
from duet_vlm.runtime.decode.cache import LayerGroup, PromptState
from duet_vlm.runtime.prefill.attention_scores import Signals, TextAttentionScorer, layer_device
from duet_vlm.runtime.prefill.span_rows import SpanRows
from duet_vlm.runtime.validation import check_mask, check_rows


@dataclass(frozen=True)
class StageDecision:
    """``stays`` [B, T] bool, visual rows that go on; where some are merged, ``selection`` among the visual rows ``rows`` [B, V]."""

    kept: Tensor
    selection: Selection | None = None
    rows: Tensor | None = None

    def by_prompt_position(self, tokens: TokenMap) -> Selection | None:
        """The selection with prompt slots in place of numbers of visual rows."""
        if self.selection is None or self.rows is None:
            return None
        slot = tokens.prompt_index.gather(1, self.rows)
        return replace(self.selection, index=slot.gather(1, self.selection.index), source_tokens=slot.gather(1, self.selection.source_tokens))


@dataclass(frozen=True)
class StageGather:
    """The rows that go on: ``chosen`` [B, T'] of those before, ``valid`` [B, T']; merged ones stand at ``places`` [B, K] (T' for none)."""

    index: Tensor
    valid: Tensor
    decision: StageDecision
    positions: Tensor | None = None

    @classmethod
    def of(cls, decided: StageDecision, keep: Tensor, width: int, in_order: bool) -> StageGather:
        """``keep`` [B, T] bool are all rows that go on, ``width`` the most of a sample; ``in_order``: none passes another."""
        chosen, valid = pack_left(keep, width)
        selection, rows = decided.selection, decided.rows
        if selection is None or rows is None:
            return cls(chosen, valid, decided)
        anchors = rows.gather(1, selection.index)
        if in_order:
            place = torch.zeros_like(keep, dtype=torch.long).scatter(1, chosen, torch.arange(width, device=keep.device).expand_as(chosen))
            places = place.gather(1, anchors)
        else:
            visual = decided.kept.gather(1, chosen) & valid
            places = pack_right(visual, width)[0][:, : anchors.shape[1]]
            places = nn.functional.pad(places, (0, anchors.shape[1] - places.shape[1]))
        places = places.masked_fill(~selection.valid, width)
        if not in_order:
            spare = nn.functional.pad(chosen, (0, 1))
            chosen = spare.scatter(1, places, anchors)[:, :-1]
        return cls(chosen, valid, decided, places)

    def rows_of(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> [B, T', D]."""
        gone_on = gather_rows(hidden, self.index.to(hidden.device))
        selection, rows = self.decision.selection, self.decision.rows
        if selection is None or rows is None or self.positions is None:
            return gone_on
        merged = merged_rows(gather_rows(hidden, rows), selection)
        spare = nn.functional.pad(gone_on, (0, 0, 0, 1))
        return spare.scatter(1, self.positions[..., None].expand_as(merged), merged)[:, :-1]


def replay(then: LayerGroup, tokens: TokenMap, slots: int, most: int) -> StageDecision:
    """What an earlier pass over the same prompt (or a shorter one: new slots are text) decided, for the rows that are there now."""
    kept = tokens.visual.new_zeros(len(tokens.prompt_index), slots, dtype=torch.long)
    before = then.tokens.to(kept.device)
    kept = kept.scatter_add(1, before.prompt_index, before.visual.long())
    stays = tokens.visual & kept.gather(1, tokens.prompt_index).bool()
    if then.merged_into is None:
        return StageDecision(stays)
    rows, real = pack_right(tokens.prunable, most)
    slot = tokens.prompt_index.gather(1, rows).masked_fill(~real, slots)
    number = torch.zeros(len(slot), slots + 1, dtype=torch.long, device=slot.device)
    number = number.scatter(1, slot, torch.arange(slot.shape[1], device=slot.device).expand_as(slot))
    index, members = (number.gather(1, x.to(slot.device)) for x in (then.merged_into.index, then.merged_into.source_tokens))
    return StageDecision(stays, replace(then.merged_into, index=index, source_tokens=members), rows)


def decide_stage(run: PromptState, ranking: TextAttentionScorer, index: int, tokens: TokenMap, made: Signals) -> StageDecision:
    """What the method keeps of the visual rows in front of layer ``index``, and merges; ``made`` are its signals, a row for every row."""
    reducer = ranking.reducer
    alive, kept = run.ranked(index - 1), run.ranked(index)
    rows, real = pack_right(tokens.prunable, max(map(sum, alive)))
    columns = {name: gather_rows(x, rows) for name, x in made.items() if name != "hidden_states" or Input.HIDDEN_STATES in reducer.requires}
    if Input.POSITIONS in reducer.requires:
        made["positions"] = run.prompt.valid.to(rows.device).long().cumsum(1).sub(1).gather(1, tokens.prompt_index)
        columns["positions"] = gather_rows(made["positions"], rows)
    if Input.TAGS in reducer.requires:
        columns["tags"] = gather_rows(_notes(run, tokens), rows)
    text = _text(ranking, tokens, made) if reducer.requires & {Input.TEXT_HIDDEN_STATES, Input.DECODER_KEYS, Input.POSITIONS} else {}
    facts: dict[str, Any] = {"method": reducer.name, "final_norm": functools.partial(_normed, ranking)}
    if Input.TOKENS in reducer.requires:
        facts["spans"], columns["span_index"], columns["token_index"] = _provenance(run, tokens, rows)
        facts["grids"] = tuple(span.grid for sample in run.spans for span in sample)
    if reducer.multi_image == "joint":
        counts = tuple(zip(map(sum, alive), map(sum, kept), strict=True))
        return _decided(run, reducer, _view(real, counts, facts | columns | text), rows, None)
    layout = SpanRows.of(alive, rows.shape[1], rows.device)
    counts = tuple(pair for before, after in zip(alive, kept, strict=True) for pair in zip(before, after, strict=True))
    owner = upload(layout.owners, rows.device)
    columns = {name: layout.take(x) for name, x in columns.items()} | {name: x[owner] for name, x in text.items()}
    return _decided(run, reducer, _view(layout.valid, counts, facts | columns), rows, layout)


def _view(valid: Tensor, counts: tuple[tuple[int, int], ...], facts: dict[str, Any]) -> DecoderView:
    return DecoderView(valid, upload([stay for _, stay in counts], valid.device), host_counts=counts, **facts)


def _decided(run: PromptState, reducer: DecoderReducer, view: DecoderView, rows: Tensor, layout: SpanRows | None) -> StageDecision:
    """What the method makes of ``view``, checked; ``rows`` [B, V] are the rows that its columns stand for, by ``layout`` if that is given."""
    chosen = reducer.prune_tokens(view)
    if isinstance(chosen, Selection):
        selection, wrong = check_rows(reducer, chosen, view)
        stays = torch.zeros_like(view.valid).scatter_reduce(1, selection.index, selection.valid, "amax")
        selection = selection if layout is None else layout.join(selection, [stay for _, stay in view.host_counts])
    else:
        selection = None
        stays, wrong = check_mask(reducer, chosen, view.valid, view.num_keep)
    run.invalid_code.append(wrong)
    stays = stays if layout is None else layout.put(stays)
    whole = torch.zeros(len(rows), run.layer_groups[-1].width, dtype=torch.bool, device=rows.device)
    return StageDecision(whole.scatter(1, rows, stays), selection, None if selection is None else rows)


def _text(ranking: TextAttentionScorer, tokens: TokenMap, made: Signals) -> Signals:
    """The same signals of the text queries."""
    index, valid = ranking.text_rows(tokens)
    found = {"text_valid": valid}
    if Input.TEXT_HIDDEN_STATES in ranking.reducer.requires:
        found["text_hidden_states"] = gather_rows(made["hidden_states"], index)
    for name in {"keys", "positions"} & made.keys():
        found[f"text_{name}"] = gather_rows(made[name], index)
    return found


def _normed(ranking: TextAttentionScorer, rows: Tensor) -> Tensor:
    norm = ranking.adapter.text_model.norm
    return norm(rows.to(layer_device(norm, rows))).to(rows.device)


def _notes(run: PromptState, tokens: TokenMap) -> Tensor:
    """What the method noted of the current rows before the decoder: [B, T] float32."""
    device, sources = tokens.prompt_index.device, iter(run.sources)
    table = torch.zeros(len(run.spans), max(1, *(sum(span.tokens for span in row) for row in run.spans)), device=device)
    for here, spans in zip(table, run.spans, strict=True):
        for span, (encoded, number) in zip(spans, sources, strict=False):
            selection = encoded.selection
            if selection is not None and selection.tags is not None:
                slots = torch.where(selection.valid[number], encoded.slots[number], span.tokens).to(device)
                noted = torch.zeros(span.tokens + 1, device=device).scatter(0, slots, selection.tags[number].to(device))
                here[span.offset : span.offset + span.tokens] = noted[:-1]
    rank = (run.prompt.visual.to(device).cumsum(1) - 1).clamp(0, table.shape[1] - 1).gather(1, tokens.prompt_index)
    return table.gather(1, rank).masked_fill(~tokens.visual, 0)


def _provenance(run: PromptState, tokens: TokenMap, rows: Tensor) -> tuple[tuple[tuple[int, int], ...], Tensor, Tensor]:
    """For the visual rows [B, V]: the spans as (number in the sample, size), and each row's span and token number."""
    device = rows.device
    spans = tuple((number, span.tokens) for row in run.spans for number, span in enumerate(row))
    rank = (run.prompt.visual.to(device).cumsum(1) - 1).clamp(min=0)  # visual rank of every prompt slot
    rank = gather_rows(rank, gather_rows(tokens.prompt_index, rows))
    per_sample = max(len(row) for row in run.spans)
    offsets = [[s.offset for s in row] + [run.prompt_len] * (per_sample - len(row)) for row in run.spans]
    starts = upload(offsets, device)
    first = upload([sum(len(r) for r in run.spans[:b]) for b in range(len(run.spans))], device)
    number = ((rank[..., None] >= starts[:, None]).sum(-1) - 1).clamp(min=0)
    token = rank - starts.gather(1, number).clamp(max=run.prompt_len)
    return spans, (first[:, None] + number).clamp(max=len(spans) - 1), token.clamp(min=0)
