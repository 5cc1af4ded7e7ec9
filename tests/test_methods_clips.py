"""The methods for clips under exact budgets: padded batches, counts, weights, what stands still, and what they refuse.

Their rules are held to recorded vectors in ``test_golden.py``, their steps to loops in ``test_ops_clips.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import twins
from families import CLIP_AND_IMAGE, CLIPS, FAMILIES, ONE, clips_for, forward, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from test_methods_frames import MOVING, Clip
from torch import Tensor

import duet_vlm
from duet_vlm import DecoderView, EncoderView
from duet_vlm.methods.video_base import VideoReducer, VideoRows
from duet_vlm.ops.merge import merged_rows
from duet_vlm.ops.select import top
from duet_vlm.ops.video import VideoTokens, split_windows
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.encoder_view import QuestionView

METHODS: dict[str, dict[str, Any]] = {
    "dycoke": {},
    "fastvid": {"every": 2, "segments": 2},
    "holitom": {"threshold": 0.2, "neighbours": 2},
    "metok": {"deviations": 0.5, "threshold": 0.6},
    "prunevid": {"threshold": 0.2, "windows": 0.5},
    "vidcom2": {"temperature": 0.1},
}
MERGING = ("fastvid", "holitom", "metok", "prunevid")
STAGED = ("holitom", "metok", "prunevid")  # which go on inside the decoder
EACH = pytest.mark.parametrize("method", METHODS)


def made(method: str, **changes: Any) -> VideoReducer:
    return duet_vlm.get_method(method)(**{"keep": 0.5} | METHODS[method] | changes)


def view_of(
    reducer: VideoReducer, clips: list[Clip], counts: list[int], seed: int = 0, stream: str = "video", still: float = 0.5, most: bool = True
) -> EncoderView:
    """Clips whose frames share a part ``still`` of what they are, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    width = max(steps * size for steps, size in clips)
    features, parts = torch.zeros(len(clips), width, 6), torch.full((len(clips), width), -1)
    for row, (steps, size) in enumerate(clips):
        base = torch.randn(1, size, 6, generator=generator)
        rows = still * base + (1 - still) * torch.randn(steps, size, 6, generator=generator)
        features[row, : steps * size] = rows.flatten(0, 1)
        parts[row, : steps * size] = torch.arange(steps).repeat_interleave(size)
    plans = tuple(replace(reducer, keep=count).plan(steps * size, 4, None) for (steps, size), count in zip(clips, counts, strict=True))
    dominant, contextual = (torch.tensor([getattr(plan, name) for plan in plans]) for name in ("dominant", "contextual"))
    return EncoderView(
        parts >= 0, dominant, contextual, plans, torch.rand(len(clips), width, generator=generator), None, features, parts, stream,
        question=asked(len(clips), generator), max_parts=(max(t for t, _ in clips), max(n for _, n in clips)) if most else None,
    )  # fmt: skip


def asked(spans: int, generator: torch.Generator) -> QuestionView:
    """Questions of one to four words."""
    return QuestionView(torch.randn(spans, 4, 6, generator=generator), torch.arange(4) < torch.randint(1, 5, (spans, 1), generator=generator))


def alone(view: EncoderView, row: int, tokens: int) -> EncoderView:
    def one(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[row : row + 1, :tokens]

    count = slice(row, row + 1)
    return EncoderView(
        view.valid[count, :tokens], view.dominant[count], view.contextual[count], view.plans[count], one(view.importance), None, one(view.features),
        one(view.parts), view.modality, question=QuestionView(view.question.embeddings[count], view.question.valid[count]),
    )  # fmt: skip


def told(selection: Selection, row: int) -> list[tuple[int, list[tuple[int, float]]]]:
    """Per row the token it stands at, and what it is made of with which weight."""
    assert selection.weights is not None
    found = []
    for number, (token, real) in enumerate(zip(selection.index[row].tolist(), selection.valid[row].tolist(), strict=True)):
        if real:
            here = (selection.target_row[row] == number).nonzero()[:, 0]
            found.append((token, [(int(selection.source_tokens[row, i]), round(float(selection.weights[row, i]), 5)) for i in here]))
    return found


@EACH
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.lists(st.tuples(st.integers(1, 6), st.integers(1, 8)), min_size=1, max_size=3), st.integers(0, 10**6), st.floats(0.2, 0.9))
def test_counts_are_exact_and_clips_of_a_batch_are_independent(method: str, data: st.DataObject, clips: list[Clip], seed: int, still: float) -> None:
    reducer = made(method, keep=None)
    counts = [data.draw(st.integers(1, steps * size)) for steps, size in clips]
    view = view_of(reducer, clips, counts, seed, still=still)
    together = reducer.select_tokens(view)
    for row, ((steps, size), count) in enumerate(zip(clips, counts, strict=True)):
        rows = told(together, row)
        assert [token for token, _ in rows] == sorted({token for token, _ in rows}) and len(rows) == count
        assert rows == told(reducer.select_tokens(alone(view, row, steps * size)), 0)
        if method in MERGING:
            members = [token for _, made_of in rows for token, _ in made_of]
            assert len(members) == len(set(members))  # in one row at most
            assert all(sum(w for _, w in made_of) == pytest.approx(1, abs=1e-4) for _, made_of in rows if made_of)
        if count == steps * size:
            assert torch.equal(merged_rows(view.features, together)[row, :count], view.features[row, :count])


