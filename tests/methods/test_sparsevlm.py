"""SparseVLM: recycling as loops do it, released counts, heads that look most, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from families import FAMILIES, ONE, forward, shared
from method_views import decoder_view, refused

import duet_vlm
from duet_vlm.methods.decoder.sparsevlm import SparseVLM
from duet_vlm.planning.tokens import Selection


def groups(chosen: Selection, b: int) -> dict[int, list[int]]:
    index = chosen.index[b][chosen.valid[b]].tolist()
    pairs = zip(chosen.source_tokens[b].tolist(), chosen.target_row[b].tolist(), strict=True)
    out: dict[int, list[int]] = {token: [] for token in index}
    for member, row in pairs:
        if row >= 0:
            out[index[row]].append(member)
    return out


def slow_peaks(rows: list[list[float]], count: int, nearest: int) -> tuple[list[int], list[int]]:
    """Centres by falling product of density and distance to a denser row, and the number of each row's centre."""
    total = range(len(rows))
    apart = [[math.dist(rows[i], rows[j]) / math.sqrt(len(rows[0])) for j in total] for i in total]
    density = [math.exp(-sum(d * d for d in sorted(apart[i])[:nearest]) / nearest) for i in total]
    delta = []
    for i in total:
        denser = [apart[i][j] for j in total if density[j] > density[i] or (density[j] == density[i] and j < i)]
        delta.append(min(denser, default=max(map(max, apart))))
    centres = sorted(total, key=lambda i: -density[i] * delta[i])[:count]
    into = [centres.index(i) if i in centres else min(range(count), key=lambda c: apart[i][centres[c]]) for i in total]
    return centres, into


def slow_sparsevlm(scores: list[float], rows: list[list[float]], stay: int) -> dict[int, list[int]]:
    """Anchor -> members for all that go on: the kept ones, then the clusters' centres."""
    there = len(scores)
    order = sorted(range(there), key=lambda i: -scores[i])
    for kept in range(there, -1, -1):
        pooled = int(0.3 * (there - kept)) + 1 if kept < there else 0
        clusters = pooled // 10 + 1 if kept < there else 0
        if kept + clusters == stay:
            break
    members = order[kept : kept + pooled]
    out = {token: [] for token in sorted(order[:kept])}
    if members:
        centres, into = slow_peaks([rows[m] for m in members], clusters, clusters)
        out |= {
            members[c]: [m for m, c2 in zip(members, into, strict=True) if centres[c2] == c and m != members[c]]
            for c in centres
        }
    return out


@pytest.mark.parametrize("stay", [[10, 40, 12], [57, 7, 30], [58, 59, 31], [60, 50, 40]])
def test_sparsevlm_recycles_as_loops_do(stay: list[int]) -> None:
    there = [60, 120, 40]
    shown = decoder_view(there, stay, seed=sum(stay))
    chosen = SparseVLM(schedule=((2, 5),)).prune_tokens(shown)
    assert isinstance(chosen, Selection)
    for b, (n, k) in enumerate(zip(there, stay, strict=True)):
        expected = slow_sparsevlm(shown.scores[b, :n].mean(-1).tolist(), shown.hidden_states[b, :n].tolist(), k)
        assert groups(chosen, b) == expected and len(expected) == k
        index = chosen.index[b][chosen.valid[b]].tolist()
        assert index == sorted(index)


def test_sparsevlm_keeps_within_counts_too_small_for_its_clusters() -> None:
    for stay in (1, 2, 3):
        chosen = SparseVLM(schedule=((2, 5),)).prune_tokens(decoder_view([200], [stay], seed=stay))
        assert int(chosen.valid.sum()) == stay
        best = decoder_view([200], [stay], seed=stay).scores[0].mean(-1).argmax()
        assert int(best) in chosen.index[0][chosen.valid[0]].tolist()


def test_sparsevlm_second_release_reads_the_heads_that_look_most() -> None:
    shown = decoder_view([9, 6], [4, 3], seed=5, heads=6)
    mask = SparseVLM(schedule=((2, 4),), recycle=False, best_heads=2).prune_tokens(shown)
    for b, (n, k) in enumerate(shown.host_counts):
        scores = shown.scores[b, :n].T.tolist()
        two = sorted(scores, key=sum, reverse=True)[:2]
        mean = [sum(column) for column in zip(*two, strict=True)]
        assert set(mask[b].nonzero().flatten().tolist()) == set(sorted(range(n), key=lambda i: -mean[i])[:k])
    everyone = SparseVLM(schedule=((2, 4),), recycle=False, best_heads=14).prune_tokens(shown)
    assert torch.equal(everyone, SparseVLM(schedule=((2, 4),), recycle=False).prune_tokens(shown))


@pytest.mark.parametrize(("tokens", "expected"), [(192, (309, 204, 113)), (64, (82, 32, 18))])
def test_sparsevlm_official_counts(tokens: int, expected: tuple[int, ...]) -> None:
    """Means of all that go on at 576 tokens and 32 layers: 206.5 for nominal 192, 82.3 for 64."""
    counts = SparseVLM.official(tokens).plan(576, 32, None).counts
    assert (counts[0], counts[2], counts[3], counts[7], counts[16]) == (576, 576, *expected)
    assert pytest.approx(sum(counts) / 32, abs=0.06) == {192: 206.5, 64: 82.3}[tokens]


def test_sparsevlm_official_asks_where_only_the_order_changes() -> None:
    """A stage whose number is not below what is there recycles one token: as many go on, that one behind the others."""
    method = SparseVLM.official(schedule=((2, 8), (4, 100)))
    model = shared("llava")
    with duet_vlm.attach(model, method) as handle:
        forward(model, FAMILIES["llava"].inputs([ONE]))
        before, after = (handle._prompt_state.layer_group(layer).tokens for layer in (3, 4))
    slots = [tokens.prompt_index[0][tokens.visual[0]].tolist() for tokens in (before, after)]
    assert (
        sorted(slots[0]) == sorted(slots[1])
        and slots[0] != slots[1]
        and slots[1][:-1] == [s for s in slots[0] if s != slots[1][-1]]
    )


def test_sparsevlm_bad_input() -> None:
    refused("sparsevlm", "best_heads=0: a number of heads", budget=0.4, best_heads=0)
    refused("sparsevlm", "drop before layer 1 or later", schedule=((0, 0.5),))
    with pytest.raises(ValueError, match="version='3'"):
        SparseVLM.official(version="3")
    with pytest.raises(ValueError, match="tokens='100'"):
        SparseVLM.official(100)
