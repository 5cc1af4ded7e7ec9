"""The plan of a prompt under a handle, as reports describe it, without running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from duet_vlm.api.handle import Handle
from duet_vlm.api.report_inputs import decoder_terms
from duet_vlm.models.adapter import Adapter, ConcatenatedBlocks, TowerBlocks, VarlenTower
from duet_vlm.planning.budget import SpanPlan, TowerStages
from duet_vlm.planning.spans import tower_counts
from duet_vlm.profiling.report import Report, SampleCounts, make_report
from duet_vlm.reducers.decoder import DecoderReducer, decisions
from duet_vlm.reducers.encoder import EncoderReducer
from duet_vlm.reducers.vision_tower import tower_of


@dataclass(frozen=True)
class PlannedPrompt:
    """A prompt as the current settings plan it; the decoder layers that rank, and those of them that reuse the keys of
    their ranking."""

    sample: SampleCounts
    scored: tuple[int, ...] = ()
    reused: tuple[int, ...] = ()


def equal_parts(adapter: Adapter, tokens: int, parts: int) -> tuple[tuple[int, ...], ...]:
    """Tokens of each part, span by span, of an image in ``parts`` crops or frames that the tower encodes one by one:
    parts of one span where the family joins them, each a span of its own where it does not (InternVL's tiles, several
    images)."""
    sizes = tuple(tokens * (i + 1) // parts - tokens * i // parts for i in range(parts))
    joins = type(adapter).tokens_per_crop is not Adapter.tokens_per_crop
    return (sizes,) if joins else tuple((size,) for size in sizes)


def plan_prompt(handle: Handle, passes: Sequence[tuple[int, ...]], text: int) -> PlannedPrompt:
    """Plan a prompt of ``text`` tokens and spans whose parts have ``passes`` tokens.

    Raises
    ------
    ValueError
        If a drop comes before any layer that could rank for it.
    """
    reducer = handle.reducer
    spans = tuple(map(sum, passes))
    plans = tuple(handle.plan(tokens) for tokens in spans)
    counts = tuple(map(sum, zip(*(plan.counts for plan in plans), strict=True)))
    queries = 1 if reducer.options.text_query == "last" else text
    measured = counts, tuple(text + count for count in counts)
    tower = tower_of(reducer)
    fed, least = int(handle.adapter.feeds_cls), 1 if tower is None else tower.least
    left = tuple(
        tuple(handle.dropping(n, k) for n, k in zip(sizes, tower_counts(plan, sizes, fed, least), strict=True))
        for plan, sizes in zip(plans, passes, strict=True)
    )
    if _pads(handle):
        left = padded(left, passes)
    sample = SampleCounts(
        text, spans, tuple(passes), plans, queries, measured, skipped=_skips(handle), planned_left=left, in_tower_counts=left,
        projects_survivors_only=_merges_left(handle),
    )  # fmt: skip
    if not isinstance(reducer, DecoderReducer) or not reducer.uses_attention():
        return PlannedPrompt(sample)
    adapter = handle.adapter
    drops = [layer for layer, *_ in decisions(reducer, (sum(plan.entry for plan in plans), *counts))]
    scored = {drop: adapter.ranking_layer(drop - reducer.score_layer_offset, reducer.score_states) for drop in drops}
    for drop, layer in scored.items():
        if layer < 0:
            raise ValueError(
                f"{reducer.name} drops before decoder layer {drop}, where {adapter.family} has had no attention to rank tokens by"
            )
    layers = tuple(sorted(set(scored.values())))
    return PlannedPrompt(
        sample, layers, tuple(i for i in layers if adapter.key_projection(adapter.layers[i]) is not None)
    )


def padded(
    left: tuple[tuple[TowerStages, ...], ...], passes: Sequence[tuple[int, ...]]
) -> tuple[tuple[TowerStages, ...], ...]:
    """Tower stages of parts in one batch: all with the counts of the part that keeps the most."""
    parts = [
        (n, dict(stages))
        for sizes, span in zip(passes, left, strict=True)
        for n, stages in zip(sizes, span, strict=True)
    ]
    most: dict[int, int] = {}
    for after in sorted({after for _, stages in parts for after in stages}):
        most[after] = max(min([n, *(count for cut, count in stages.items() if cut <= after)]) for n, stages in parts)
    return tuple(tuple(tuple(most.items()) for _ in span) for span in left)


def _pads(handle: Handle) -> bool:
    """True if a reduced tower takes the parts of an image as a batch."""
    blocks = handle.adapter.blocks_to_reduce()[0] if handle.reducer.reduces_in_tower else None
    return isinstance(blocks, TowerBlocks) and not isinstance(blocks, ConcatenatedBlocks)


def _merges_left(handle: Handle) -> bool:
    """True if the merger runs on the kept tokens of a reduced tower."""
    return handle.reducer.reduces_in_tower and isinstance(handle.adapter.blocks_to_reduce()[0], VarlenTower)


def _skips(handle: Handle) -> bool:
    """True if unused tower layers are skipped: there are some, the method reduces, and takes no signal from them."""
    adapter, reducer = handle.adapter, handle.reducer
    if not isinstance(reducer, EncoderReducer | DecoderReducer):
        return False
    return bool(unread := adapter.unused_tower_layers()) and not handle.reads_layers(unread)


def planned_report(handle: Handle, planned: PlannedPrompt, element_bytes: int) -> Report:
    """The report that the prompt would give."""
    reducer = handle.reducer
    return make_report(
        method=reducer.name,
        settings=reducer.settings(),
        budget=handle.budget,
        samples=[planned.sample],
        scored_layers=planned.scored,
        reused_layers=planned.reused,
        decoder=handle.adapter.decoder_dims(),
        vision=handle.adapter.vision_dims(),
        element_bytes=element_bytes,
        cache_bytes=None,
        decoded=0,
        projects_all=handle.projects_all,
        selection=handle.selection_flops([planned.sample]),
        **decoder_terms(handle.adapter, reducer, [planned.sample]),
    )


def whole_of(sample: SampleCounts) -> SpanPlan:
    """The plans of all spans of an image as one."""
    plans = sample.plans
    kept, merged = sum(plan.dominant for plan in plans), sum(plan.contextual for plan in plans)
    return SpanPlan(sum(sample.spans), kept, merged, sample.measured[0])
