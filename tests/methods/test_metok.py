"""METok: events, key events and notes, against plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import reference_ops
import torch
from method_views import rows_of_selection, video_method, video_view

from duet_vlm import DecoderView
from duet_vlm.ops.video import split_windows


def slow_metok(
    rows: list[list[list[float]]], words: list[list[float]], count: int, method: Any
) -> tuple[list[Any], dict[int, float]]:
    """Rows (token, [(member, weight)]) and what is noted of each token, of a clip by frame and place."""
    steps, places = len(rows), len(rows[0])

    def unit(x: list[float]) -> list[float]:
        return [c / math.sqrt(sum(v * v for v in x)) for c in x]

    def mean(some: list[list[float]]) -> list[float]:
        return [sum(c) / len(some) for c in zip(*some, strict=True)]

    frames = [unit(mean(frame)) for frame in rows]
    near = [sum(a * b for a, b in zip(x, y, strict=True)) for x, y in zip(frames, frames[1:], strict=False)]
    middle = sum(near) / len(near)
    spread = math.sqrt(sum((x - middle) ** 2 for x in near) / len(near))
    starts = [0, *(t + 1 for t, x in enumerate(near) if x < middle - method.deviations * spread)]
    event = [sum(t >= start for start in starts) - 1 for t in range(steps)]
    question = mean([unit(word) for word in words])
    about = [sum(a * b for a, b in zip(frame, question, strict=True)) for frame in frames]
    score = [sum(about[t] for t in range(steps) if event[t] == e) / event.count(e) for e in range(len(starts))]
    key = sorted(range(len(starts)), key=lambda e: -score[e])[: math.ceil(method.key * len(starts))]
    fresh = [
        [
            p
            for p in range(places)
            if t == 0
            or event[t] != event[t - 1]
            or reference_ops.cosine(rows[t][p], rows[t - 1][p]) <= method.threshold
        ]
        for t in range(steps)
    ]
    weight = torch.tensor([[len(f) * (1.0 if event[t] in key else method.pooled) for t, f in enumerate(fresh)]])
    counts = split_windows(torch.tensor([count]), weight, torch.full((1, steps), places))[0].tolist()
    out: list[Any] = []
    for t in range(steps):
        runs = min(counts[t], len(fresh[t]))
        for r in range(runs):
            run = [t * places + p for i, p in enumerate(fresh[t]) if i * runs // len(fresh[t]) == r]
            out.append((run[0], [(token, round(1 / len(run), 5)) for token in run]))
        others = [p for p in range(places) if p not in fresh[t]]
        left = counts[t] - runs
        spare = [p for i, p in enumerate(others) if (i + 1) * left // len(others) > i * left // len(others)]
        out += [(t * places + p, [(t * places + p, 1.0)]) for p in spare]
    total = reference_ops.softmax([s / method.temperature for s in score])
    return sorted(out), {t * places + p: len(starts) * total[event[t]] for t in range(steps) for p in range(places)}


@pytest.mark.parametrize(
    ("seed", "count", "still"), [(0, 9, 0.6), (1, 20, 0.7), (2, 38, 0.8), (3, 3, 0.5), (4, 30, 0.9)]
)
def test_metok_against_loops(seed: int, count: int, still: float) -> None:
    reducer = video_method("metok", keep=None)
    view = video_view(reducer, [(8, 5), (3, 4)], [count, 2], seed, still=still)
    selection = reducer.select_tokens(view)
    words = view.question.embeddings[0][view.question.valid[0]].double().tolist()
    expected, notes = slow_metok(view.features[0].double().view(8, 5, 6).tolist(), words, count, reducer)
    assert rows_of_selection(selection, 0) == expected and len(expected) == count
    for token, note, real in zip(
        selection.index[0].tolist(), selection.tags[0].tolist(), selection.valid[0].tolist(), strict=True
    ):
        assert not real or note == pytest.approx(notes[token], rel=1e-4)


def test_metok_weighs_attention_by_events() -> None:
    view = DecoderView(
        torch.ones(1, 5, dtype=torch.bool), torch.tensor([2]), host_counts=((5, 2),), scores=torch.tensor([[0.5, 0.3, 0.1, 0.28, 0.2]]),
        tags=torch.tensor([[0.2, 1.0, 2.0, 0.0, 2.0]]),
    )  # fmt: skip
    # what has no note counts as it is
    assert video_method("metok").prune_tokens(view)[0].tolist() == [False, True, False, False, True]
