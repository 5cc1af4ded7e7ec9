"""PruneVid inside the decoder: the same share of every set."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from method_views import decoder_spans_view, many_counts, video_method


@settings(max_examples=60, deadline=None, derandomize=True)
@given(many_counts, st.integers(0, 10**6))
def test_prunevid_keeps_the_same_share_of_every_set(counts: list[tuple[int, int]], seed: int) -> None:
    view = decoder_spans_view([n for n, _ in counts], [k for _, k in counts], seed)
    mask = video_method("prunevid").prune_tokens(view)
    for b, (n, k) in enumerate(counts):
        sets: dict[tuple[int, float], list[int]] = {}
        for token in range(n):
            sets.setdefault((int(view.span_index[b, token]), float(view.tags[b, token])), []).append(token)
        names = sorted(sets)
        quota = [k * len(sets[name]) // n for name in names]
        for number in sorted(range(len(names)), key=lambda i: -(k * len(sets[names[i]]) % n))[: k - sum(quota)]:
            quota[number] += 1
        expected = [
            t
            for name, q in zip(names, quota, strict=True)
            for t in sorted(sets[name], key=lambda t: -float(view.scores[b, t]))[:q]
        ]
        assert mask[b].nonzero()[:, 0].tolist() == sorted(expected) and len(expected) == k
