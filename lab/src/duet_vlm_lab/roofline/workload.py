"""A planned prompt as a request to predict."""

from __future__ import annotations

from collections.abc import Sequence

from duet_vlm.api.handle import Handle
from duet_vlm.api.report_inputs import decoder_terms
from duet_vlm.evaluation.planned_prompt import plan_prompt
from duet_vlm.planning.budget import SpanPlan
from duet_vlm.profiling.flops import query_rows, tower_rows
from duet_vlm.profiling.model_dims import VisionDims
from duet_vlm.profiling.report import SampleCounts
from duet_vlm.profiling.selection_cost import attentions
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.encoder import EncoderReducer
from duet_vlm.reducers.inputs import VISION_LAYER_INPUTS
from duet_vlm.runtime.encode.build_view import layer_number
from duet_vlm_lab.roofline.predict import Workload


def workload(handle: Handle, passes: Sequence[tuple[int, ...]], text: int, new: int) -> Workload:
    """The plan of a prompt as a request to predict."""
    found = plan_prompt(handle, passes, text)
    adapter, reducer = handle.adapter, handle.reducer
    cost = handle.selection_flops([found.sample]), _signal_bytes(handle, found.sample)
    terms = decoder_terms(adapter, reducer, [found.sample])
    return Workload(found.sample, new, found.scored, handle.projects_all, *cost, reused_layers=found.reused, **terms)


def _signal_bytes(handle: Handle, sample: SampleCounts) -> int:
    adapter, reducer = handle.adapter, handle.reducer
    if not isinstance(reducer, EncoderReducer):
        return 0
    head = adapter.vision_attention(layer_number(adapter, reducer.signal_layers[0])).head_dim
    return selection_bytes(reducer, sample.plans, sample.tokens_per_crop, adapter.vision_dims(), head)


def selection_bytes(
    reducer: Reducer, plans: Sequence[SpanPlan], passes: Sequence[Sequence[int]], vision: VisionDims, key_width: int
) -> int:
    """Bytes that the softmax of the signals moves, in float32: every head's scores some four times."""
    if (
        not isinstance(reducer, EncoderReducer)
        or not reducer.requires & VISION_LAYER_INPUTS
        or not any(plan.reduces_entry for plan in plans)
    ):
        return 0
    rows = [tower_rows(vision, n) for span in passes for n in span]
    heads = 1 if reducer.scoring_rules().signal_heads == "one" else vision.width // key_width
    return sum(16 * heads * query_rows(vision, n, reducer.options.signal_queries) * n for n in rows) * attentions(
        reducer
    )