@pytest.mark.parametrize("method", ["fastvid", "prunevid"])
def test_nothing_leaves_without_being_merged(method: str) -> None:
    reducer = made(method, keep=None)
    view = view_of(reducer, [(6, 8), (4, 4)], [24, 9], still=0.8)  # every segment has a row
    selection = reducer.select_tokens(view)
    for row, tokens in ((0, 48), (1, 16)):
        rows = told(selection, row)
        assert {token for _, members in rows for token, _ in members} | {token for token, _ in rows} == set(range(tokens))


@pytest.mark.parametrize("method", ["holitom", "prunevid"])
def test_what_stands_still_is_averaged_over_time(method: str) -> None:
    """Three frames, place 0 the same in all, the others unlike: its row is the mean of the three, with a third of the weight each."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(1, 3, 4, 6, generator=generator)
    features[:, :, 0] = features[:, :1, 0] + 0.01 * torch.randn(1, 3, 6, generator=generator)
    reducer = made(method, keep=None, **({"windows": 0.3} if method == "prunevid" else {}), threshold=0.9)
    view = view_of(reducer, [(3, 4)], [10])
    view = EncoderView(view.valid, view.dominant, view.contextual, view.plans, view.importance, None, features.flatten(1, 2), view.parts, "video")
    assert told(reducer.select_tokens(view), 0)[0] == (0, [(0, 0.33333), (4, 0.33333), (8, 0.33333)])


@pytest.mark.parametrize("method", ["holitom", "prunevid"])
def test_no_more_is_averaged_than_the_budget_asks_for(method: str) -> None:
    """Ten frames that are all the same are 8 rows after averaging; 40 are asked for, and 40 enter."""
    reducer = made(method, keep=None)
    rows = torch.randn(1, 1, 8, 6, generator=torch.Generator().manual_seed(0)).expand(-1, 10, -1, -1).flatten(1, 2)
    view = view_of(reducer, [(10, 8)], [40])
    view = EncoderView(view.valid, view.dominant, view.contextual, view.plans, view.importance, None, rows, view.parts, "video")
    assert int(reducer.select_tokens(view).valid.sum()) == 40


def test_vidcom2_against_loops() -> None:
    reducer = made("vidcom2", keep=None)
    view = view_of(reducer, [(4, 5)], [9], still=0.6)
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
    top = twins.softmax([u / 0.1 for u in unlike])
    scale = [1 + p - 0.25 for p in top]
    exact = [9 * s / sum(scale) for s in scale]
    counts = [math.floor(x) for x in exact]
    for t in sorted(range(4), key=lambda t: -(exact[t] - counts[t]))[: 9 - sum(counts)]:
        counts[t] += 1
    kept = []
    for t, frame in enumerate(frames):
        score = [to_clip[t][p] + alike(frame[p], frame) for p in range(5)]
        kept += sorted(t * 5 + p for p in sorted(range(5), key=lambda p: score[p])[: counts[t]])
    assert [token for token, _ in told(reducer.select_tokens(view), 0)] == kept


def slow_metok(rows: list[list[list[float]]], words: list[list[float]], count: int, method: Any) -> tuple[list[Any], dict[int, float]]:
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
        [p for p in range(places) if t == 0 or event[t] != event[t - 1] or twins.cosine(rows[t][p], rows[t - 1][p]) <= method.threshold]
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
    total = twins.softmax([s / method.temperature for s in score])
    return sorted(out), {t * places + p: len(starts) * total[event[t]] for t in range(steps) for p in range(places)}


@pytest.mark.parametrize(("seed", "count", "still"), [(0, 9, 0.6), (1, 20, 0.7), (2, 38, 0.8), (3, 3, 0.5), (4, 30, 0.9)])
def test_metok_against_loops(seed: int, count: int, still: float) -> None:
    reducer = made("metok", keep=None)
    view = view_of(reducer, [(8, 5), (3, 4)], [count, 2], seed, still=still)
    selection = reducer.select_tokens(view)
    words = view.question.embeddings[0][view.question.valid[0]].double().tolist()
    expected, notes = slow_metok(view.features[0].double().view(8, 5, 6).tolist(), words, count, reducer)
    assert told(selection, 0) == expected and len(expected) == count
    for token, note, real in zip(selection.index[0].tolist(), selection.tags[0].tolist(), selection.valid[0].tolist(), strict=True):
        assert not real or note == pytest.approx(notes[token], rel=1e-4)


def test_metok_weighs_attention_by_events() -> None:
    view = DecoderView(
        torch.ones(1, 5, dtype=torch.bool), torch.tensor([2]), host_counts=((5, 2),), scores=torch.tensor([[0.5, 0.3, 0.1, 0.28, 0.2]]),
        tags=torch.tensor([[0.2, 1.0, 2.0, 0.0, 2.0]]),
    )  # fmt: skip
    assert made("metok").prune_tokens(view)[0].tolist() == [False, True, False, False, True]  # what has no note counts as it is


def test_dycoke_against_loops() -> None:
    reducer = made("dycoke", keep=None)
    view = view_of(reducer, [(6, 5)], [18], still=0.6)  # frames 0 and 4 whole; 8 among 1, 2, 3, 5
    assert view.features is not None
    rows = view.features[0].double().tolist()
    kept = [*range(5), *range(20, 25)]
    for frame, other in ((1, 0), (2, 0), (3, 2), (5, 4)):
        places = sorted(range(5), key=lambda p: twins.cosine(rows[frame * 5 + p], rows[other * 5 + p]))[:2]
        kept += [frame * 5 + p for p in places]
    assert [token for token, _ in told(reducer.select_tokens(view), 0)] == sorted(kept)
    few = view_of(reducer, [(6, 5)], [4])
    assert [token for token, _ in told(reducer.select_tokens(few), 0)] == [2, 4, 22, 24]  # spread over the frames that stay whole


def test_evs_counts_as_released() -> None:
    assert duet_vlm.get_method("evs").official(0.9).plan(400, 2, None).entry == 39  # type: ignore[attr-defined]
    assert duet_vlm.get_method("frames")(keep=0.1).plan(400, 2, None).entry == 40
    with pytest.raises(ValueError, match=r"pruned=1.0: the share of tokens that leave"):
        duet_vlm.get_method("evs").official(1.0)  # type: ignore[attr-defined]


@EACH
def test_nothing_is_read_back(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reducer = made(method, keep=None)
    view = view_of(reducer, [(3, 4), (2, 5)], [7, 3])

    def refuse(*args: Any) -> Any:
        raise AssertionError("reads the device")

    for name in ("item", "tolist", "__bool__", "__int__", "nonzero"):
        monkeypatch.setattr(Tensor, name, refuse)
    reducer.select_tokens(view)


@EACH
def test_images_are_clips_of_one_frame(method: str) -> None:
    reducer = made(method, keep=None)
    crops, picture = (view_of(reducer, [clip], [5], stream="image") for clip in ((3, 4), (1, 12)))
    shown = {"importance": crops.importance, "features": crops.features, "question": crops.question}
    picture = EncoderView(picture.valid, picture.dominant, picture.contextual, picture.plans, parts=picture.parts, **shown)
    assert told(reducer.select_tokens(crops), 0) == told(reducer.select_tokens(picture), 0) and len(told(reducer.select_tokens(crops), 0)) == 5


@EACH
@pytest.mark.parametrize("family", MOVING)
def test_reports_and_padded_batches(family: str, method: str) -> None:
    """Clips of different lengths, images among them, in one padded batch: measured tokens and FLOPs are those predicted."""
    family_made, model = FAMILIES[family], shared(family)
    for batch in ([CLIP_AND_IMAGE], clips_for(family, CLIPS)):
        with duet_vlm.attach(model, method, budget=0.4, **METHODS[method]) as handle:
            forward(model, family_made.inputs(batch))
            report = handle.report()
            for row in handle.trace:
                for span in row:
                    plan = duet_vlm.get_method(method)(**METHODS[method]).plan(span.span.tokens, 8, 0.4)
                    assert len(span.stages[0].kept) == plan.entry and plan.mean <= 0.4 * span.span.tokens + 1e-9
                    assert method in STAGED or plan.entry == math.floor(0.4 * span.span.tokens + 1e-9)
        assert report.predicted == report.observed


@pytest.mark.parametrize("method", ["dycoke", "holitom", "prunevid"])
def test_places_are_not_known_behind_frames(method: str) -> None:
    with pytest.raises(ValueError, match=rf"compose\(frames, {method}\): {method} compares the same places of frames"):
        duet_vlm.get_method(f"frames+{method}")


# ---- inside the decoder


def shown(there: list[int], stay: list[int], seed: int, spans: int = 2) -> DecoderView:
    """Samples of tokens in up to ``spans`` clips each, whose sets are noted in no order."""
    draw = torch.Generator().manual_seed(seed)
    shape = len(there), max(there)
    valid = torch.arange(shape[1]) < torch.tensor(there)[:, None]
    notes = torch.randint(0, 5, shape, generator=draw).float() * 3
    span = torch.randint(0, spans, shape, generator=draw).sort(1).values
    scores, rows = torch.rand(shape, generator=draw), torch.randn(*shape, 6, generator=draw)
    return DecoderView(valid, torch.tensor(stay), host_counts=tuple(zip(there, stay, strict=True)), scores=scores, hidden_states=rows, tags=notes, span_index=span)


many_counts = st.lists(st.integers(1, 14).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(many_counts, st.integers(0, 10**6))
def test_prunevid_keeps_the_same_share_of_every_set(counts: list[tuple[int, int]], seed: int) -> None:
    view = shown([n for n, _ in counts], [k for _, k in counts], seed)
    mask = made("prunevid").prune_tokens(view)
    for b, (n, k) in enumerate(counts):
        sets: dict[tuple[int, float], list[int]] = {}
        for token in range(n):
            sets.setdefault((int(view.span_index[b, token]), float(view.tags[b, token])), []).append(token)
        names = sorted(sets)
        quota = [k * len(sets[name]) // n for name in names]
        for number in sorted(range(len(names)), key=lambda i: -(k * len(sets[names[i]]) % n))[: k - sum(quota)]:
            quota[number] += 1
        expected = [t for name, q in zip(names, quota, strict=True) for t in sorted(sets[name], key=lambda t: -float(view.scores[b, t]))[:q]]
        assert mask[b].nonzero()[:, 0].tolist() == sorted(expected) and len(expected) == k


@settings(max_examples=60, deadline=None, derandomize=True)
@given(many_counts, st.integers(0, 10**6), st.sampled_from(["mean", "halving"]))
def test_holitom_joins_what_leaves_to_what_stays(counts: list[tuple[int, int]], seed: int, joining: str) -> None:
    view = shown([n for n, _ in counts], [k for _, k in counts], seed)
    ours = merged_rows(view.hidden_states, made("holitom", joining=joining).prune_tokens(view))
    for b, (n, k) in enumerate(counts):
        rows = view.hidden_states[b].double().tolist()
        kept = sorted(sorted(range(n), key=lambda t: -float(view.scores[b, t]))[:k])
        members: dict[int, list[int]] = {t: [t] for t in kept}
        for token in sorted(set(range(n)) - set(kept)):
            members[max(kept, key=lambda t: twins.cosine(rows[token], rows[t]))].append(token)
        for place, (first, *rest) in enumerate(members[t] for t in kept):
            row = rows[first]
            for token in rest:  # one after the other
                row = [(a + c) / 2 for a, c in zip(row, rows[token], strict=True)]
            if joining == "mean":
                row = [sum(c) / (1 + len(rest)) for c in zip(*(rows[t] for t in (first, *rest)), strict=True)]
            assert ours[b, place].tolist() == pytest.approx(row, abs=1e-5)


@pytest.mark.parametrize("method", STAGED)
def test_a_budget_lets_more_in_and_drops_where_the_paper_does(method: str) -> None:
    if method == "metok":
        counts = duet_vlm.get_method(method)().plan(3136, 32, 0.2).counts
        assert [counts[layer] for layer in (7, 8, 16, 24)] == [math.floor(counts[0] * share + 1e-9) for share in (1, 0.5, 0.25, 0.125)]
        assert 626.2 < sum(counts) / 32 <= 627.2
        return
    layer, share = {"holitom": (18, 0.5), "prunevid": (9, 0.4)}[method]  # 11 of 32 is 9 of 28
    counts = duet_vlm.get_method(method)().plan(3136, 28, 0.1).counts
    assert set(counts[:layer]) == {counts[0]} and set(counts[layer:]) == {math.floor(share * counts[0] + 1e-9)}
    assert 312.6 < sum(counts) / 28 <= 313.6
    assert duet_vlm.get_method(method)(schedule=((3, 0.2),)).plan(1000, 8, 0.25).counts[2:4] == (500, 100)
    assert duet_vlm.get_method(method)(keep=0.5).plan(1000, 8, None).counts == (500,) * 8  # its own settings: nothing inside unless asked for
    with pytest.raises(ValueError, match=rf"{method}: schedule drops before layer 0, but what it decides by is made by earlier layers"):
        duet_vlm.get_method(method)(schedule=((0, 0.5),))
    with pytest.raises(ValueError, match=rf"{method}: with a budget give fractions in schedule="):
        duet_vlm.get_method(method)(schedule=((4, 7),)).plan(100, 8, 0.5)


@dataclass(frozen=True)
class Noting(VideoReducer, duet_vlm.DecoderReducer):
    """Keeps every other token and notes 100 times the step of time, plus the place; sees its notes again."""

    name, paper, summary = "noting", "-", "-"
    needs = frozenset({"notes"})
    uses_tokens = True

    def plan(self, tokens: int, depth: int, budget: Any) -> duet_vlm.SpanPlan:
        half = (tokens + 1) // 2
        return duet_vlm.SpanPlan(tokens, half, 0, (half,) * 3 + (half // 2,) * (depth - 3))

    def reduced(self, view: EncoderView, clips: VideoTokens, count: Tensor) -> VideoRows:
        kept = top(-torch.arange(view.valid.shape[1]).expand(view.valid.shape) % 2 * 1.0, view.valid, count)
        order = -clips.rows(torch.arange(clips.index.shape[1] * clips.index.shape[2]).view(clips.index.shape[1:]).expand(clips.index.shape))
        alone = VideoRows.alone(kept)
        return alone._replace(notes=100 * clips.step + clips.place + 1, order=order if self.positions == "compact" else None)

    def prune_tokens(self, view: DecoderView) -> Tensor:
        SEEN.append(view)
        return top(view.tags, view.valid, view.num_keep)


SEEN: list[DecoderView] = []


@pytest.mark.parametrize("share", ["joint", "per_image"])
@pytest.mark.parametrize("family", MOVING)
def test_notes_come_back_inside_the_decoder(family: str, share: str) -> None:
    """Whatever is in a batch: clips of several lengths, images (clips of one step), padding, spans ranked together or by themselves."""
    with duet_vlm.attach(shared(family), Noting(multi_image=share)) as handle:
        for side in ("left", "right"):
            SEEN.clear()
            forward(shared(family), FAMILIES[family].inputs(clips_for(family, CLIPS), side))
            (view,) = SEEN
            trace = [span for row in handle.trace for span in row]
            assert view.span_index is not None and view.token_index is not None and view.tags is not None
            for b, t in view.valid.nonzero().tolist():
                span, token = trace[int(view.span_index[b, t])], int(view.token_index[b, t])
                clip = span.span.tokens
                assert 0 <= token < clip and token in span.stages[0].kept
                step, place = divmod(int(view.tags[b, t]) - 1, 100)
                if FAMILIES[family].mixes or span.span.grid is None:  # newline rows stand between the steps of some
                    assert step * ((clip - 1 - place) // step if step else clip) + place <= clip
                assert int(view.tags[b, t]) > 0
            for number, span in enumerate(trace):  # in the order of the clip, as steps and places are
                here = [float(view.tags[b, t]) for b, t in view.valid.nonzero().tolist() if int(view.span_index[b, t]) == number]
                assert here == sorted(here) and len(set(here)) == len(here) == len(span.stages[0].kept)


def test_notes_follow_rows_that_are_renumbered() -> None:
    """A clip of the embedded family has 1-D positions: its rows stand in the method's order, and the notes with them."""
    with duet_vlm.attach(shared("llava"), Noting(positions="compact")) as handle:
        SEEN.clear()
        forward(shared("llava"), FAMILIES["llava"].inputs([ONE]))
        (view,) = SEEN
        assert handle.trace[0][0].stages[0].kept
    here = view.tags[0][view.valid[0]].tolist()
    assert here == sorted(here, reverse=True) and len(here) > 3


