"""Each op equals its slow twin: ties, one token, all tokens, empty spans, ragged batches."""

from __future__ import annotations

from typing import Any

import pytest
import reference_ops
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mosaic import mosaic_order
from torch import Tensor

from duet_vlm import DecoderView, EncoderView, SpanPlan
from duet_vlm.inputs.text_queries import query_rows
from duet_vlm.methods.baselines.tokens import RandomTokens, UniformTokens
from duet_vlm.methods.decoder.fastv import FastV
from duet_vlm.methods.decoder.pyramiddrop import PyramidDrop
from duet_vlm.methods.encoder.visionzip import VisionZip
from duet_vlm.methods.two_stage.duet import Duet
from duet_vlm.ops import merge, ragged, score, select
from duet_vlm.planning.tokens import Selection, TokenMap
from duet_vlm.profiling.flop_counter import allocations
from duet_vlm.reducers.decoder import DecoderReducer
from duet_vlm.reducers.encoder import EncoderReducer
from duet_vlm.reducers.inputs import Input
from duet_vlm.runtime.prefill.span_rows import SpanRows

quick = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
coarse = st.sampled_from([0.0, 0.25, 0.5, 1.0])  # few values: many ties


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def score_batches(draw: Any, rows: int = 3, width: int = 12) -> tuple[Tensor, Tensor]:
    """[B, N] scores with ties and [B, N] validity, rows of any length, empty ones too."""
    b, n = draw(st.integers(1, rows)), draw(st.integers(1, width))
    table = draw(st.lists(st.lists(coarse, min_size=n, max_size=n), min_size=b, max_size=b))
    real = draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=b, max_size=b))
    return torch.tensor(table), torch.tensor(real)


# ---- score


@quick
@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(1, 9))
def test_cls_attention(seed: int, batch: int, heads: int, tokens: int) -> None:
    query, key = normal(seed, batch, heads, 1 + tokens, 4), normal(seed + 1, batch, heads, 1 + tokens, 4)
    expected = torch.tensor(
        [reference_ops.cls_attention(q, k, 0.5) for q, k in zip(query.tolist(), key.tolist(), strict=True)]
    )
    torch.testing.assert_close(score.cls_attention(query, key, 0.5), expected)


@quick
@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(1, 9))
def test_column_attention(seed: int, batch: int, heads: int, tokens: int) -> None:
    query, key = normal(seed, batch, heads, tokens, 4), normal(seed + 1, batch, heads, tokens, 4)
    expected = torch.tensor(
        [reference_ops.column_attention(q, k, 0.5) for q, k in zip(query.tolist(), key.tolist(), strict=True)]
    )
    torch.testing.assert_close(score.column_attention(query, key, 0.5), expected)


@pytest.mark.parametrize("tokens", [255, 256, 257, 600])
def test_column_attention_in_blocks(tokens: int) -> None:
    query, key = normal(1, 1, 2, tokens, 8), normal(2, 1, 2, tokens, 8)
    whole = (query @ key.transpose(-1, -2) * 0.3).softmax(-1).mean(1).sum(1)
    torch.testing.assert_close(score.column_attention(query, key, 0.3), whole)


