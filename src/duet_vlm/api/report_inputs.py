"""Inputs of the report.

Tokens that entered, tokens that tower, projector and layers processed, and the cost of the selection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from duet_vlm.models.adapter import Adapter
from duet_vlm.planning.budget import TowerStages
from duet_vlm.planning.tokens import SpanTrace
from duet_vlm.profiling.report import SampleCounts
from duet_vlm.profiling.selection_cost import (
    deciding_flops,
    question_flops,
    selection_flops,
    tower_choice_flops,
)
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.encoder import EncoderReducer
from duet_vlm.reducers.inputs import Input
from duet_vlm.runtime.context import EncodedFeatures
from duet_vlm.runtime.encode.build_view import layer_number
from duet_vlm.runtime.prompt import PromptState
from duet_vlm.runtime.trace import rows_per_layer, trace_of


def sample_counts(prompt_state: PromptState, per_token: int) -> list[SampleCounts]:
    """The rows of the batch; ``per_token``: patches of the tower that make one token."""
    rest = iter(prompt_state.sources)
    sources = [[next(rest) for _ in row] for row in prompt_state.spans]
    nominal_rows = zip(*(prompt_state.num_visual(layer) for layer in range(-1, prompt_state.depth)), strict=True)
    return [
        SampleCounts(
            text=length - sum(span.tokens for span in spans),
            spans=tuple(span.tokens for span in spans),
            tokens_per_crop=tuple(encoded.accounting.tokens_per_crop[number] for encoded, number in sample_sources),
            plans=plans,
            queries=num_queries,
            measured=measured,
            grids=tuple(span.grid for span in spans),
            projected=tuple(encoded.accounting.projected_rows[number] for encoded, number in sample_sources),
            skipped=any(encoded.accounting.skipped_layers for encoded, _ in sample_sources),
            nominal=nominal,
            projects_survivors_only=any(
                encoded.accounting.tower_state is not None and encoded.accounting.tower_state.pending_merges
                for encoded, _ in sample_sources
            ),
            planned_left=tuple(
                _of_span(encoded, number, "planned_stages", per_token) for encoded, number in sample_sources
            ),
            in_tower_counts=tuple(
                _of_span(encoded, number, "run_stages", per_token) for encoded, number in sample_sources
            ),
            still=tuple(encoded.modality != "video" for encoded, _ in sample_sources),
            repeated=tuple(
                encoded.accounting.repeated_parts[number] if encoded.accounting.repeated_parts else ()
                for encoded, number in sample_sources
            ),
            sizes=tuple(
                encoded.accounting.sizes[number]
                if encoded.accounting.sizes
                else encoded.accounting.tokens_per_crop[number]
                for encoded, number in sample_sources
            ),
            spare=tuple(
                encoded.accounting.spare[number]
                if encoded.accounting.spare
                else ((0, 0),) * len(encoded.accounting.tokens_per_crop[number])
                for encoded, number in sample_sources
            ),
            kept=tuple(_mean_kept(span, prompt_state.depth) for span in history),
        )
        for length, spans, sample_sources, plans, num_queries, measured, nominal, history in zip(
            prompt_state.prompt.valid.sum(1).tolist(),
            prompt_state.spans,
            sources,
            prompt_state.plans,
            prompt_state.record.num_queries,
            rows_per_layer(prompt_state),
            nominal_rows,
            trace_of(prompt_state),
            strict=True,
        )
    ]


def _of_span(encoded: EncodedFeatures, number: int, name: str, per_token: int) -> tuple[TowerStages, ...]:
    """Stages of each picture of a span in the tower, in patches."""
    if encoded.accounting.tower_state is None:
        return ((),) * len(encoded.accounting.tokens_per_crop[number])
    first = sum(map(len, encoded.accounting.tokens_per_crop[:number]))
    # of a frame that is pooled later, several become one token
    patches = encoded.accounting.tower_state.patches_of_unit // per_token
    parts = getattr(encoded.accounting.tower_state, name)[
        first : first + len(encoded.accounting.tokens_per_crop[number])
    ]
    return tuple(tuple((after, left * patches) for after, left in stages) for stages in parts)


def _mean_kept(span: SpanTrace, depth: int) -> float:
    """Visual tokens of a span per layer, over its stages."""
    ends = [*(stage.layer for stage in span.stages[1:]), depth]
    return sum(len(stage.kept) * (end - stage.layer) for stage, end in zip(span.stages, ends, strict=True)) / depth


def decoder_terms(adapter: Adapter, reducer: Reducer, samples: Sequence[SampleCounts]) -> dict[str, Any]:
    """Arguments of ``make_report`` about the decoder stages: ``deciding``, ``products``, ``cut``,
    ``scores_after_drop``, ``ranks_all``."""
    shape = adapter.decoder_dims()

    def of(sample: SampleCounts) -> int:
        visual = [sample.num_visual(layer) for layer in range(-1, shape.layers)]
        return (
            deciding_flops(reducer, visual, [sample.text + n for n in visual], sample.queries, shape)
            if sample.plans
            else 0
        )

    products, cut = Input.SCORES in reducer.requires, reducer.options.trim_kv_cache
    scores_after_drop = reducer.score_layer_offset > 0
    return {
        "deciding": sum(map(of, samples)),
        "products": products,
        "cut": cut,
        "scores_after_drop": scores_after_drop,
        "ranks_all": reducer.reenters,
    }


def selection_cost(adapter: Adapter, reducer: Reducer, samples: Sequence[SampleCounts], projects_all: bool) -> int:
    """FLOPs of signals, choice and merge before the decoder."""
    if not isinstance(reducer, EncoderReducer):
        return 0
    vision, shape = adapter.vision_dims(), adapter.decoder_dims()
    head = adapter.vision_attention(layer_number(adapter, reducer.signal_layers[0])).head_dim
    width = shape.hidden if projects_all else vision.projector[0][0]
    linear = [layer for layer in adapter.projector().modules() if isinstance(layer, nn.Linear)]
    # not those of further mergers
    projector_shapes = [(layer.in_features, layer.out_features) for layer in linear] or vision.projector
    flops = 0
    for still in (True, False):  # images and clips are encoded, and chosen from, by themselves
        flops += tower_choice_flops(reducer, [part for s in samples for part in s.in_tower(still=still)], vision, head)
        by_sample = [(s.queries, rows) for s in samples if (rows := _encoded(s, still))]
        if not by_sample:
            continue
        plans, sizes, steps, ranked, spare, projected = zip(
            *(row for _, rows in by_sample for row in rows), strict=True
        )
        projecting = 2 * sum(projected) * sum(math.prod(sides) for sides in projector_shapes)
        flops += selection_flops(reducer, plans, sizes, vision, head, width, steps, ranked, projecting, spare)
        flops += question_flops(
            reducer, [words for words, rows in by_sample if any(plan.reduces_entry for plan, *_ in rows)], shape
        )
    return flops


def _encoded(sample: SampleCounts, still: bool) -> list[tuple[Any, ...]]:
    """Of the pictures of a sample, or of its clips: plan, parts as V2V sees them, steps of time, parts that signals are made of and their spare patches, rows that the projector works on."""
    of, sizes = sample.still or (False,) * len(sample.plans), sample.sizes or sample.tokens_per_crop
    spare = sample.encoded_parts(sample.spare_patches())
    every = zip(
        of,
        sample.plans,
        sizes,
        sample.steps,
        sample.encoded,
        spare,
        sample.reaching_projector(),
        strict=True,
    )
    return [tuple(row) for kind, *row in every if kind == still]
