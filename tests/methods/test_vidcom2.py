"""VidCom2 against plain loops."""

from __future__ import annotations

import math

import reference_ops
from method_views import rows_of_selection, video_method, video_view


def test_vidcom2_against_loops() -> None:
    reducer = video_method("vidcom2", keep=None)
    view = video_view(reducer, [(4, 5)], [9], still=0.6)
    assert view.features is not None
    rows = view.features[0].double().tolist()
    spread = [sum((r[c] - sum(x[c] for x in rows) / 20) ** 2 for r in rows) for c in range(6)]
    calm = sorted(sorted(range(6), key=lambda c: spread[c])[:3])
    unit = [[r[c] / math.sqrt(sum(r[k] ** 2 for k in calm)) for c in calm] for r in rows]

    def alike(row: list[float], centre: list[list[float]]) -> float:
        mean = [sum(c) / len(centre) for c in zip(*centre, strict=True)]
        return sum(math.exp(-(math.dist(row, mean) ** 2) / (2 * a)) for a in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    frames = [unit[t * 5 : t * 5 + 5] for t in range(4)]
    to_clip = [[alike(row, unit) for row in frame] for frame in frames]
    unlike = [-sum(line) / 5 for line in to_clip]
    top = reference_ops.softmax([u / 0.1 for u in unlike])
    scale = [1 + p - 0.25 for p in top]
    exact = [9 * s / sum(scale) for s in scale]
    counts = [math.floor(x) for x in exact]
    for t in sorted(range(4), key=lambda t: -(exact[t] - counts[t]))[: 9 - sum(counts)]:
        counts[t] += 1
    kept = []
    for t, frame in enumerate(frames):
        score = [to_clip[t][p] + alike(frame[p], frame) for p in range(5)]
        kept += sorted(t * 5 + p for p in sorted(range(5), key=lambda p: score[p])[: counts[t]])
    assert [token for token, _ in rows_of_selection(reducer.select_tokens(view), 0)] == kept