@quick
@given(st.integers(1, 400), st.integers(1, 400))
def test_spread_takes_one_row_of_every_stretch(total: int, count: int) -> None:
    rows = score.spread_indices(total, count, torch.device("cpu")).tolist()
    assert rows == sorted(set(rows)) and len(rows) == min(total, count)
    if count < total:
        assert all(i * total // count <= row < (i + 1) * total // count for i, row in enumerate(rows))
    assert score.spread_indices(total, None, torch.device("cpu")).tolist() == list(range(total))


@pytest.mark.parametrize(("side", "count"), [(72, 256), (128, 256), (256, 256), (64, 64), (48, 256)])
def test_spread_meets_every_part_of_a_grid(side: int, count: int) -> None:
    """As many in each quarter of the columns and of the rows, also where the stretches are whole rows."""
    rows = score.spread_indices(side * side, count, torch.device("cpu"))
    for place in (rows // side, rows % side):
        met = torch.bincount(place * 4 // side, minlength=4)
        assert met.min() >= 0.85 * count / 4 and met.max() <= 1.15 * count / 4


@pytest.mark.parametrize(
    ("tokens", "sample"), [(600, 1), (600, 7), (600, 257), (600, 599), (600, 600), (600, 900), (600, None)]
)
def test_column_attention_from_some_of_the_rows(tokens: int, sample: int | None) -> None:
    query, key = normal(1, 2, 2, tokens, 8), normal(2, 2, 2, tokens, 8)
    weights = (query @ key.transpose(-1, -2) * 0.3).softmax(-1).mean(1)
    asking = score.spread_indices(tokens, sample, torch.device("cpu"))
    expected = weights[:, asking].sum(1) * tokens / len(asking)
    torch.testing.assert_close(score.column_attention(query, key, 0.3, sample), expected)
    assert (sample or tokens) < tokens or torch.equal(
        score.column_attention(query, key, 0.3, sample), score.column_attention(query, key, 0.3)
    )


@quick
@given(score_batches(rows=4, width=30), st.integers(1, 40))
def test_some_of_the_real_rows(batch: tuple[Tensor, Tensor], count: int) -> None:
    real = batch[1]
    for row, found, weight in zip(real.tolist(), *(x.tolist() for x in score.sample_rows(real, count)), strict=True):
        places = [place for place, asks in enumerate(row) if asks]
        asking = [place for place, counts in zip(found, weight, strict=True) if counts]
        assert len(set(asking)) == len(asking) == min(count, len(places)) and set(asking) <= set(places)


@quick
@given(
    seeds,
    st.integers(1, 3),
    st.sampled_from([(4, 4), (4, 2), (6, 2), (4, 1)]),
    st.integers(1, 5),
    st.integers(1, 9),
    st.data(),
)
def test_query_attention(seed: int, batch: int, heads: tuple[int, int], queries: int, keys: int, data: Any) -> None:
    query, key = normal(seed, batch, heads[0], queries, 4), normal(seed + 1, batch, heads[1], keys, 4)
    allowed = torch.rand(batch, queries, keys, generator=torch.Generator().manual_seed(seed)) < 0.6
    allowed[..., data.draw(st.integers(0, keys - 1))] = True
    weight = torch.randint(0, 2, (batch, queries), generator=torch.Generator().manual_seed(seed)).float()
    weight[:, 0] = 1
    table = zip(query.tolist(), key.tolist(), allowed.tolist(), weight.tolist(), strict=True)
    expected = torch.tensor([reference_ops.query_attention(q, k, 0.5, a, w) for q, k, a, w in table])
    torch.testing.assert_close(score.query_attention(query, key, 0.5, allowed, weight), expected)


@pytest.mark.parametrize("queries", [255, 256, 257, 513])
def test_query_attention_in_blocks(queries: int) -> None:
    query, key = normal(1, 1, 4, queries, 8), normal(2, 1, 2, 40, 8)
    allowed = torch.ones(1, queries, 40, dtype=torch.bool)
    weights = (query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.3).softmax(-1)
    torch.testing.assert_close(
        score.query_attention(query, key, 0.3, allowed, torch.ones(1, queries)), weights.mean((1, 2))
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_are_float32_whatever_the_model_is(dtype: torch.dtype) -> None:
    query, key = normal(1, 1, 2, 6, 8).to(dtype), normal(2, 1, 2, 6, 8).to(dtype)
    allowed, weight = torch.ones(1, 6, 6, dtype=torch.bool), torch.ones(1, 6)
    for scores, exact in (
        (score.cls_attention(query, key, 0.3), score.cls_attention(query.float(), key.float(), 0.3)),
        (score.column_attention(query, key, 0.3), score.column_attention(query.float(), key.float(), 0.3)),
        (
            score.query_attention(query, key, 0.3, allowed, weight),
            score.query_attention(query.float(), key.float(), 0.3, allowed, weight),
        ),
    ):
        assert scores.dtype == torch.float32 and torch.equal(scores, exact)


# ---- select


@quick
@given(score_batches())
def test_ranking_and_ranks(batch: tuple[Tensor, Tensor]) -> None:
    scores, valid = batch
    order, ranks = select.ranking(scores, valid), select.ranks(select.ranking(scores, valid))
    for s, v, o, r in zip(scores.tolist(), valid.tolist(), order.tolist(), ranks.tolist(), strict=True):
        assert o[: sum(v)] == reference_ops.best(s, v, len(s))
        assert [o[rank] for rank in r] == list(range(len(s)))


@quick
@given(score_batches(), st.data())
def test_top(batch: tuple[Tensor, Tensor], data: Any) -> None:
    scores, valid = batch
    count = data.draw(st.lists(st.integers(0, scores.shape[1] + 2), min_size=len(scores), max_size=len(scores)))
    chosen = select.top(scores, valid, torch.tensor(count))
    for s, v, c, mask in zip(scores.tolist(), valid.tolist(), count, chosen, strict=True):
        assert mask.nonzero().flatten().tolist() == sorted(reference_ops.best(s, v, c))


@quick
@given(score_batches(), st.data())
def test_spaced(batch: tuple[Tensor, Tensor], data: Any) -> None:
    _, valid = batch
    count = [data.draw(st.integers(0, sum(v))) for v in valid.tolist()]
    for v, c, mask in zip(valid.tolist(), count, select.spaced_picks(valid, torch.tensor(count)), strict=True):
        assert mask.nonzero().flatten().tolist() == reference_ops.spaced(v, c)


@quick
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=4))
def test_places(rows: list[tuple[int, int]]) -> None:
    place, valid = select.rank_positions(torch.tensor([c for c, _ in rows]), 9, torch.tensor([p for _, p in rows]))
    for (count, pool), found, real in zip(rows, place.tolist(), valid.tolist(), strict=True):
        assert [f for f, ok in zip(found, real, strict=True) if ok] == [i * pool // count for i in range(count)]


# ---- ragged


@quick
@given(score_batches())
def test_the_last_row_and_what_is_behind_it(batch: tuple[Tensor, Tensor]) -> None:
    rows = batch[1]
    for row, last, behind in zip(
        rows.tolist(), ragged.last_true(rows).tolist(), ragged.after_last_true(rows).tolist(), strict=True
    ):
        end = max((place for place, real in enumerate(row) if real), default=-1)
        assert [place for place, found in enumerate(last) if found] == ([end] if end >= 0 else [])
        assert behind == [place > end for place in range(len(row))]


@quick
@given(score_batches(), st.integers(0, 3))
def test_pack(batch: tuple[Tensor, Tensor], spare: int) -> None:
    _, keep = batch
    width = min(int(keep.sum(1).max()) + spare, keep.shape[1])
    for pack, side in ((ragged.pack_left, "left"), (ragged.pack_right, "right")):
        index, valid = pack(keep, width)
        for kept, found, real in zip(keep, index.tolist(), valid.tolist(), strict=True):
            expected = kept.nonzero().flatten().tolist()
            assert [f for f, ok in zip(found, real, strict=True) if ok] == expected
            padding = [False] * (width - len(expected))
            assert real == (padding + [True] * len(expected) if side == "left" else [True] * len(expected) + padding)
            assert all(0 <= f < keep.shape[1] for f in found)


@quick
@given(seeds, st.integers(1, 3), st.integers(1, 6), st.integers(1, 8), st.booleans())
def test_take(seed: int, batch: int, rows: int, count: int, broadcast: bool) -> None:
    index = torch.randint(0, rows, (batch, count), generator=torch.Generator().manual_seed(seed))
    source = normal(seed, 1 if broadcast else batch, rows, 2, 3)
    mask = normal(seed, 1 if broadcast else batch, 2, rows, rows)
    for b in range(batch):
        chosen = index[b].tolist()
        own = source[0 if broadcast else b]
        assert torch.equal(ragged.gather_rows(source, index)[b], torch.stack([own[i] for i in chosen]))
        positions = source[..., 0, 0]
        assert torch.equal(ragged.gather_last_dim(positions, index)[b], torch.stack([own[i, 0, 0] for i in chosen]))
        mrope = positions.expand(3, *positions.shape)
        assert torch.equal(ragged.gather_last_dim(mrope, index)[2, b], torch.stack([own[i, 0, 0] for i in chosen]))
        square = mask[0 if broadcast else b]
        cut = torch.stack([torch.stack([square[:, i, j] for j in chosen], -1) for i in chosen], 1)
        assert torch.equal(ragged.gather_square(mask, index)[b], cut)


def test_pad_rows() -> None:
    padded, valid = ragged.pad_rows([normal(1, 2, 3), normal(2, 4, 3), normal(3, 1, 3)])
    assert padded.shape == (3, 4, 3) and valid.sum(1).tolist() == [2, 4, 1]
    assert torch.equal(padded[0, :2], normal(1, 2, 3)) and not padded[0, 2:].any()


@quick
@given(score_batches(rows=2, width=9), st.data())
def test_token_map_composes(batch: tuple[Tensor, Tensor], data: Any) -> None:
    """Two drops after each other point at the same prompt slots as lists of lists do."""
    _, valid = batch
    draw = torch.Generator().manual_seed(data.draw(seeds))
    visual = torch.rand(valid.shape, generator=draw) < 0.5
    tokens, slots = (
        TokenMap.identity(valid, visual, torch.zeros_like(valid)),
        [row.nonzero().flatten().tolist() for row in valid],
    )
    for _ in range(2):
        wanted = torch.rand(valid.shape, generator=draw) < 0.6  # by prompt slot
        keep = tokens.valid & wanted.gather(1, tokens.prompt_index)
        slots = [[s for s in row if wanted[b, s]] for b, row in enumerate(slots)]
        tokens = tokens.gather(*ragged.pack_left(keep, int(keep.sum(1).max())))
        assert [t[v].tolist() for t, v in zip(tokens.prompt_index, tokens.valid, strict=True)] == slots
        seen = [[bool(visual[b, s]) for s in row] for b, row in enumerate(slots)]
        assert [t[v].tolist() for t, v in zip(tokens.visual, tokens.valid, strict=True)] == seen


# ---- merge


@quick
@given(seeds, st.integers(2, 8), st.integers(1, 3), st.integers(0, 6), st.sampled_from(["mean", "anchor_plus_mean"]))
def test_merged_rows(seed: int, tokens: int, rows: int, members: int, rule: str) -> None:
    draw = torch.Generator().manual_seed(seed)
    features = normal(seed, 2, tokens, 3)
    index = torch.randint(0, tokens, (2, rows), generator=draw)
    joined = torch.randint(0, tokens, (2, members), generator=draw)
    into = torch.randint(-1, rows, (2, members), generator=draw)
    result = merge.merged_rows(features, Selection(index, torch.ones(2, rows, dtype=torch.bool), joined, into, rule))
    for b in range(2):
        for row in range(rows):
            group = [int(m) for m, to in zip(joined[b], into[b], strict=True) if to == row]
            expected = torch.tensor(reference_ops.merged(features[b].tolist(), int(index[b, row]), group, rule))
            torch.testing.assert_close(result[b, row], expected)
            if not group:
                assert torch.equal(result[b, row], features[b, index[b, row]])  # copied, bit for bit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merging_sums_in_float32(dtype: torch.dtype) -> None:
    features = (normal(3, 1, 65, 4) + 100).to(dtype)
    selection = Selection(
        torch.zeros(1, 1).long(), torch.ones(1, 1).bool(), torch.arange(1, 65)[None], torch.zeros(1, 64).long()
    )
    assert torch.equal(merge.merged_rows(features, selection), features.float().mean(1, keepdim=True).to(dtype))


def test_gradient_flows_to_anchor_and_members_alike() -> None:
    features = normal(1, 1, 5, 2).requires_grad_()
    selection = Selection(
        torch.tensor([[1, 4]]), torch.ones(1, 2).bool(), torch.tensor([[0, 2, 3]]), torch.tensor([[0, 0, -1]])
    )
    merge.merged_rows(features, selection).sum().backward()
    torch.testing.assert_close(features.grad[0, :, 0], torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0, 1.0]))


@quick
@given(seeds, st.integers(1, 8), st.integers(1, 4), st.integers(0, 9), st.sampled_from([torch.float32, torch.float16]))
def test_merged_rows_with_weights(seed: int, tokens: int, rows: int, members: int, dtype: torch.dtype) -> None:
    """A token in several rows, twice in one, and kept besides; rows that nobody joins; numbers that are none where
    nothing joins."""
    draw = torch.Generator().manual_seed(seed)
    features = normal(seed, 2, tokens, 3).to(dtype)
    index = torch.randint(0, tokens, (2, rows), generator=draw)
    joined, into = (
        torch.randint(0, tokens, (2, members), generator=draw),
        torch.randint(-1, rows, (2, members), generator=draw),
    )
    weights = normal(seed + 1, 2, members).masked_fill(into < 0, float("nan"))
    result = merge.merged_rows(
        features, Selection(index, torch.ones(2, rows, dtype=torch.bool), joined, into, weights=weights)
    )
    assert result.dtype == dtype
    for b in range(2):
        for row in range(rows):
            group = [p for p, to in enumerate(into[b].tolist()) if to == row]
            if not group:
                assert torch.equal(result[b, row], features[b, index[b, row]])  # copied, bit for bit
                continue
            expected = reference_ops.weighed(
                features[b].tolist(), joined[b, group].tolist(), weights[b, group].tolist()
            )
            torch.testing.assert_close(result[b, row], torch.tensor(expected, dtype=dtype), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cells", [1, 500, 10**9])
def test_tables_of_long_clips_are_made_in_parts(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor is that of rows x tokens, unless it is made in parts; the rows are the same."""
    draw = torch.Generator().manual_seed(0)
    tokens, rows, members = 100, 40, 150
    features, index = normal(0, 2, tokens, 4), torch.randint(0, tokens, (2, rows), generator=draw)
    joined, into = (
        torch.randint(0, tokens, (2, members), generator=draw),
        torch.randint(-1, rows, (2, members), generator=draw),
    )
    weights = normal(1, 2, members)
    selection = Selection(index, torch.ones(2, rows, dtype=torch.bool), joined, into, weights=weights)
    monkeypatch.setattr(merge, "CELLS", cells)
    found: list[Tensor] = []
    largest = max(allocations(lambda: found.append(merge.merged_rows(features, selection))))
    assert (
        largest <= 4 * max(cells + 2 * tokens, 2 * 2 * tokens, 2 * members * 2)
        if cells < 10**9
        else largest > 4 * 2 * rows * tokens
    )
    for b, row in ((0, 0), (1, 7), (1, rows - 1)):
        group = [p for p, to in enumerate(into[b].tolist()) if to == row]
        expected = reference_ops.weighed(features[b].tolist(), joined[b, group].tolist(), weights[b, group].tolist())
        torch.testing.assert_close(
            found[0][b, row], torch.tensor(expected) if group else features[b, index[b, row]], rtol=1e-4, atol=1e-5
        )


def test_gradient_flows_by_weight() -> None:
    features = normal(1, 1, 4, 2).requires_grad_()
    weights = torch.tensor([[0.5, 0.25, 2.0, 9.0]])
    selection = Selection(
        torch.tensor([[1, 3]]),
        torch.ones(1, 2).bool(),
        torch.tensor([[0, 2, 0, 1]]),
        torch.tensor([[0, 0, 1, -1]]),
        weights=weights,
    )
    merge.merged_rows(features, selection).sum().backward()
    torch.testing.assert_close(features.grad[0, :, 0], torch.tensor([2.5, 0.0, 0.25, 0.0]))


@quick
@given(seeds, st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(0, 2), st.booleans())
def test_matched(seed: int, sizes: list[int], protected: int, ties: bool) -> None:
    width = max(sizes)
    metric = normal(seed, len(sizes), width, 3)
    if ties:
        metric = metric.round()
    source, target = merge.matched(metric, torch.arange(width) < torch.tensor(sizes)[:, None], protected)
    assert source.shape == target.shape == (len(sizes), (width + 1) // 2)
    for rows, size, looks, at in zip(metric.tolist(), sizes, source.tolist(), target.tolist(), strict=True):
        expected = reference_ops.matched(rows[:size], protected)
        assert ties or list(zip(looks, at, strict=True))[: len(expected)] == expected
        assert len(set(looks)) == len(looks) or width < 2


@quick
@given(seeds, st.integers(1, 9), st.integers(0, 5), st.integers(0, 10))
def test_neighbours(seed: int, tokens: int, rows: int, count: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    metric, asked = normal(seed, 2, tokens, 3), torch.randint(0, tokens, (2, rows), generator=draw)
    times = torch.randint(0, 3, (2, tokens), generator=draw)
    found = merge.neighbours(metric, asked, times.float(), count)
    assert found.shape == (2, rows, min(count, tokens))
    for b in range(2):
        for token, order in zip(asked[b].tolist(), found[b].tolist(), strict=True):
            expected = reference_ops.nearest(metric[b].tolist(), token, times[b].tolist())[:count]
            assert order[: len(expected)] == expected


def test_neighbours_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    metric, asked, times = normal(1, 2, 40, 4), torch.arange(40).expand(2, -1), torch.ones(2, 40)
    whole = merge.neighbours(metric, asked, times, 7)
    monkeypatch.setattr(merge, "ROWS", 3)
    assert torch.equal(merge.neighbours(metric, asked, times, 7), whole)


@quick
@given(score_batches(), st.sampled_from([0.0, 0.25, 0.4, 0.75, 1.0]))
def test_quantile_and_outliers(batch: tuple[Tensor, Tensor], q: float) -> None:
    values, valid = batch
    found = select.quantile(values, valid, q)[:, 0].tolist()
    for row, real, at, mask in zip(values.tolist(), valid.tolist(), found, select.outliers(values, valid), strict=True):
        kept = [value for value, ok in zip(row, real, strict=True) if ok]
        assert not kept or abs(at - reference_ops.quantile(kept, q)) < 1e-6
        numbers = [i for i, ok in enumerate(real) if ok]
        assert mask.nonzero().flatten().tolist() == ([numbers[i] for i in reference_ops.outliers(kept)] if kept else [])


def test_quantile_is_that_of_torch() -> None:
    values = normal(5, 3, 577)
    for q in (0.25, 0.5, 0.75):
        expected = values.quantile(q, 1, keepdim=True)
        torch.testing.assert_close(select.quantile(values, torch.ones_like(values, dtype=torch.bool), q), expected)


@quick
@given(seeds, st.sampled_from([(1, 1), (4, 4), (4, 2)]), st.integers(1, 7))
def test_one_head(seed: int, heads: tuple[int, int], tokens: int) -> None:
    """Rows of all heads one behind the other, scaled by the root of that width."""
    query, key = normal(seed, 2, heads[0], tokens, 4), normal(seed + 1, 2, heads[1], tokens, 4)
    joined_query, joined_key, scaling = score.one_head(query, key, 4**-0.5)
    assert scaling == pytest.approx((4 * heads[0]) ** -0.5)
    for joined, single, share in ((joined_query, query, 1), (joined_key, key, heads[0] // heads[1])):
        assert joined.shape == (2, 1, tokens, 4 * heads[0])
        expected = torch.cat([single[:, head // share] for head in range(heads[0])], -1)
        assert torch.equal(joined[:, 0], expected)


# ---- V2V: the rules of the papers on ragged spans


@st.composite
def spans(draw: Any) -> list[tuple[int, int, int]]:
    """(tokens, dominant, contextual) of up to three images; all-dominant, no contextual and tiny images included."""
    images = []
    for _ in range(draw(st.integers(1, 3))):
        tokens = draw(st.integers(1, 14))
        dominant = draw(st.integers(0, tokens))
        contextual = (
            st.integers(0 if dominant else 1, max(1, min(4, tokens - dominant))) if dominant < tokens else st.just(0)
        )
        images.append((tokens, dominant, draw(contextual)))
    return images


def view_of(images: list[tuple[int, int, int]], seed: int, ties: bool) -> EncoderView:
    width = max(n for n, _, _ in images)
    importance = normal(seed, len(images), width)
    if ties:
        importance = importance.round()
    counts = torch.tensor([[d, c] for _, d, c in images])
    plans = tuple(SpanPlan(n, d, c, (d + c,) * 4) for n, d, c in images)
    valid = torch.arange(width) < torch.tensor([n for n, _, _ in images])[:, None]
    return EncoderView(valid, counts[:, 0], counts[:, 1], plans, importance, normal(seed + 1, len(images), width, 3))


def clusters_of(selection: Selection, sample: int, dominant: int) -> tuple[list[int], dict[int, list[int]]]:
    index = [int(i) for i, ok in zip(selection.index[sample], selection.valid[sample], strict=True) if ok]
    place = [row for row, ok in enumerate(selection.valid[sample].tolist()) if ok]
    clusters: dict[int, list[int]] = {anchor: [] for anchor in index[dominant:]}
    for member, into in zip(
        selection.source_tokens[sample].tolist(), selection.target_row[sample].tolist(), strict=True
    ):
        if into >= 0:
            clusters[index[place.index(into)]].append(member)
    return index[:dominant], clusters


@pytest.mark.parametrize("rule", ["spread", "floor"])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(spans(), seeds, st.booleans(), st.integers(1, 5))
def test_duet_v2v(rule: str, images: list[tuple[int, int, int]], seed: int, ties: bool, cluster_width: int) -> None:
    view = view_of(images, seed, ties)
    check_v2v(
        Duet(cluster_width=cluster_width, anchor_step=rule),
        view,
        images,
        lambda *a: reference_ops.duet_entry(*a, cluster_width, rule),
    )


@pytest.mark.parametrize("rule", ["spread", "floor"])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(spans(), seeds, st.booleans())
def test_visionzip_v2v(rule: str, images: list[tuple[int, int, int]], seed: int, ties: bool) -> None:
    check_v2v(
        VisionZip(anchor_step=rule),
        view_of(images, seed, ties),
        images,
        lambda *a: reference_ops.visionzip_entry(*a, rule),
    )


def check_v2v(method: EncoderReducer, view: EncoderView, images: list[tuple[int, int, int]], twin: Any) -> None:
    selection = method.select_tokens(view)
    assert view.importance is not None and view.keys is not None
    for sample, (tokens, dominant, contextual) in enumerate(images):
        kept, clusters = twin(
            view.importance[sample, :tokens].tolist(), view.keys[sample, :tokens].tolist(), dominant, contextual
        )
        found_kept, found = clusters_of(selection, sample, dominant)
        assert found_kept == kept
        assert list(found) == list(clusters)
        assert {anchor: sorted(members) for anchor, members in found.items()} == {
            anchor: sorted(m) for anchor, m in clusters.items()
        }


# ---- T2V


@pytest.mark.parametrize("method", [Duet(schedule=()), FastV(), PyramidDrop()], ids=lambda m: m.name)
@quick
@given(score_batches(), st.data())
def test_t2v_keeps_the_best(method: DecoderReducer, batch: tuple[Tensor, Tensor], data: Any) -> None:
    scores, valid = batch
    count = [data.draw(st.integers(0, sum(v))) for v in valid.tolist()]
    stays = method.prune_tokens(DecoderView(valid, torch.tensor(count), scores=scores))
    for s, v, c, mask in zip(scores.tolist(), valid.tolist(), count, stays, strict=True):
        assert mask.nonzero().flatten().tolist() == sorted(reference_ops.best(s, v, c))


@quick
@given(score_batches(), st.data())
def test_uniform_t2v(batch: tuple[Tensor, Tensor], data: Any) -> None:
    _, valid = batch
    count = [data.draw(st.integers(0, sum(v))) for v in valid.tolist()]
    stays = UniformTokens().prune_tokens(DecoderView(valid, torch.tensor(count)))
    assert [m.nonzero().flatten().tolist() for m in stays] == [
        reference_ops.spaced(v, c) for v, c in zip(valid.tolist(), count, strict=True)
    ]


@quick
@given(st.integers(0, 5), st.lists(st.integers(1, 12), min_size=1, max_size=3), st.data())
def test_random_t2v(seed: int, sizes: list[int], data: Any) -> None:
    """Exactly ``keep`` stay; later stages keep a subset; the choice within an image depends on nothing but seed, its
    number and its size."""
    total = sum(sizes)
    view = DecoderView(
        torch.ones(1, total, dtype=torch.bool), torch.tensor([0]), tuple(enumerate(sizes)),
        torch.tensor([[i for i, n in enumerate(sizes) for _ in range(n)]]), torch.tensor([[t for n in sizes for t in range(n)]]),
    )  # fmt: skip
    method = RandomTokens(seed=seed, entry=1)
    counts = sorted(data.draw(st.lists(st.integers(0, total), min_size=2, max_size=2)))
    few, many = (
        method.prune_tokens(DecoderView(view.valid, torch.tensor([c]), view.spans, view.span_index, view.token_index))[
            0
        ]
        for c in counts
    )
    assert [int(few.sum()), int(many.sum())] == counts
    assert not bool((few & ~many).any())
    span = torch.cat([view.span_index, view.span_index + len(sizes)])
    twice = DecoderView(
        view.valid.repeat(2, 1), torch.tensor([counts[1]] * 2), view.spans * 2, span, view.token_index.repeat(2, 1)
    )
    assert torch.equal(method.prune_tokens(twice), many.expand(2, -1))


def test_random_is_uniform_and_depends_on_the_seed() -> None:
    """Over many seeds each of ten tokens is kept about as often as any other (mean 300 of 1000, five sigma are 73)."""
    spans_, span, token = ((0, 10),), torch.zeros(1, 10).long(), torch.arange(10)[None]
    view = DecoderView(torch.ones(1, 10, dtype=torch.bool), torch.tensor([3]), spans_, span, token)
    often = sum(RandomTokens(seed=seed, entry=1).prune_tokens(view)[0].long() for seed in range(1000))
    assert isinstance(often, Tensor) and int(often.min()) > 227 and int(often.max()) < 373


# ---- by span


@st.composite
def samples(draw: Any) -> tuple[list[list[int]], int]:
    """Rows of the spans of up to three samples, samples without a span and spans without a row too, and columns for all
    of them."""
    alive = draw(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=3))
    return alive, max(map(sum, alive)) + draw(st.integers(0, 2))


def by_span(rows: list[list[Any]], alive: list[list[int]]) -> list[list[Any]]:
    """The rows of every span, cut out of the samples one after the other."""
    return [
        row[sum(sizes[:i]) : sum(sizes[: i + 1])]
        for row, sizes in zip(rows, alive, strict=True)
        for i in range(len(sizes))
    ]


@quick
@given(samples(), st.data())
def test_rows_by_span_and_back(batch: tuple[list[list[int]], int], data: Any) -> None:
    alive, width = batch
    rows = torch.arange(len(alive) * width).view(len(alive), width)
    spans = SpanRows.of(alive, width, rows.device)
    taken, valid = spans.take(rows).tolist(), spans.valid.tolist()
    expected = by_span(rows.tolist(), alive)
    assert [
        [x for x, real in zip(row, ok, strict=True) if real] for row, ok in zip(taken, valid, strict=True)
    ] == expected
    assert all(ok == sorted(ok, reverse=True) for ok in valid) and spans.valid.shape[1] == max(
        map(len, expected), default=0
    )
    assert torch.equal(spans.take(rows[..., None]), spans.take(rows)[..., None])
    mask = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=rows.numel(), max_size=rows.numel())), dtype=torch.bool
    ).view(rows.shape)
    real = torch.arange(width) < torch.tensor([sum(sizes) for sizes in alive])[:, None]
    assert torch.equal(spans.put(spans.take(mask)), mask & real)
    assert torch.equal(spans.put(torch.ones_like(spans.valid)), real)


@pytest.mark.parametrize(
    "method", [Duet(), FastV(), PyramidDrop(), UniformTokens(), RandomTokens(entry=1)], ids=lambda m: m.name
)
@quick
@given(samples(), seeds, st.data())
def test_ranked_by_span_every_span_chooses_as_if_it_were_alone(
    method: DecoderReducer, batch: tuple[list[list[int]], int], seed: int, data: Any
) -> None:
    alive, width = batch
    scores = normal(seed, len(alive), width).round(decimals=1)
    spans = SpanRows.of(alive, width, scores.device)
    keep = [data.draw(st.integers(0, rows)) for sample in alive for rows in sample]
    numbers = tuple((number, 9) for sample in alive for number in range(len(sample)))

    def chosen(valid: Tensor, keep: list[int], scores: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor:
        span, token = (torch.arange(n) for n in valid.shape)
        return method.prune_tokens(
            DecoderView(
                valid, torch.tensor(keep), spans, span[:, None].expand(valid.shape), token.expand(valid.shape), scores
            )
        )

    found = by_span(spans.put(chosen(spans.valid, keep, spans.take(scores), numbers)).tolist(), alive) if keep else []
    for stays, kept, own, number in zip(found, keep, by_span(scores.tolist(), alive), numbers, strict=True):
        assert sum(stays) == kept
        if own:
            assert (
                stays
                == chosen(torch.ones(1, len(own), dtype=torch.bool), [kept], torch.tensor([own]), (number,))[0].tolist()
            )
        if Input.SCORES in method.requires:
            assert {i for i, stay in enumerate(stays) if stay} == set(reference_ops.best(own, [True] * len(own), kept))


# ---- who asks


@st.composite
def prompts(draw: Any) -> tuple[list[bool], list[bool], list[int], list[bool]]:
    """(visual, valid, labels, salient) of one prompt of 12 rows, padded on either side."""
    length = draw(st.integers(1, 12))
    kinds = draw(st.lists(st.sampled_from(["text", "text", "image", "answer"]), min_size=length, max_size=length))
    real = [True] * length
    pad = 12 - length
    left = draw(st.booleans())
    fill = lambda row, value: [value] * pad + row if left else row + [value] * pad  # noqa: E731
    return (
        fill([k == "image" for k in kinds], False), fill(real, False), fill([7 if k == "answer" else -100 for k in kinds], -100),
        fill(draw(st.lists(st.booleans(), min_size=length, max_size=length)), False),
    )  # fmt: skip


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(prompts(), min_size=1, max_size=3),
    st.sampled_from(["all", "last", "salient"]),
    st.booleans(),
    st.sampled_from(["first", "all"]),
)
def test_query_rows(batch: list[Any], kind: str, labelled: bool, turns: str) -> None:
    visual, valid, labels, salient = (torch.tensor([row[i] for row in batch]) for i in range(4))
    rows = query_rows(kind, visual, valid, labels if labelled else None, lambda rows: salient, turns)
    for (v, ok, y, s), found in zip(batch, rows, strict=True):
        assert found.nonzero().flatten().tolist() == reference_ops.query_rows(
            kind, v, ok, y if labelled else None, s, turns
        )


# ---- tiles


def test_tiles_are_read_line_by_line_over_the_mosaic() -> None:
    """Three columns and two lines of tiles with 2 x 2 patches, every second patch kept."""
    patches = torch.tensor([[0, 3], [1, 2], [0, 1], [2, 3], [0, 2], [1, 3]])
    side, columns, contextual = 2, 3, 1
    places = []
    for tile, row in enumerate(patches.tolist()):
        for number, patch in enumerate(row):
            line, column = tile // columns * side + patch // side, tile % columns * side + patch % side
            places.append((line, column, tile * 4 + 1 + number))
    expected = (
        [row for _, _, row in sorted(places)] + [tile * 4 for tile in range(6)] + [tile * 4 + 3 for tile in range(6)]
    )
    assert mosaic_order(patches, contextual, columns, side).tolist() == expected
