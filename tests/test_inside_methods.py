"""Methods inside the decoder against slow twins of what they choose, and their bad inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import FAMILIES, ONE, THREE, TWO, forward, shared
from torch import Tensor

import duet_vlm
from duet_vlm import TextView
from duet_vlm.methods.sparsevlm import SparseVLM
from duet_vlm.ops.cluster import density_peaks
from duet_vlm.tokens import Selection


def view(there: list[int], stay: list[int], seed: int, heads: int = 3, **more: Tensor) -> TextView:
    """Random rows and scores of as many tokens as each sample has."""
    draw = torch.Generator().manual_seed(seed)
    most = max(there)
    valid = torch.arange(most) < torch.tensor(there)[:, None]
    return TextView(
        valid, torch.tensor(stay), counts=tuple(zip(there, stay, strict=True)), scores=torch.rand(len(there), most, heads, generator=draw),
        rows=torch.randn(len(there), most, 8, generator=draw), **more,
    )  # fmt: skip


# ---- density peaks


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


@pytest.mark.parametrize("nearest", [2, 3, 5])
def test_density_peaks_equal_loops(nearest: int) -> None:
    sizes, counts = [13, 29, 6], [2, 4, 1]
    rows = torch.randn(3, 29, 4, generator=torch.Generator().manual_seed(nearest), dtype=torch.float64)
    valid = torch.arange(29) < torch.tensor(sizes)[:, None]
    centres, into = density_peaks(rows, valid, torch.tensor(counts), torch.full((3,), nearest), max(counts))
    for b, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        expected = slow_peaks(rows[b, :size].float().tolist(), count, nearest)
        assert (centres[b, :count].tolist(), into[b, :size].tolist()) == expected


def test_of_two_equally_dense_rows_the_earlier_one_is_denser() -> None:
    """Two pairs of mutual nearest neighbours, equally far apart: the first row of each is its peak."""
    rows = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [10.0, 0.0], [11.0, 0.0]]])
    centres, into = density_peaks(rows, torch.ones(1, 4, dtype=torch.bool), torch.tensor([2]), torch.tensor([2]), 2)
    assert centres.tolist() == [[0, 2]] and into.tolist() == [[0, 0, 1, 1]]


# ---- sparsevlm


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
        out |= {members[c]: [m for m, c2 in zip(members, into, strict=True) if centres[c2] == c and m != members[c]] for c in centres}
    return out


def groups(chosen: Selection, b: int) -> dict[int, list[int]]:
    index = chosen.index[b][chosen.valid[b]].tolist()
    pairs = zip(chosen.members[b].tolist(), chosen.into[b].tolist(), strict=True)
    out: dict[int, list[int]] = {token: [] for token in index}
    for member, row in pairs:
        if row >= 0:
            out[index[row]].append(member)
    return out


@pytest.mark.parametrize("stay", [[10, 40, 12], [57, 7, 30], [58, 59, 31], [60, 50, 40]])
def test_sparsevlm_recycles_as_loops_do(stay: list[int]) -> None:
    there = [60, 120, 40]
    shown = view(there, stay, seed=sum(stay))
    chosen = SparseVLM(schedule=((2, 5),)).t2v(shown)
    assert isinstance(chosen, Selection)
    for b, (n, k) in enumerate(zip(there, stay, strict=True)):
        expected = slow_sparsevlm(shown.scores[b, :n].mean(-1).tolist(), shown.rows[b, :n].tolist(), k)
        assert groups(chosen, b) == expected and len(expected) == k
        index = chosen.index[b][chosen.valid[b]].tolist()
        assert index == sorted(index)


def test_sparsevlm_keeps_within_counts_too_small_for_its_clusters() -> None:
    for stay in (1, 2, 3):
        chosen = SparseVLM(schedule=((2, 5),)).t2v(view([200], [stay], seed=stay))
        assert int(chosen.valid.sum()) == stay
        best = view([200], [stay], seed=stay).scores[0].mean(-1).argmax()
        assert int(best) in chosen.index[0][chosen.valid[0]].tolist()


def test_sparsevlm_second_release_reads_the_heads_that_look_most() -> None:
    shown = view([9, 6], [4, 3], seed=5, heads=6)
    mask = SparseVLM(schedule=((2, 4),), recycle=False, best_heads=2).t2v(shown)
    for b, (n, k) in enumerate(shown.counts):
        scores = shown.scores[b, :n].T.tolist()
        two = sorted(scores, key=sum, reverse=True)[:2]
        mean = [sum(column) for column in zip(*two, strict=True)]
        assert set(mask[b].nonzero().flatten().tolist()) == set(sorted(range(n), key=lambda i: -mean[i])[:k])
    everyone = SparseVLM(schedule=((2, 4),), recycle=False, best_heads=14).t2v(shown)
    assert torch.equal(everyone, SparseVLM(schedule=((2, 4),), recycle=False).t2v(shown))


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
        before, after = (handle._run.group(layer).tokens for layer in (3, 4))
    slots = [tokens.slot[0][tokens.visual[0]].tolist() for tokens in (before, after)]
    assert sorted(slots[0]) == sorted(slots[1]) and slots[0] != slots[1] and slots[1][:-1] == [s for s in slots[0] if s != slots[1][-1]]


def refused(method: str, message: str, **fields: Any) -> None:
    with pytest.raises(ValueError, match=message):
        duet_vlm.attach(shared("llava"), method, **fields)
    assert duet_vlm.handle_of(shared("llava")) is None


def test_sparsevlm_bad_input() -> None:
    refused("sparsevlm", "best_heads=0: a number of heads", budget=0.4, best_heads=0)
    refused("sparsevlm", "drop before layer 1 or later", schedule=((0, 0.5),))
    with pytest.raises(ValueError, match="version='3'"):
        SparseVLM.official(version="3")
    with pytest.raises(ValueError, match="tokens=100"):
        SparseVLM.official(100)


# ---- all


@pytest.mark.parametrize("rows", [(ONE,), (THREE, TWO)], ids=["one", "ragged"])
def test_layers_in_a_row_rank_by_the_rows_that_are_left(rows: Any) -> None:
    """A drop in front of every layer: a layer's attention is that of the rows that it reads."""
    model, family = shared("llava", "eager"), FAMILIES["llava"]
    inputs = family.inputs(rows)
    seen: list[TextView] = []

    class Spy(SparseVLM):
        def t2v(self, view: TextView) -> Any:
            seen.append(view)
            return super().t2v(view)

    with duet_vlm.attach(model, Spy(schedule=((2, 0.7), (3, 0.5), (4, 0.4)), recycle=False, text_query="last")) as handle:
        out = forward(model, inputs, output_attentions=True)
        groups = [handle._run.group(layer).tokens for layer in (1, 2, 3)]
    for shown, tokens, attention in zip(seen, groups, out.attentions[1:4], strict=True):
        for b in range(len(rows)):
            expected = attention[b, :, -1][:, tokens.visual[b]].T
            torch.testing.assert_close(shown.scores[b][shown.valid[b]], expected, rtol=1e-4, atol=1e-6)
