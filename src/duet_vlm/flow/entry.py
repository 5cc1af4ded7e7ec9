"""Where the decoder begins: marked rows leave, and everything indexed by row shrinks with them: embeddings, masks, positions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from duet_vlm.budget import SpanPlan
from duet_vlm.flow import compat
from duet_vlm.flow.cache import DecodePass, Followed, Group, Pool, Run, Staying, follow, forget
from duet_vlm.flow.call import Call
from duet_vlm.flow.decoder import PrefillPass
from duet_vlm.flow.encoder import is_marked
from duet_vlm.flow.layout import Dealt, Layout, check_pictures, deal, predicting, read_layout, rows_that_stay, span_ends, spans_of
from duet_vlm.flow.masks import cut_mask, documents, real_rows, window
from duet_vlm.flow.positions import entry_positions, next_positions, prompt_positions
from duet_vlm.flow.rules import Rules
from duet_vlm.models.adapter import FULL, SLIDING, Adapter
from duet_vlm.ops.ragged import pack_left, take
from duet_vlm.reducer import DecoderReducer
from duet_vlm.text import query_rows
from duet_vlm.tokens import Span, TokenMap


def enter(adapter: Adapter, call: Call, kwargs: dict[str, Any]) -> DecodePass | PrefillPass | None:
    """Prepare one call of the decoder stack; ``kwargs`` are changed in place. None: nothing to do, the stock path runs."""
    cache = kwargs.get("past_key_values")
    filled = cache is not None and int(cache.get_seq_length()) > 0
    if not filled:
        forget(cache)
    if isinstance(cache, Followed):
        if call.arrived:
            raise ValueError("new image on a reduced cache: start a new conversation (no past_key_values) or detach")
        cache.duet_run.decoded += kwargs["inputs_embeds"].shape[1]
        return DecodePass(adapter, cache, call.mask, kwargs)
    rules = next((arrived.encoded.rules for arrived in call.arrived.values() if arrived.encoded is not None), call.rules)
    if rules is None:
        return None
    if filled and call.arrived:
        raise ValueError("new image on a cache that already holds tokens: start a new conversation (no past_key_values) or detach")
    if not call.placeholders or filled:
        return None
    return _prefill(adapter, rules, call, kwargs)


def _prefill(adapter: Adapter, rules: Rules, call: Call, kwargs: dict[str, Any]) -> PrefillPass | None:
    embeds, cache, reducer = kwargs["inputs_embeds"], kwargs.get("past_key_values"), rules.reducer
    valid = real_rows(call.mask, embeds)
    places = {name: rows.to(valid.device) for name, rows in call.placeholders.items()}
    visual = torch.stack(list(places.values())).any(0)
    cached = cache is not None or compat.uses_cache(adapter.text_model, kwargs.get("use_cache"))
    stored = _decisions(call, rules) if not cached and call.labels is None and call.arrived else {}
    stays = left_out = torch.zeros_like(valid)
    if reducer.keep_predicting and call.arrived:
        rows = stored.setdefault("predicting", predicting(valid, visual, call.labels, call.drafts))
        rows = torch.nn.functional.pad(rows, (0, valid.shape[1] - rows.shape[1]))
        stays, left_out = rows_that_stay(call, rows, places, embeds)
    prompt = TokenMap.identity(valid, visual, stays)
    queries = torch.zeros_like(valid)
    asks = isinstance(reducer, DecoderReducer) and reducer.asks()
    if (asks or "decoded" in getattr(reducer, "reads", ())) and call.arrived:
        asking = valid if not call.drafts else valid & (torch.arange(valid.shape[1], device=valid.device) < valid.shape[1] - call.drafts)
        kind, turns = getattr(reducer, "text_query", "all"), getattr(reducer, "training_turns", "first")
        queries = query_rows(kind, prompt.ranked, asking, call.labels, call.salient, turns)
    begins = documents(kwargs.get("attention_mask"), kwargs.get("position_ids"), valid, cached)
    layout = read_layout(call, reducer, places, valid, queries, stays, left_out, begins)
    check_pictures(call, layout)
    if not call.arrived:
        return None
    if compat.is_static(cache):
        raise ValueError(
            "static (compilable) caches are not supported while tokens are dropped: use the default dynamic cache or detach; "
            "handle.static_cache makes a static one of a cache that has read the prompt"
        )
    dealt = deal(call, layout)
    spans, sources = spans_of(dealt, layout, places, valid)
    plans = tuple(tuple(encoded.plans[number] for encoded, number in row) for row in sources)
    if isinstance(reducer, DecoderReducer) and reducer.skip_unanswered and call.labels is not None:
        plans = tuple(_without_drops(row) if not answered else row for row, answered in zip(plans, layout.answered, strict=True))
    pools = _pools(plans, spans, layout, prompt, left_out, each=getattr(reducer, "share", "joint") == "each")
    run = Run(rules, embeds.shape[1], spans, pools, prompt, sum(sources, ()), min(layout.after), call.drafts)
    run.element_bytes, run.real = embeds.element_size(), valid.sum(1)
    run.reduces = any(plan.entry < plan.tokens or plan.counts[-1] < plan.tokens for row in plans for plan in row)
    call.run = run
    if any(some.added for some in layout.staying):
        kwargs["inputs_embeds"] = _bring_back(adapter, call, dealt, places, left_out, embeds)
    marks = any(arrived.encoded is not None and arrived.encoded.selection is not None for arrived in call.arrived.values())
    hidden = any(any(counts) for counts in layout.hidden.values())  # pictures under the caller's mask: rows that may be marked as well
    _remove_marked(run, adapter, layout.lengths, hidden and (marks or run.reduces), kwargs)
    if run.reduces and cached:
        cache = kwargs["past_key_values"] = compat.new_cache(adapter.text_model.config) if cache is None else cache
        follow(cache, run)
    replay = stored.setdefault("survivors", {}) if run.reduces and not cached else {}
    if replay and getattr(reducer, "cache", "full") == "cut":
        raise ValueError(f"{reducer.name}: cache='cut' takes rows out of a cache, and use_cache=False has none: use a cache, or cache='full'")
    return PrefillPass(run, adapter, cache, queries, list(layout.asking), kwargs, replay)


def _pools(
    plans: tuple[tuple[SpanPlan, ...], ...], spans: tuple[tuple[Span, ...], ...], layout: Layout, prompt: TokenMap, left_out: Tensor, each: bool
) -> tuple[tuple[Pool, ...], ...]:
    """Which spans are ranked together: all of a sample, or each by itself."""
    if not each:
        return tuple((Pool(row, some),) for row, some in zip(plans, layout.staying, strict=True))
    if not any(some.rows for some in layout.staying):
        return tuple(tuple(Pool((plan,)) for plan in row) for row in plans)
    rank = prompt.visual.cumsum(1) - 1  # one more read, where rows stay and it matters which span they are of
    staying = [[r[m].tolist() for r, m in zip(rank, mask, strict=True)] for mask in (prompt.stays, left_out)]

    def of(sample: int, span: Span) -> Staying:
        return Staying(*(sum(span.offset <= r < span.offset + span.tokens for r in ranks[sample]) for ranks in staying))

    return tuple(
        tuple(Pool((plan,), of(sample, span)) for plan, span in zip(row, spans[sample], strict=True)) for sample, row in enumerate(plans)
    )


def _bring_back(adapter: Adapter, call: Call, dealt: Dealt, places: dict[str, Tensor], left_out: Tensor, embeds: Tensor) -> Tensor:
    """Embeddings [B, S, D] with the rows that predict although V2V has left them out: the last tokens of their spans, as the tower made them."""
    for name, arrived in call.arrived.items():
        encoded = arrived.encoded
        if encoded is None or encoded.ends is None:
            continue
        place = span_ends(arrived, places[name])
        numbers = [number for sample in dealt[name] for (_, number), _ in sample]
        rows = encoded.ends[torch.tensor(numbers, device=encoded.ends.device)]
        rows = adapter.pointwise.forward(rows[:, None])[:, 0] if encoded.unprojected and adapter.pointwise is not None else rows
        rows = rows.to(embeds.device, embeds.dtype)[place.clamp(min=0).to(embeds.device)]
        embeds = torch.where((left_out & (place >= 0)).to(embeds.device)[..., None], rows, embeds)
    return embeds


def _decisions(call: Call, rules: Rules) -> dict[str, Any]:
    """Without a cache generate() sends the growing prompt again and again: what its first pass decided (rows that predict, survivors by layer)
    is replayed.

    It rides on the encoder output that generate() reuses; a prompt that does not continue the first one decides anew.
    """
    first_arrived = next(iter(call.arrived.values())).encoded
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


def _remove_marked(run: Run, adapter: Adapter, lengths: tuple[int, ...], hidden: bool, kwargs: dict[str, Any]) -> None:
    """Take the marked rows out, and those that are ``hidden`` by the mask; an unreduced prompt is left alone, bit for bit."""
    embeds = kwargs["inputs_embeds"]
    positions = prompt_positions(kwargs.get("position_ids"), embeds.shape[1], embeds.device)
    run.next_position = next_positions(positions, run.prompt.valid)
    planned = [[sum(p.tokens for p in row) for row in run.plans], run.visual(-1)]
    left = tuple(n - tokens + entering for n, tokens, entering in zip(lengths, *planned, strict=True))
    if left == lengths and not hidden:
        run.groups.append(Group(0, run.prompt, left))
        return
    keep = run.prompt.valid & ~(is_marked(embeds) & run.prompt.visual)
    index, valid = pack_left(keep, max(left))
    tokens = run.prompt.take(index, valid)
    run.groups.append(Group(0, tokens.entered(), left))
    kwargs["inputs_embeds"] = take(embeds, index).masked_fill(~valid[..., None], 0)
    kwargs["position_ids"] = positions = entry_positions(positions, tokens, run.positions)
    if run.positions == "compact":
        run.next_position = next_positions(positions, valid)
    mask = kwargs.get("attention_mask")
    unmade = isinstance(mask, dict) and run.groups[0].padded and any(prepared is None for prepared in mask.values())
    if unmade or _window_bites(adapter, run.rows, mask):
        kwargs["attention_mask"] = _slot_masks(adapter, kwargs["inputs_embeds"], tokens, run.rows)
    else:
        kwargs["attention_mask"] = entry_mask(mask, run.groups[0], index, kwargs.get("past_key_values") is None)


def _window_bites(adapter: Adapter, rows: int, mask: Any) -> bool:
    """Whether the decoder itself would make windows from the shortened sequence, where they would reach further back than before."""
    config = adapter.text_model.config
    prepared = isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim == 4)
    return SLIDING in adapter.layer_types and rows > config.sliding_window and not prepared and compat.makes_masks(config)


def _slot_masks(adapter: Adapter, embeds: Tensor, tokens: TokenMap, prompt: int) -> Any:
    """Prepared masks for the rows that are left of ``prompt``: windows count its slots. By layer type where the decoder has several."""
    config, rows = adapter.text_model.config, embeds.shape[1]
    sizes = {FULL: prompt, SLIDING: config.sliding_window}
    made = {kind: compat.prepared_mask(config, embeds, window(tokens.valid, tokens.slot, rows, size)) for kind, size in sizes.items()}
    return made if FULL in adapter.layer_types else made[SLIDING]


def entry_mask(mask: Any, group: Group, index: Tensor, no_cache: bool) -> Any:
    """The caller's mask for the shortened sequence. Without a cache even an all-ones mask is passed: gaps in kept positions would
    otherwise be read as packed sequences."""
    if isinstance(mask, dict):
        return {kind: entry_mask(prepared, group, index, False) for kind, prepared in mask.items()}  # layers take these as they are
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return cut_mask(mask, index, group.tokens.valid)
    return group.tokens.valid.long() if group.padded or no_cache else None


def whole_prompts(prefill: Callable[..., Any], begun: Callable[[], AbstractContextManager[Rules | None]]) -> Callable[..., Any]:
    """generate()'s prefill step that refuses to cut prompts: the first chunk would decide without having seen the question."""

    @functools.wraps(prefill)
    def prefill_whole(input_ids: Tensor, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        size = getattr(generation_config, "prefill_chunk_size", None)
        with begun() as rules:
            if size is not None and rules is not None:
                raise ValueError(f"prefill_chunk_size={size}: tokens cannot be ranked by half a prompt; leave it None, or use handle.paused()")
            return prefill(input_ids, generation_config, *args, **kwargs)

    return prefill_whole
