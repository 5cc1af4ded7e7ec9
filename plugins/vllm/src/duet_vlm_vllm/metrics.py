"""Counters on vLLM's own /metrics page. They count what the front end lays out, the dummy images and clips of the start
included."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from duet_vlm.serve.decoder_stages import DecoderStages


@lru_cache(maxsize=1)
def _counters() -> tuple[Any, Any, Any, Any, Any]:
    from prometheus_client import Counter  # when first used: vLLM sets up its registry before it serves

    return (
        Counter("duet_vlm_visual_tokens_before", "Visual tokens of images and clips before reduction.", ["model_name"]),
        Counter(
            "duet_vlm_visual_tokens_after", "Visual tokens of images and clips that enter the decoder.", ["model_name"]
        ),
        Counter(
            "duet_vlm_reduced_requests", "Requests with at least one image or clip that was reduced.", ["model_name"]
        ),
        Counter(
            "duet_vlm_rows_dropped", "Visual tokens that leave in front of a decoder layer.", ["model_name", "layer"]
        ),
        Counter(
            "duet_vlm_kv_rows_saved",
            "Rows of the KV cache, of one layer each, that drops inside the decoder save.",
            ["model_name"],
        ),
    )


def count(model: str, before: int, after: int) -> None:
    """Of one request: visual tokens before and after."""
    tokens_before, tokens_after, requests, *_ = _counters()
    tokens_before.labels(model).inc(before)
    tokens_after.labels(model).inc(after)
    if after < before:
        requests.labels(model).inc()


def count_drops(model: str, stages: DecoderStages, rows: Sequence[int]) -> None:
    """Of one request: ``rows`` of its images and clips in each stage of the decoder."""
    *_, dropped, saved = _counters()
    for layer, (before, after) in zip(stages.starts, pairwise(rows), strict=True):
        dropped.labels(model, layer).inc(before - after)
    saved.labels(model).inc(sum((rows[0] - count) * size for count, size in zip(rows, stages.sizes, strict=True)))
