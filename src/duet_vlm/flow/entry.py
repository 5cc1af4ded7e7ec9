"""The decoder's door: marked rows leave, and everything indexed by row shrinks with them: embeddings, masks, positions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from duet_vlm.budget import SpanPlan
from duet_vlm.flow import compat
from duet_vlm.flow.cache import RUN, DecodePass, Group, Run
from duet_vlm.flow.call import Arrived, Call, Encoded
from duet_vlm.flow.decoder import PrefillPass
from duet_vlm.flow.encoder import is_marked, not_finite
from duet_vlm.flow.masks import cut_mask, window
from duet_vlm.flow.positions import entry_positions, next_positions, prompt_positions
from duet_vlm.models.adapter import FULL, SLIDING, Adapter
from duet_vlm.ops.ragged import pack_left, take
from duet_vlm.reducer import DecoderReducer, Reducer
from duet_vlm.text import query_rows
from duet_vlm.tokens import Span, TokenMap


def enter(adapter: Adapter, reducer: Reducer | None, call: Call, kwargs: dict[str, Any]) -> DecodePass | PrefillPass | None:
    """Prepare one call of the decoder stack; ``kwargs`` are changed in place. None: nothing to do, the stock path runs."""
    cache = kwargs.get("past_key_values")
    filled = cache is not None and int(cache.get_seq_length()) > 0
    run = getattr(cache, RUN, None) if filled else None
    brings_images = bool(call.arrived)
    if run is not None:
        if brings_images:
            raise ValueError("new image on a reduced cache: start a new conversation (no past_key_values) or detach")
        run.decoded += kwargs["inputs_embeds"].shape[1]
        return DecodePass(run, adapter, cache, call.mask, kwargs)
    if reducer is None:
        return None
    if filled and brings_images:
        raise ValueError("new image on a cache that already holds tokens: start a new conversation (no past_key_values) or detach")
    if not call.placeholders or filled:
        return None
    return _prefill(adapter, reducer, call, kwargs)


def _prefill(adapter: Adapter, reducer: Reducer, call: Call, kwargs: dict[str, Any]) -> PrefillPass | None:
    embeds, cache = kwargs["inputs_embeds"], kwargs.get("past_key_values")
    if compat.is_static(cache):
        raise ValueError("static (compilable) caches are not supported while tokens are dropped: use the default dynamic cache or detach")
    valid = _valid_rows(call.mask, embeds)
    places = {name: rows.to(valid.device) for name, rows in call.placeholders.items()}
    prompt = TokenMap.identity(valid, torch.stack(list(places.values())).any(0))
    queries = torch.zeros_like(valid)
    if isinstance(reducer, DecoderReducer) and reducer.uses_text and call.arrived:
        asking = valid if not call.drafts else valid & (torch.arange(valid.shape[1], device=valid.device) < valid.shape[1] - call.drafts)
        queries = query_rows(reducer.text_query, prompt.visual, asking, call.labels, call.salient, reducer.training_turns)
    layout, visual = _read_layout(call, places, valid, queries)
    for name in places.keys() - call.arrived.keys():
        if any(visual[name]):
            row = next(i for i, count in enumerate(visual[name]) if count)
            raise ValueError(
                f"sample {row} has {visual[name][row]} {name} placeholders in its text, but no {name} was passed: pass {name}s to the "
                "processor (pixel_values), or remove the placeholders"
            )
    if not call.arrived:
        return None
    spans, sources = _spans(call, visual, places)
    plans = tuple(tuple(encoded.plans[number] for encoded, number in row) for row in sources)
    if isinstance(reducer, DecoderReducer) and reducer.skip_unanswered and call.labels is not None:
        plans = tuple(_without_drops(row) if not answered else row for row, (_, _, answered) in zip(plans, layout, strict=True))
    run = Run(embeds.shape[1], reducer.positions, spans, plans, prompt, len(adapter.layers), sum(sources, ()))
    run.element_bytes = embeds.element_size()
    call.run = run
    _remove_marked(run, adapter, reducer, [length for length, _, _ in layout], kwargs)
    run.reduces = any(plan.entry < plan.tokens or plan.counts[-1] < plan.tokens for row in plans for plan in row)
    if run.reduces:
        if cache is None and compat.uses_cache(adapter.text_model, kwargs.get("use_cache")):
            cache = kwargs["past_key_values"] = compat.new_cache(adapter.text_model.config)
        if cache is not None:
            setattr(cache, RUN, run)
    replay = _decisions(call, run, reducer) if cache is None and call.labels is None else {}
    return PrefillPass(run, adapter, reducer, cache, queries, [n for _, n, _ in layout], kwargs, replay)


def _decisions(call: Call, run: Run, reducer: Reducer) -> dict[Any, Any]:
    """Without a cache generate() sends the growing prompt again and again: the survivors of its first pass are replayed.

    They ride on the encoder output that it reuses; a prompt that does not continue the first one decides anew.
    """
    first_arrived = next(iter(call.arrived.values())).encoded
    assert first_arrived is not None
    stored, ids = first_arrived.decisions, call.input_ids
    if ids is None or not run.reduces:
        return {}
    first: Any = stored.get("input_ids")
    same = stored.get("reducer") == reducer and first is not None and first.shape[0] == ids.shape[0] and first.shape[1] < ids.shape[1]
    if not (same and torch.equal(first, ids[:, : first.shape[1]])):
        stored.clear()
        stored.update(input_ids=ids, reducer=reducer)
    return stored


def _valid_rows(mask: Any, embeds: Tensor) -> Tensor:
    """[B, S] bool from a 2-D mask, a prepared 4-D mask (its last query sees every real key), a dict of those, or nothing."""
    if isinstance(mask, dict):
        mask = mask.get(FULL)
    if mask is None:
        return torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    if not isinstance(mask, Tensor):
        raise ValueError(f"attention masks of type {type(mask).__name__} cannot follow dropped tokens: use sdpa, eager or flash attention")
    if mask.ndim == 2:
        if mask.shape != embeds.shape[:2]:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, the prompt {tuple(embeds.shape[:2])}")
        return mask.bool()
    last = mask[:, 0, -1, : embeds.shape[1]]
    return (last if last.dtype == torch.bool else last == 0).expand(embeds.shape[:2])


def _read_layout(
    call: Call, places: dict[str, Tensor], valid: Tensor, queries: Tensor
) -> tuple[list[tuple[int, int, bool]], dict[str, list[int]]]:
    """The one device-to-host read of a prefill: per sample (real rows, query rows, has a supervised label), and placeholders by stream."""
    answered = torch.zeros_like(valid) if call.labels is None else (call.labels.to(valid.device) != -100)
    finite = torch.ones((), dtype=torch.bool, device=valid.device)
    for arrived in call.arrived.values():
        if arrived.encoded is not None and arrived.encoded.finite is not None:
            finite = finite & arrived.encoded.finite.to(valid.device)
    columns = [valid.sum(1), queries.sum(1), answered.sum(1), finite.long().expand(len(valid)), *(rows.sum(1) for rows in places.values())]
    table = torch.stack(columns, 1).tolist()
    if not table[0][3]:
        raise not_finite("the image features")
    visual = {name: [row[4 + i] for row in table] for i, name in enumerate(places)}
    return [(rows, asking, answers > 0) for rows, asking, answers, *_ in table], visual


Source = tuple[Encoded, int]  # an encoder call and the number of a span in it


def _spans(
    call: Call, visual: dict[str, list[int]], places: dict[str, Tensor]
) -> tuple[tuple[tuple[Span, ...], ...], tuple[tuple[Source, ...], ...]]:
    """Which span belongs to which sample, in the order of the prompt."""
    found = {name: _dealt(name, arrived, visual[name]) for name, arrived in call.arrived.items()}
    if len(found) > 1:  # in which order a prompt shows images and clips: one more read
        places = dict(zip(places, torch.stack(list(places.values())).cpu(), strict=True))
    spans: list[tuple[Span, ...]] = []
    sources: list[tuple[Source, ...]] = []
    for sample in range(len(next(iter(visual.values())))):
        queues = {name: rows[sample] for name, rows in found.items() if rows[sample]}
        order = _order(sample, queues, places)
        offsets = [sum(size for _, size in order[:i]) for i in range(len(order))]
        grids = [encoded.grids[number] if encoded.grids else None for (encoded, number), _ in order]
        spans.append(tuple(Span(sample, offset, size, grid) for offset, (_, size), grid in zip(offsets, order, grids, strict=True)))
        sources.append(tuple(source for source, _ in order))
    return tuple(spans), tuple(sources)


def _dealt(name: str, arrived: Arrived, visual: list[int]) -> list[list[tuple[Source, int]]]:
    """One stream's spans (with their sizes) by sample: they fill placeholders in order, so cumulated counts must meet at sample borders."""
    assert arrived.encoded is not None
    sizes, known = [len(rows) for rows in arrived.features], max(1, len(arrived.encoded.rows))
    times = 1 if len(sizes) % known else len(sizes) // known  # beams repeat the spans of each sample
    out: list[list[tuple[Source, int]]] = []
    done = 0
    for sample, wanted in enumerate(visual):
        count = 0
        while sum(sizes[done : done + count]) < wanted and done + count < len(sizes):
            count += 1
        made = sum(sizes[done : done + count])
        if made != wanted:
            raise ValueError(
                f"sample {sample} has {wanted} {name} placeholders, but its {name}s make {made} visual tokens ({name}s: {sizes}); "
                "make input_ids and pixel_values with one processor call, and do not truncate or split the prompt (no prefill_chunk_size)"
            )
        first = (done - sample % times * count) // times
        numbers = [arrived.encoded.number_of(arrived.features[done + i], first + i, len(sizes) // times) for i in range(count)]
        out.append([((arrived.encoded, number), sizes[done + i]) for i, number in enumerate(numbers)])
        done += count
    if done != len(sizes):
        raise ValueError(f"{len(sizes)} {name}s were passed, but the text has placeholders for {done}")
    return out


def _order(sample: int, queues: dict[str, list[tuple[Source, int]]], places: dict[str, Tensor]) -> list[tuple[Source, int]]:
    """The spans of a sample as its prompt shows them; only samples that mix streams need to look."""
    if len(queues) < 2:
        return [entry for queue in queues.values() for entry in queue]
    begins = []
    for name, queue in queues.items():
        slots, done = places[name][sample].nonzero()[:, 0].tolist(), 0
        for entry in queue:
            begins.append((slots[done], entry))
            done += entry[1]
    return [entry for _, entry in sorted(begins, key=lambda begin: begin[0])]


def _without_drops(plans: tuple[SpanPlan, ...]) -> tuple[SpanPlan, ...]:
    return tuple(SpanPlan(p.tokens, p.dominant, p.contextual, (p.entry,) * len(p.counts)) for p in plans)


def _remove_marked(run: Run, adapter: Adapter, reducer: Reducer, lengths: list[int], kwargs: dict[str, Any]) -> None:
    """Take the marked rows out; an unreduced prompt is left alone, bit for bit."""
    embeds = kwargs["inputs_embeds"]
    positions = prompt_positions(kwargs.get("position_ids"), embeds.shape[1], embeds.device)
    left = tuple(n - sum(p.tokens - p.entry for p in row) for n, row in zip(lengths, run.plans, strict=True))
    if left == tuple(lengths):
        run.groups.append(Group(0, run.prompt, tuple(lengths)))
        run.next_position = next_positions(positions, embeds.shape[0])
        return
    keep = run.prompt.valid & ~(is_marked(embeds) & run.prompt.visual)
    index, valid = pack_left(keep, max(left))
    tokens = run.prompt.take(index, valid)
    run.groups.append(Group(0, tokens.entered(), left))
    kwargs["inputs_embeds"] = take(embeds, index).masked_fill(~valid[..., None], 0)
    kwargs["position_ids"] = positions = entry_positions(positions, tokens, reducer.positions)
    run.next_position = next_positions(positions, embeds.shape[0])
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


def whole_prompts(prefill: Callable[..., Any], active: Callable[[], Reducer | None]) -> Callable[..., Any]:
    """generate()'s prefill step that refuses to cut prompts: the first chunk would decide without having seen the question."""

    @functools.wraps(prefill)
    def prefill_whole(input_ids: Tensor, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        size = getattr(generation_config, "prefill_chunk_size", None)
        if size is not None and active() is not None:
            raise ValueError(f"prefill_chunk_size={size}: tokens cannot be ranked by half a prompt; leave it None, or use handle.paused()")
        return prefill(input_ids, generation_config, *args, **kwargs)

    return prefill_whole
