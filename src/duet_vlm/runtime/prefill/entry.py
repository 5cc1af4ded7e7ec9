"""Entry of the decoder: remove dropped (marked) tokens from embeddings, masks and positions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from duet_vlm.inputs.text_queries import query_rows, salient_words
from duet_vlm.models.adapter import FULL, SLIDING, Adapter
from duet_vlm.ops.ragged import gather_rows, pack_left, upload
from duet_vlm.planning.budget import SpanPlan
from duet_vlm.planning.tokens import Span, TokenMap
from duet_vlm.reducers.inputs import Input
from duet_vlm.runtime import compat
from duet_vlm.runtime.active_config import ActiveConfig
from duet_vlm.runtime.context import ForwardContext
from duet_vlm.runtime.marks import is_marked
from duet_vlm.runtime.masks import cut_mask, documents, valid_tokens, window
from duet_vlm.runtime.prefill.layers import PrefillPass
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
from duet_vlm.runtime.prompt import (
    Continuation,
    LayerGroup,
    PrefillRecord,
    PromptState,
    ProtectedCount,
    RankingGroup,
)
from duet_vlm.runtime.pruned_cache import bind_prompt


def begin_prompt(
    adapter: Adapter, config: ActiveConfig, context: ForwardContext, kwargs: dict[str, Any], tokenizer: Any = None
) -> PrefillPass | None:
    """Prepare a prompt: read its layout, drop marked tokens, and bind the cache.

    The ``tokenizer`` is used where the salient words of the question rank.
    """
    embeds = kwargs["inputs_embeds"]
    cache = kwargs.get("past_key_values")
    reducer = config.reducer
    valid = valid_tokens(context.call.attention_mask, embeds)
    placeholders = {name: rows.to(valid.device) for name, rows in context.placeholders.items()}
    visual = torch.stack(list(placeholders.values())).any(0)
    cached = cache is not None or compat.uses_cache(adapter.text_model, kwargs.get("use_cache"))
    stored = (
        _stored_decisions(context, config) if not cached and context.call.labels is None and context.received else {}
    )
    protected = dropped_protected = torch.zeros_like(valid)
    if reducer.options.protect_predicting_tokens and context.received:
        rows = stored.setdefault(
            "predicting", predicting_rows(valid, visual, context.call.labels, context.call.num_draft_tokens)
        )
        rows = torch.nn.functional.pad(rows, (0, valid.shape[1] - rows.shape[1]))
        protected, dropped_protected = rows_that_stay(context, rows, placeholders, embeds)
    prompt = TokenMap.identity(valid, visual, protected)
    queries = torch.zeros_like(valid)
    if (reducer.uses_text_queries() or Input.QUESTION_STATE in reducer.requires) and context.received:
        candidates = valid
        if context.call.num_draft_tokens:
            candidates = valid & (
                torch.arange(valid.shape[1], device=valid.device) < valid.shape[1] - context.call.num_draft_tokens
            )
        queries = query_rows(
            reducer.options.text_query,
            prompt.prunable,
            candidates,
            context.call.labels,
            functools.partial(_salient, tokenizer, context),
            reducer.options.training_turns,
        )
    document_starts = documents(kwargs.get("attention_mask"), kwargs.get("position_ids"), valid, cached)
    layout = read_layout(context, reducer, placeholders, valid, queries, protected, dropped_protected, document_starts)
    check_pictures(context, layout)
    if not context.received:
        return None
    if compat.is_static(cache):
        raise ValueError(
            "static (compilable) caches are not supported while tokens are dropped: use the default dynamic cache or detach; "
            "handle.static_cache makes a static one of a cache that holds the prompt"
        )
    spans_by_sample = assign_spans(context, layout)
    spans, sources = spans_of(spans_by_sample, layout, placeholders, valid)
    plans = tuple(tuple(encoded.plans[number] for encoded, number in row) for row in sources)
    if reducer.options.skip_unanswered and context.call.labels is not None:
        plans = tuple(
            _without_drops(row) if not has_labels else row
            for row, has_labels in zip(plans, layout.has_labels, strict=True)
        )
    ranking_groups = _ranking_groups(
        plans, spans, layout, prompt, dropped_protected, per_image=reducer.options.multi_image == "per_image"
    )
    prompt_state = PromptState(
        config=config,
        prompt_len=embeds.shape[1],
        spans=spans,
        ranking_groups=ranking_groups,
        prompt=prompt,
        sources=sum(sources, ()),
        record=PrefillRecord(
            num_text_after_image=min(layout.num_text_after_image),
            drafts=context.call.num_draft_tokens,
            element_bytes=embeds.element_size(),
        ),
        continuation=Continuation(num_real_tokens=valid.sum(1)),
    )
    prompt_state.reduces = any(
        plan.entry < plan.tokens or min(plan.counts) < plan.tokens for row in plans for plan in row
    )
    context.prompt_state = prompt_state
    if any(counts.beyond_plan for counts in layout.protected):
        kwargs["inputs_embeds"] = _bring_back(
            adapter, context, spans_by_sample, placeholders, dropped_protected, embeds
        )
    any_marked = any(
        arrived.decisions is not None and arrived.decisions.selection is not None
        for arrived in context.received.values()
    )
    # images under the caller's mask, whose tokens may be marked as well
    any_masked = any(any(counts) for counts in layout.num_masked.values())
    _remove_marked(prompt_state, adapter, layout.lengths, any_masked and (any_marked or prompt_state.reduces), kwargs)
    if prompt_state.reduces and cached:
        cache = kwargs["past_key_values"] = compat.new_cache(adapter.text_model.config) if cache is None else cache
        bind_prompt(cache, prompt_state)
    replay = stored.setdefault("survivors", {}) if prompt_state.reduces and not cached else {}
    if replay and reducer.options.trim_kv_cache:
        raise ValueError(
            f"{reducer.name}: trim_kv_cache=True takes rows out of a cache, and use_cache=False has none: use a cache, or trim_kv_cache=False"
        )
    return PrefillPass(
        prompt_state,
        adapter,
        cache=cache,
        queries=queries,
        num_queries=list(layout.num_queries),
        kwargs=kwargs,
        replay=replay,
    )


def _ranking_groups(
    plans: tuple[tuple[SpanPlan, ...], ...],
    spans: tuple[tuple[Span, ...], ...],
    layout: PromptLayout,
    prompt: TokenMap,
    dropped_protected: Tensor,
    per_image: bool,
) -> tuple[tuple[RankingGroup, ...], ...]:
    """Group the spans that are ranked together: all of a sample, or each on its own."""
    if not per_image:
        return tuple(
            (RankingGroup(row, protected_count),) for row, protected_count in zip(plans, layout.protected, strict=True)
        )
    if not any(protected_count.in_sequence for protected_count in layout.protected):
        return tuple(tuple(RankingGroup((plan,)) for plan in row) for row in plans)
    rank = prompt.visual.cumsum(1) - 1  # one more device read, where tokens are protected and their span matters
    protected_ranks = [
        [row_ranks[selected].tolist() for row_ranks, selected in zip(rank, mask, strict=True)]
        for mask in (prompt.protected, dropped_protected)
    ]

    def of(sample: int, span: Span) -> ProtectedCount:
        return ProtectedCount(
            *(
                sum(span.offset <= row_ranks < span.offset + span.tokens for row_ranks in ranks[sample])
                for ranks in protected_ranks
            )
        )

    return tuple(
        tuple(RankingGroup((plan,), of(sample, span)) for plan, span in zip(row, spans[sample], strict=True))
        for sample, row in enumerate(plans)
    )


def _bring_back(
    adapter: Adapter,
    context: ForwardContext,
    spans_by_sample: SpansBySample,
    placeholders: dict[str, Tensor],
    dropped_protected: Tensor,
    embeds: Tensor,
) -> Tensor:
    """Embeddings [B, S, D] with the predicting tokens that the encoder stage had dropped.

    The last token of each span, as encoded.
    """
    for name, received in context.received.items():
        encoded = received.decisions
        if encoded is None or encoded.last is None:
            continue
        span_number = span_ends(received, placeholders[name])
        numbers = [number for sample in spans_by_sample[name] for (_, number), _ in sample]
        rows = encoded.last.rows[upload(numbers, encoded.last.rows.device)]
        if encoded.last.unprojected and adapter.pointwise_projector is not None:
            rows = adapter.pointwise_projector.forward(rows[:, None])[:, 0]
        rows = rows.to(embeds.device, embeds.dtype)[span_number.clamp(min=0).to(embeds.device)]
        embeds = torch.where((dropped_protected & (span_number >= 0)).to(embeds.device)[..., None], rows, embeds)
    return embeds


def _stored_decisions(context: ForwardContext, config: ActiveConfig) -> dict[str, Any]:
    """Decisions of the first pass (predicting tokens, kept tokens by layer), to be replayed.

    Without a cache generate() sends the growing prompt again and again. The decisions are stored on the encoder output
    that generate() reuses; a prompt that does not continue the first one gets new ones.
    """
    first_encoded = next(iter(context.received.values())).decisions
    assert first_encoded is not None
    stored = first_encoded.decisions
    ids = context.call.input_ids
    if ids is None:
        return {}
    first: Any = stored.get("input_ids")
    continues = (
        stored.get("config") is config
        and first is not None
        and first.shape[0] == ids.shape[0]
        and first.shape[1] < ids.shape[1]
    )
    if not (continues and torch.equal(first, ids[:, : first.shape[1]])):
        stored.clear()
        stored.update(input_ids=ids, config=config)
    return stored


def _salient(tokenizer: Any, context: ForwardContext, candidates: Tensor) -> Tensor:
    """The candidates that belong to salient words of their prompt.

    Raises
    ------
    ValueError
        A prompt that was passed as embeddings: its words are not known.
    """
    if context.call.input_ids is None:
        raise ValueError(
            "text_query='salient' reads the words of the question, and this prompt came as inputs_embeds: pass input_ids"
        )
    return salient_words(tokenizer, context.call.input_ids, candidates)


def _without_drops(plans: tuple[SpanPlan, ...]) -> tuple[SpanPlan, ...]:
    """Plans without decoder stages."""
    return tuple(
        SpanPlan(plan.tokens, plan.dominant, plan.contextual, (plan.entry,) * len(plan.counts)) for plan in plans
    )


def _remove_marked(
    prompt_state: PromptState, adapter: Adapter, lengths: tuple[int, ...], any_masked: bool, kwargs: dict[str, Any]
) -> None:
    """Remove marked tokens, and those that the mask hides (``any_masked``); an unreduced prompt stays bit-equal."""
    embeds = kwargs["inputs_embeds"]
    positions = prompt_positions(kwargs.get("position_ids"), embeds.shape[1], embeds.device)
    prompt_state.continuation.next_position = next_positions(positions, prompt_state.prompt.valid)
    visual_tokens = [sum(plan.tokens for plan in plans) for plans in prompt_state.plans]
    entering = prompt_state.num_visual(-1)
    new_lengths = tuple(
        length - tokens + entered for length, tokens, entered in zip(lengths, visual_tokens, entering, strict=True)
    )
    if new_lengths == lengths and not any_masked:
        prompt_state.layer_groups.append(LayerGroup(0, prompt_state.prompt, new_lengths))
        return
    keep = prompt_state.prompt.valid & ~(is_marked(embeds) & prompt_state.prompt.visual)
    index, valid = pack_left(keep, max(new_lengths))
    tokens = prompt_state.prompt.gather(index, valid)
    prompt_state.layer_groups.append(LayerGroup(0, tokens.renumbered(), new_lengths))
    kwargs["inputs_embeds"] = gather_rows(embeds, index).masked_fill(~valid[..., None], 0)
    kwargs["position_ids"] = positions = entry_positions(positions, tokens, prompt_state.positions)
    if prompt_state.positions == "compact":
        prompt_state.continuation.next_position = next_positions(positions, valid)
    mask = kwargs.get("attention_mask")
    not_prepared = (
        isinstance(mask, dict)
        and prompt_state.layer_groups[0].padded
        and any(prepared is None for prepared in mask.values())
    )
    if not_prepared or _needs_own_windows(adapter, prompt_state.prompt_len, mask):
        kwargs["attention_mask"] = _prepared_masks(adapter, kwargs["inputs_embeds"], tokens, prompt_state.prompt_len)
    else:
        kwargs["attention_mask"] = entry_mask(
            mask, prompt_state.layer_groups[0], index, kwargs.get("past_key_values") is None
        )


def _needs_own_windows(adapter: Adapter, prompt_len: int, mask: Any) -> bool:
    """True if the decoder itself would apply windows to the shortened sequence, where they would reach further back
    than before."""
    config = adapter.text_model.config
    prepared = isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim == 4)
    return (
        SLIDING in adapter.layer_types
        and prompt_len > config.sliding_window
        and not prepared
        and compat.makes_masks(config)
    )


def _prepared_masks(adapter: Adapter, embeds: Tensor, tokens: TokenMap, prompt_len: int) -> Any:
    """Prepared masks for the kept tokens of a prompt of ``prompt_len``, by layer type where there are several: windows
    count its positions."""
    config, num_rows = adapter.text_model.config, embeds.shape[1]
    sizes = {FULL: prompt_len, SLIDING: config.sliding_window}
    masks = {
        kind: compat.prepared_mask(config, embeds, window(tokens.valid, tokens.prompt_index, num_rows, size))
        for kind, size in sizes.items()
    }
    return masks if FULL in adapter.layer_types else masks[SLIDING]


def entry_mask(mask: Any, group: LayerGroup, index: Tensor, no_cache: bool) -> Any:
    """The caller's mask for the shortened sequence.

    Without a cache even an all-ones mask is passed: gaps in kept positions would otherwise be taken for packed
    sequences.
    """
    if isinstance(mask, dict):
        # used by layers unchanged
        return {kind: entry_mask(prepared, group, index, False) for kind, prepared in mask.items()}
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return cut_mask(mask, index, group.tokens.valid)
    return group.tokens.valid.long() if group.padded or no_cache else None


def refuse_chunked_prefill(
    prefill: Callable[..., Any], begin: Callable[[], AbstractContextManager[ActiveConfig | None]]
) -> Callable[..., Any]:
    """generate()'s prefill step, which refuses chunked prompts.

    The first chunk would be reduced without the question.
    """

    @functools.wraps(prefill)
    def prefill_whole(input_ids: Tensor, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        size = getattr(generation_config, "prefill_chunk_size", None)
        with begin() as config:
            if size is not None and config is not None:
                raise ValueError(
                    f"prefill_chunk_size={size}: tokens cannot be ranked by half a prompt; leave it None, or use handle.paused()"
                )
            return prefill(input_ids, generation_config, *args, **kwargs)

    return prefill_whole
