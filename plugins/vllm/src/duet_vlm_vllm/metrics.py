"""Counters on vLLM's own /metrics page. They count what the front end lays out, the dummy images and clips of the start
included."""

from __future__ import annotations

from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def _counters() -> tuple[Any, Any, Any]:
    from prometheus_client import Counter  # when first used: vLLM sets up its registry before it serves

    return (
        Counter("duet_vlm_visual_tokens_before", "Visual tokens of images and clips before reduction.", ["model_name"]),
        Counter(
            "duet_vlm_visual_tokens_after", "Visual tokens of images and clips that enter the decoder.", ["model_name"]
        ),
        Counter(
            "duet_vlm_reduced_requests", "Requests with at least one image or clip that was reduced.", ["model_name"]
        ),
    )


def count(model: str, before: int, after: int) -> None:
    """Of one request: visual tokens before and after."""
    tokens_before, tokens_after, requests = _counters()
    tokens_before.labels(model).inc(before)
    tokens_after.labels(model).inc(after)
    if after < before:
        requests.labels(model).inc()
