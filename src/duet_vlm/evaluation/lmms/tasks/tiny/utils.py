"""The embedded benchmark as an lmms-eval task: a document is a place in a stream, everything else is drawn from it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from datasets import Dataset

from duet_vlm.evaluation import tiny

_sample = lru_cache(maxsize=4096)(tiny.sample)


def _of(doc: dict[str, Any]) -> tiny.Sample:
    return _sample(doc["split"], doc["index"], doc["seed"])


def questions(streams: Dataset) -> Dataset:
    """Each row of ``streams.json`` as its questions."""
    return Dataset.from_list(
        [{"split": s["split"], "seed": s["seed"], "index": i} for s in streams for i in range(s["questions"])]
    )


def image(doc: dict[str, Any]) -> list[Any]:
    return [_of(doc).image]


def question(doc: dict[str, Any]) -> str:
    return _of(doc).question


def answer(doc: dict[str, Any]) -> str:
    return _of(doc).answer


def hits(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match, over all questions and for this one's kind."""
    item = _of(doc)
    hit = float(results[0].strip() == item.answer)
    return {"exact_match": hit, item.kind: hit}