def test_notes_must_fit() -> None:
    class Wrong(Noting):
        def select_tokens(self, view: EncoderView) -> Selection:
            return replace(super().select_tokens(view), tags=torch.zeros(3))

    with duet_vlm.attach(shared("llava"), Wrong()), pytest.raises(ValueError, match=r"select_tokens returned notes = a tensor \[3\] of torch.float32"):
        forward(shared("llava"), FAMILIES["llava"].inputs([ONE]))


@pytest.mark.parametrize(
    "method",
    [
        "frames+vidcom2", "evs+fastvid", "vidcom2+pyramiddrop", "holitom+duet", "dycoke+prunevid", "visionzip+holitom", "metok+duet", "evs+metok",
        "evs+fastvid+pyramiddrop",
    ],
)
def test_compositions_meet_one_budget(method: str) -> None:
    model, inputs = shared("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].inputs(CLIPS)
    with duet_vlm.attach(model, method, budget=0.4) as handle:
        forward(model, inputs)
        report = handle.report()
        sizes = [span.span.tokens for row in handle.trace for span in row]
    total = report.measured_mean * len(CLIPS)
    assert 0.4 * sum(sizes) - len(sizes) < total <= 0.4 * sum(sizes) + 1e-6


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("fastvid", {"pooled_context_tokens": 1.5}, r"context=1.5: a share, in \[0, 1\]"),
        ("fastvid", {"segments": 0}, "segments=0: a number of segments, at least 1"),
        ("fastvid", {"every": 0}, "every=0: a number of frames, at least 1"),
        ("fastvid", {"merge": "all"}, "merge='all': choose one of 'one', 'frames'"),
        ("holitom", {"threshold": 2.0}, "threshold=2.0: a cosine"),
        ("holitom", {"own": -1.0}, "own=-1.0: a share"),
        ("holitom", {"window": 0}, "window=0: a number of frames"),
        ("holitom", {"joining": "sum"}, "joining='sum': choose one of 'mean', 'halving'"),
        ("metok", {"deviations": -1.0}, "deviations=-1.0: a number of standard deviations"),
        ("metok", {"key": 0.0}, r"key=0.0: a share, in \(0, 1\]"),
        ("metok", {"pooled": 2.0}, "pooled=2.0: a share"),
        ("metok", {"threshold": -2.0}, "threshold=-2.0: a cosine"),
        ("metok", {"temperature": 0.0}, "temperature=0.0: of a softmax"),
        ("prunevid", {"windows": 0.0}, "windows=0.0: clusters as a fraction"),
        ("prunevid", {"neighbours": 0}, "neighbours=0: a number of frames"),
        ("prunevid", {"rows": "score"}, "rows='score': choose one of"),
        ("vidcom2", {"channels": 0.0}, "channels=0.0: the share of channels"),
        ("vidcom2", {"temperature": 0.0}, "temperature=0.0: of a softmax"),
        ("dycoke", {"crops": "per_crop"}, "dycoke compares the frames of a clip, and crops='per_crop' would separate them"),
        ("evs", {"crops": "per_crop"}, "evs compares the frames of a clip"),
        ("vidcom2", {"keep": -3}, "keep=-3: a token count"),
    ],
)
def test_settings_that_cannot_be(method: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        duet_vlm.get_method(method)(**changes)
