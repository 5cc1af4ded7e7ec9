"""HoliTom inside the decoder: what leaves joins what stays."""

from __future__ import annotations

import pytest
import reference_ops
from hypothesis import given, settings
from hypothesis import strategies as st
from method_views import decoder_spans_view, many_counts, video_method

from duet_vlm.ops.merge import merged_rows


@settings(max_examples=60, deadline=None, derandomize=True)
@given(many_counts, st.integers(0, 10**6), st.sampled_from(["mean", "halving"]))
def test_holitom_joins_what_leaves_to_what_stays(counts: list[tuple[int, int]], seed: int, joining: str) -> None:
    view = decoder_spans_view([n for n, _ in counts], [k for _, k in counts], seed)
    ours = merged_rows(view.hidden_states, video_method("holitom", joining=joining).prune_tokens(view))
    for b, (n, k) in enumerate(counts):
        rows = view.hidden_states[b].double().tolist()
        kept = sorted(sorted(range(n), key=lambda t: -float(view.scores[b, t]))[:k])
        members: dict[int, list[int]] = {t: [t] for t in kept}
        for token in sorted(set(range(n)) - set(kept)):
            members[max(kept, key=lambda t: reference_ops.cosine(rows[token], rows[t]))].append(token)
        for place, (first, *rest) in enumerate(members[t] for t in kept):
            row = rows[first]
            for token in rest:  # one after the other
                row = [(a + c) / 2 for a, c in zip(row, rows[token], strict=True)]
            if joining == "mean":
                row = [sum(c) / (1 + len(rest)) for c in zip(*(rows[t] for t in (first, *rest)), strict=True)]
            assert ours[b, place].tolist() == pytest.approx(row, abs=1e-5)
