"""Where the decoder begins: marked rows leave, and everything indexed by row shrinks with them: embeddings, masks, positions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from duet_vlm.inputs.text_queries import query_rows
from duet_vlm.models.adapter import FULL, SLIDING, Adapter
from duet_vlm.ops.ragged import gather_rows, pack_left, upload
from duet_vlm.planning.budget import SpanPlan
from duet_vlm.planning.tokens import Span, TokenMap
from duet_vlm.reducers.inputs import Input
from duet_vlm.runtime import compat
from duet_vlm.runtime.active_config import ActiveConfig
from duet_vlm.runtime.context import ForwardContext
from duet_vlm.runtime.decode.cache import (
    DecodePass,
    LayerGroup,
    PromptState,
    ProtectedCount,
    PrunedCacheMixin,
    RankingGroup,
    bind_prompt,
    unbind_prompt,
)
from duet_vlm.runtime.encode.encoder import is_marked
from duet_vlm.runtime.prefill.layers import PrefillPass
from duet_vlm.runtime.prefill.masks import cut_mask, documents, real_rows, window
from duet_vlm.runtime.prefill.positions import entry_positions, next_positions, prompt_positions
from duet_vlm.runtime.prefill.prompt_layout import (
    PromptLayout,
    SpansBySample,
    assign_spans,
    check_pictures,
    predicting_rows,
    read_layout,
    rows_that_stay,
    span_ends,
    spans_of,
)


def begin_decoder(adapter: Adapter, call: ForwardContext, kwargs: dict[str, Any]) -> DecodePass | PrefillPass | None:
    """Prepare one call of the decoder stack; ``kwargs`` are changed in place. None: nothing to do, the stock path runs."""
    cache = kwargs.get("past_key_values")
    filled = cache is not None and int(cache.get_seq_length()) > 0
    if not filled:
        unbind_prompt(cache)
    if isinstance(cache, PrunedCacheMixin):
        if call.received:
            raise ValueError("new image on a reduced cache: start a new conversation (no past_key_values) or detach")
        cache.duet_prompt_state.num_decoded += kwargs["inputs_embeds"].shape[1]
        return DecodePass(adapter, cache, call.attention_mask, kwargs)
    rules = next((arrived.decisions.config for arrived in call.received.values() if arrived.decisions is not None), call.config)
    if rules is None:
        return None
    if filled and call.received:
        raise ValueError("new image on a cache that already holds tokens: start a new conversation (no past_key_values) or detach")
    if not call.placeholders or filled:
        return None
    return _prefill(adapter, rules, call, kwargs)


def _prefill(adapter: Adapter, rules: ActiveConfig, call: ForwardContext, kwargs: dict[str, Any]) -> PrefillPass | None:
    embeds, cache, reducer = kwargs["inputs_embeds"], kwargs.get("past_key_values"), rules.reducer
    valid = real_rows(call.attention_mask, embeds)
    places = {name: rows.to(valid.device) for name, rows in call.placeholders.items()}
    visual = torch.stack(list(places.values())).any(0)
    cached = cache is not None or compat.uses_cache(adapter.text_model, kwargs.get("use_cache"))
    stored = _decisions(call, rules) if not cached and call.labels is None and call.received else {}
    stays = left_out = torch.zeros_like(valid)
    if reducer.protect_predicting_tokens and call.received:
        rows = stored.setdefault("predicting", predicting_rows(valid, visual, call.labels, call.num_draft_tokens))
        rows = torch.nn.functional.pad(rows, (0, valid.shape[1] - rows.shape[1]))
        stays, left_out = rows_that_stay(call, rows, places, embeds)
    prompt = TokenMap.identity(valid, visual, stays)
    queries = torch.zeros_like(valid)
    asks = reducer.uses_text_queries()
    if (asks or Input.QUESTION_STATE in reducer.requires) and call.received:
        asking = valid if not call.num_draft_tokens else valid & (torch.arange(valid.shape[1], device=valid.device) < valid.shape[1] - call.num_draft_tokens)
        kind, turns = reducer.text_query, reducer.training_turns
        queries = query_rows(kind, prompt.prunable, asking, call.labels, call.salient_mask, turns)
    begins = documents(kwargs.get("attention_mask"), kwargs.get("position_ids"), valid, cached)
    layout = read_layout(call, reducer, places, valid, queries, stays, left_out, begins)
    check_pictures(call, layout)
    if not call.received:
        return None
    if compat.is_static(cache):
        raise ValueError(
            "static (compilable) caches are not supported while tokens are dropped: use the default dynamic cache or detach; "
            "handle.static_cache makes a static one of a cache that has read the prompt"
        )
    dealt = assign_spans(call, layout)
    spans, sources = spans_of(dealt, layout, places, valid)
    plans = tuple(tuple(encoded.plans[number] for encoded, number in row) for row in sources)
    if reducer.scoring_rules().skip_unanswered and call.labels is not None:
        plans = tuple(_without_drops(row) if not answered else row for row, answered in zip(plans, layout.has_labels, strict=True))
    pools = _pools(plans, spans, layout, prompt, left_out, each=reducer.multi_image == "per_image")
    run = PromptState(rules, embeds.shape[1], spans, pools, prompt, sum(sources, ()), min(layout.num_text_after_image), call.num_draft_tokens)
    run.element_bytes, run.num_real_tokens = embeds.element_size(), valid.sum(1)
    run.reduces = any(plan.entry < plan.tokens or plan.counts[-1] < plan.tokens for row in plans for plan in row)
    call.prompt_state = run
    if any(some.beyond_plan for some in layout.protected):
        kwargs["inputs_embeds"] = _bring_back(adapter, call, dealt, places, left_out, embeds)
    marks = any(arrived.decisions is not None and arrived.decisions.selection is not None for arrived in call.received.values())
    hidden = any(any(counts) for counts in layout.num_masked.values())  # pictures under the caller's mask: rows that may be marked as well
    _remove_marked(run, adapter, layout.lengths, hidden and (marks or run.reduces), kwargs)
    if run.reduces and cached:
        cache = kwargs["past_key_values"] = compat.new_cache(adapter.text_model.config) if cache is None else cache
        bind_prompt(cache, run)
    replay = stored.setdefault("survivors", {}) if run.reduces and not cached else {}
    if replay and reducer.trim_kv_cache:
        raise ValueError(f"{reducer.name}: trim_kv_cache=True takes rows out of a cache, and use_cache=False has none: use a cache, or trim_kv_cache=False")
    return PrefillPass(run, adapter, cache, queries, list(layout.num_queries), kwargs, replay)


def _pools(
    plans: tuple[tuple[SpanPlan, ...], ...], spans: tuple[tuple[Span, ...], ...], layout: PromptLayout, prompt: TokenMap, left_out: Tensor, each: bool
) -> tuple[tuple[RankingGroup, ...], ...]:
    """Which spans are ranked together: all of a sample, or each by itself."""
    if not each:
        return tuple((RankingGroup(row, some),) for row, some in zip(plans, layout.protected, strict=True))
    if not any(some.in_sequence for some in layout.protected):
        return tuple(tuple(RankingGroup((plan,)) for plan in row) for row in plans)
    rank = prompt.visual.cumsum(1) - 1  # one more read, where rows stay and it matters which span they are of
    staying = [[r[m].tolist() for r, m in zip(rank, mask, strict=True)] for mask in (prompt.protected, left_out)]

    def of(sample: int, span: Span) -> ProtectedCount:
        return ProtectedCount(*(sum(span.offset <= r < span.offset + span.tokens for r in ranks[sample]) for ranks in staying))

    return tuple(
        tuple(RankingGroup((plan,), of(sample, span)) for plan, span in zip(row, spans[sample], strict=True)) for sample, row in enumerate(plans)
    )


def _bring_back(adapter: Adapter, call: ForwardContext, dealt: SpansBySample, places: dict[str, Tensor], left_out: Tensor, embeds: Tensor) -> Tensor:
    """Embeddings [B, S, D] with the rows that predict although V2V has left them out: the last tokens of their spans, as the tower made them."""
    for name, arrived in call.received.items():
        encoded = arrived.decisions
        if encoded is None or encoded.last_rows is None:
            continue
        place = span_ends(arrived, places[name])
        numbers = [number for sample in dealt[name] for (_, number), _ in sample]
        rows = encoded.last_rows[upload(numbers, encoded.last_rows.device)]
        rows = adapter.pointwise_projector.forward(rows[:, None])[:, 0] if encoded.last_rows_unprojected and adapter.pointwise_projector is not None else rows
        rows = rows.to(embeds.device, embeds.dtype)[place.clamp(min=0).to(embeds.device)]
        embeds = torch.where((left_out & (place >= 0)).to(embeds.device)[..., None], rows, embeds)
    return embeds


def _decisions(call: ForwardContext, rules: ActiveConfig) -> dict[str, Any]:
    """Without a cache generate() sends the growing prompt again and again: what its first pass decided (rows that predict, survivors by layer)
    is replayed.

    It rides on the encoder output that generate() reuses; a prompt that does not continue the first one decides anew.
    """
    first_arrived = next(iter(call.received.values())).decisions
    assert first_arrived is not None
    stored, ids = first_arrived.decisions, call.input_ids
    if ids is None:
        return {}
    first: Any = stored.get("input_ids")
    same = stored.get("rules") is rules and first is not None and first.shape[0] == ids.shape[0] and first.shape[1] < ids.shape[1]
    if not (same and torch.equal(first, ids[:, : first.shape[1]])):
        stored.clear()
        stored.update(input_ids=ids, rules=rules)
    return stored


def _without_drops(plans: tuple[SpanPlan, ...]) -> tuple[SpanPlan, ...]:
    return tuple(SpanPlan(p.tokens, p.dominant, p.contextual, (p.entry,) * len(p.counts)) for p in plans)


def _remove_marked(run: PromptState, adapter: Adapter, lengths: tuple[int, ...], hidden: bool, kwargs: dict[str, Any]) -> None:
    """Take the marked rows out, and those that are ``hidden`` by the mask; an unreduced prompt is left alone, bit for bit."""
    embeds = kwargs["inputs_embeds"]
    positions = prompt_positions(kwargs.get("position_ids"), embeds.shape[1], embeds.device)
    run.next_position = next_positions(positions, run.prompt.valid)
    planned = [[sum(p.tokens for p in row) for row in run.plans], run.visual(-1)]
    left = tuple(n - tokens + entering for n, tokens, entering in zip(lengths, *planned, strict=True))
    if left == lengths and not hidden:
        run.layer_groups.append(LayerGroup(0, run.prompt, left))
        return
    keep = run.prompt.valid & ~(is_marked(embeds) & run.prompt.visual)
    index, valid = pack_left(keep, max(left))
    tokens = run.prompt.gather(index, valid)
    run.layer_groups.append(LayerGroup(0, tokens.renumbered(), left))
    kwargs["inputs_embeds"] = gather_rows(embeds, index).masked_fill(~valid[..., None], 0)
    kwargs["position_ids"] = positions = entry_positions(positions, tokens, run.positions)
    if run.positions == "compact":
        run.next_position = next_positions(positions, valid)
    mask = kwargs.get("attention_mask")
    unmade = isinstance(mask, dict) and run.layer_groups[0].padded and any(prepared is None for prepared in mask.values())
    if unmade or _window_bites(adapter, run.prompt_len, mask):
        kwargs["attention_mask"] = _slot_masks(adapter, kwargs["inputs_embeds"], tokens, run.prompt_len)
    else:
        kwargs["attention_mask"] = entry_mask(mask, run.layer_groups[0], index, kwargs.get("past_key_values") is None)


def _window_bites(adapter: Adapter, rows: int, mask: Any) -> bool:
    """Whether the decoder itself would make windows from the shortened sequence, where they would reach further back than before."""
    config = adapter.text_model.config
    prepared = isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim == 4)
    return SLIDING in adapter.layer_types and rows > config.sliding_window and not prepared and compat.makes_masks(config)


def _slot_masks(adapter: Adapter, embeds: Tensor, tokens: TokenMap, prompt: int) -> Any:
    """Prepared masks for the rows that are left of ``prompt``: windows count its slots. By layer type where the decoder has several."""
    config, rows = adapter.text_model.config, embeds.shape[1]
    sizes = {FULL: prompt, SLIDING: config.sliding_window}
    made = {kind: compat.prepared_mask(config, embeds, window(tokens.valid, tokens.prompt_index, rows, size)) for kind, size in sizes.items()}
    return made if FULL in adapter.layer_types else made[SLIDING]


def entry_mask(mask: Any, group: LayerGroup, index: Tensor, no_cache: bool) -> Any:
    """The caller's mask for the shortened sequence. Without a cache even an all-ones mask is passed: gaps in kept positions would
    otherwise be read as packed sequences."""
    if isinstance(mask, dict):
        return {kind: entry_mask(prepared, group, index, False) for kind, prepared in mask.items()}  # layers take these as they are
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return cut_mask(mask, index, group.tokens.valid)
    return group.tokens.valid.long() if group.padded or no_cache else None


def refuse_chunked_prefill(prefill: Callable[..., Any], begun: Callable[[], AbstractContextManager[ActiveConfig | None]]) -> Callable[..., Any]:
    """generate()'s prefill step that refuses to cut prompts: the first chunk would decide without having seen the question."""

    @functools.wraps(prefill)
    def prefill_whole(input_ids: Tensor, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        size = getattr(generation_config, "prefill_chunk_size", None)
        with begun() as rules:
            if size is not None and rules is not None:
                raise ValueError(f"prefill_chunk_size={size}: tokens cannot be ranked by half a prompt; leave it None, or use handle.paused()")
            return prefill(input_ids, generation_config, *args, **kwargs)

    return prefill_whole
