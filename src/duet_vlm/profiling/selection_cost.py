"""Cost of choosing and merging: the method's own code, run on shapes without data."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from duet_vlm.ops.merge import by_table
from duet_vlm.planning.budget import SpanPlan, TowerStages
from duet_vlm.planning.tokens import Selection
from duet_vlm.profiling.flops import Grid, Spare, decoder_layer_flops, probe_flops, signal_flops
from duet_vlm.profiling.model_dims import DecoderDims, VisionDims, probed_layer
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.compressor import Compressor, ModuleSizes, compressor_of
from duet_vlm.reducers.decoder import DecoderReducer, DecoderView, decisions
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
from duet_vlm.reducers.encoder_view import Change, LayerView, QuestionView
from duet_vlm.reducers.inputs import VISION_LAYER_INPUTS, Input
from duet_vlm.reducers.vision_tower import TowerReducer, tower_of

HEADS, WORDS = 16, 64  # of a view without data, where only the count of products matters


def selection_flops(
    reducer: Reducer,
    plans: Sequence[SpanPlan],
    passes: Sequence[Sequence[int]],
    vision: VisionDims,
    key_width: int,
    feature_width: int,
    steps: Sequence[Sequence[int]] | None = None,
    ranked: Sequence[Sequence[int]] | None = None,
    projecting: int = 0,
    spare: Sequence[Sequence[Spare]] | None = None,
) -> int:
    """Signals, choice and merge before the decoder for the spans of one call; 0 if the method keeps them whole.

    Parameters
    ----------
    passes : sequence of sequence of int
        Per span, visual tokens of each part (crop, frame) that it is chosen from.
    key_width, feature_width : int
        Width of one head of the tower, and of the features that are reduced.
    steps : sequence of sequence of int, optional
        Per span, visual tokens of each time step; by default every part is one.
    ranked : sequence of sequence of int, optional
        Per span, visual tokens of the parts that signals are made of, as the tower encodes them; by default ``passes``.
    projecting : int
        FLOPs of the projector on the tokens of this call, for methods that run it themselves.
    spare : sequence of sequence of tuple, optional
        Per span, of the parts that signals are made of, patches that become no token.
    """
    if not isinstance(reducer, EncoderReducer) or not any(plan.reduces_entry for plan in plans):
        return 0
    parts = [tokens for span in (passes if ranked is None else ranked) for tokens in span]
    beyond = [0] * len(parts) if spare is None else [patches for span in spare for patches, _ in span]
    signals = 0
    if reducer.requires & VISION_LAYER_INPUTS:
        looks = (
            zip(parts, beyond, strict=True) if reducer.scoring_rules().signal_segments else [(sum(parts), sum(beyond))]
        )
        heads = 1 if reducer.scoring_rules().signal_heads == "one" else vision.width // key_width
        signals = sum(
            signal_flops(vision, n, reducer.options.signal_queries, heads, more) for n, more in looks
        ) * attentions(reducer)
    keys = vision.width if reducer.scoring_rules().signal_heads == "one" else key_width
    timed = _steps(plans, passes if steps is None else steps) if reducer.compares_frames else None
    return signals + choice_flops(
        reducer, tuple(_plans_by_part(plans, passes)), keys, feature_width, vision, timed, projecting
    )


def _steps(plans: Sequence[SpanPlan], passes: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """The largest number of steps of a span and of tokens of a step, for methods that compare steps."""
    steps = max(map(len, passes), default=0)
    return (
        (steps, max(-(-plan.tokens // max(1, len(parts))) for plan, parts in zip(plans, passes, strict=True)))
        if steps > 1
        else None
    )


def tower_choice_flops(
    reducer: Reducer, parts: Sequence[tuple[int, Grid, TowerStages, Spare]], vision: VisionDims, key_width: int
) -> int:
    """Similarities inside the tower, and its attention where it ranks units, in one call; ``parts`` as
    ``SampleCounts.in_tower`` lists them.

    Images are compared side by side, padded to the largest; attention is within each image.
    """
    tower, total = tower_of(reducer), 0
    if not isinstance(tower, TowerReducer):
        return 0
    here = [tokens for tokens, *_ in parts]
    for cuts in zip(*(stages for _, _, stages, _ in parts), strict=True):
        after, left = cuts[0][0], [count for _, count in cuts]
        total += 2 * len(here) * tower.merge_pairs(max(here), max(left)) * (key_width if after else vision.width)
        if Input.BLOCK_ATTENTION in tower.requires:
            total += sum(
                signal_flops(vision, tokens, tower.options.signal_queries, vision.width // key_width) for tokens in here
            )
        here = left
    return total


def attentions(reducer: EncoderReducer) -> int:
    """Number of times that attention is computed for a method: once per named layer, and once more where it needs the
    heads apart."""
    kinds = bool(reducer.requires & {Input.IMPORTANCE, Input.KEYS}) + (Input.HEAD_IMPORTANCE in reducer.requires)
    return kinds * len(set(reducer.signal_layers))


def _plans_by_part(plans: Sequence[SpanPlan], passes: Sequence[Sequence[int]]) -> list[SpanPlan]:
    """One plan for every part that is reduced independently; all spans of a call are padded to equally many."""
    parts = [plan.parts for plan in plans]
    most = max(map(len, parts), default=0)
    if most == 0:
        return list(plans)
    small = []
    for plan, counts, sizes in zip(plans, parts, passes, strict=True):
        own = [SpanPlan(size, kept, merged, ()) for size, (kept, merged) in zip(sizes, counts, strict=False)]
        own = own or [SpanPlan(plan.tokens, plan.dominant, plan.contextual, ())]
        small += own + [SpanPlan(0, 0, 0, ())] * (most - len(own))
    return small


@lru_cache(maxsize=256)
def choice_flops(
    reducer: EncoderReducer,
    plans: tuple[SpanPlan, ...],
    key_width: int,
    feature_width: int,
    vision: VisionDims,
    steps: tuple[int, int] | None = None,
    projecting: int = 0,
) -> int:
    """Matrix products of choosing and merging on spans with these plans, counted on the meta device.

    ``steps``: largest number of time steps, and of tokens of each; ``projecting``: cost of the projector each time that
    the method runs it.
    """
    batch, tokens, projector_runs = len(plans), max(plan.tokens for plan in plans), 0
    decoder = vision.projector[-1][1]
    sizes = ModuleSizes(
        feature_width, len(reducer.signal_layers) * vision.width, decoder, steps[1] if steps else tokens
    )
    with torch.no_grad(), torch.device("meta") as meta, FlopCounterMode(display=False) as counter:
        count = torch.empty(batch, dtype=torch.long, device=meta)
        empty = functools.partial(torch.empty, batch, tokens, device=meta)
        layer = LayerView(empty(), empty(HEADS), empty(key_width), empty(key_width), empty(vision.width))
        pairs, longs = torch.empty(batch, 2, dtype=torch.long, device=meta), functools.partial(empty, dtype=torch.long)

        def project(change: Change) -> Tensor:
            nonlocal projector_runs
            projector_runs += 1
            change(empty(vision.projector[0][0]))
            return empty(decoder)

        selection = reducer.select_tokens(
            EncoderView(
                valid=empty(dtype=torch.bool),
                dominant=count,
                contextual=count,
                plans=plans,
                importance=layer.importance,
                keys=layer.keys,
                features=empty(feature_width),
                parts=longs(),
                layers=(layer,) * len(reducer.signal_layers),
                coords=longs(2),
                grid_size=pairs,
                crop_grid=pairs,
                question=QuestionView(
                    torch.empty(batch, WORDS, feature_width, device=meta),
                    torch.empty(batch, WORDS, dtype=torch.bool, device=meta),
                ),
                question_state=torch.empty(batch, decoder, device=meta),
                module=_module(reducer, sizes),
                text_similarity=empty(1),
                text_similarity_valid=torch.empty(batch, 1, dtype=torch.bool, device=meta),
                project=project,
                modality="video" if steps else "image",
                max_parts=steps,
            )
        )
    merging = 2 * selection.index.numel() * tokens * feature_width if by_table(selection, tokens) else 0
    return counter.get_total_flops() + merging + projector_runs * projecting


def _module(reducer: EncoderReducer, sizes: ModuleSizes) -> nn.Module | None:
    """The module of a method that has one, without data."""
    compressor = compressor_of(reducer)
    return compressor.module(sizes).requires_grad_(False) if isinstance(compressor, Compressor) else None


def question_flops(reducer: Reducer, words: Sequence[int], shape: DecoderDims) -> int:
    """The decoder's pass over the questions alone, of ``words`` tokens each, for methods that need its hidden
    states."""
    if Input.QUESTION_STATE not in reducer.requires:
        return 0
    return sum(decoder_layer_flops(shape, rows, layer=layer) for rows in words for layer in range(shape.layers))


PREDICTED = 4  # rows that a gradient is taken of (runtime/prefill/prediction_gradient.py)


def deciding_flops(
    reducer: Reducer, visual: Sequence[int], rows: Sequence[int], queries: int, shape: DecoderDims
) -> int:
    """Cost of a method inside the decoder beyond attention from text (``profiling.flops.scoring_flops``), for one
    sample.

    Parameters
    ----------
    visual, rows : sequence of int
        Visual and all tokens at the entry, and at the input of each layer: one number more than there are layers.
    """
    if not isinstance(reducer, DecoderReducer):
        return 0
    total = 2 * visual[0] * queries * shape.hidden if reducer.options.text_query == "raters" else 0
    among: dict[int, int] = {}  # by scoring layer, which may serve several drops, the index of the rows that it ranks
    for layer, before, stay in decisions(reducer, visual):
        total += _decision_flops(reducer, before, stay, queries, shape)
        if Input.VISUAL_SELF_ATTENTION in reducer.requires:
            scored = probed_layer(shape.attends, layer - reducer.score_layer_offset + 1, last=True)
            among[scored] = 0 if reducer.reenters else scored + (scored < layer)
        if Input.GRADIENT in reducer.requires:
            total += probe_flops(
                shape,
                rows[0 if reducer.reenters else layer],
                probed_layer(shape.attends, layer, reducer.scoring_rules().probe == "last"),
                PREDICTED,
            )
    return total + sum(
        2 * visual[at] * (shape.hidden * shape.query_width + rows[at] * shape.wide) for at in among.values()
    )


@lru_cache(maxsize=256)
def _decision_flops(reducer: DecoderReducer, before: int, stay: int, queries: int, shape: DecoderDims) -> int:
    """Matrix products of one decision, and of merging, counted on the meta device."""
    with torch.no_grad(), torch.device("meta") as meta, FlopCounterMode(display=False) as counter:

        def rows(count: int, width: int) -> torch.Tensor:
            return torch.empty(1, count, width, device=meta)

        score_shape = (1, before, shape.heads) if reducer.scoring_rules().score_heads == "each" else (1, before)
        positions = torch.zeros(1, before, dtype=torch.long, device=meta)
        decision = reducer.prune_tokens(
            DecoderView(
                valid=torch.empty(1, before, dtype=torch.bool, device=meta),
                num_keep=torch.empty(1, dtype=torch.long, device=meta),
                spans=((0, before),),
                span_index=positions,
                token_index=positions,
                scores=torch.empty(score_shape, device=meta),
                host_counts=((before, stay),),
                grids=(None,),
                hidden_states=rows(before, shape.hidden),
                previous_hidden_states=rows(before, shape.hidden),
                text_hidden_states=rows(queries, shape.hidden),
                text_valid=torch.empty(1, queries, dtype=torch.bool, device=meta),
                keys=rows(before, shape.narrow),
                text_keys=rows(queries, shape.narrow),
                positions=positions,
                text_positions=torch.zeros(1, queries, dtype=torch.long, device=meta),
                visual_self_attention=torch.empty(score_shape, device=meta),
                gradient=rows(before, shape.hidden),
                tags=torch.empty(1, before, device=meta),
            )
        )
    weighted = isinstance(decision, Selection) and decision.weights is not None
    return counter.get_total_flops() + (2 * stay * before * shape.hidden if weighted else 0)
