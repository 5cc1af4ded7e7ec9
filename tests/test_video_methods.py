"""The methods for clips under exact budgets: padded batches, counts, weights, what stands still, and what they refuse.

Their rules are held to recorded vectors in ``test_golden.py``, their steps to loops in ``test_ops_clips.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from families import CLIP_AND_IMAGE, CLIPS, FAMILIES, ONE, clips_for, forward, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from method_views import MOVING, VIDEO_METHODS, Clip, rows_of_selection, video_method, video_view
from torch import Tensor

import duet_vlm
from duet_vlm import DecoderView, EncoderView
from duet_vlm.methods.video.video_base import VideoReducer, VideoRows
from duet_vlm.ops.merge import merged_rows
from duet_vlm.ops.select import top
from duet_vlm.ops.video import VideoTokens
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.encoder_view import QuestionView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions

MERGING = ("fastvid", "holitom", "metok", "prunevid")
STAGED = ("holitom", "metok", "prunevid")  # which go on inside the decoder
EACH = pytest.mark.parametrize("method", VIDEO_METHODS)


def alone_in_batch(view: EncoderView, row: int, tokens: int) -> EncoderView:
    def one(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[row : row + 1, :tokens]

    count = slice(row, row + 1)
    return EncoderView(
        view.valid[count, :tokens], view.dominant[count], view.contextual[count], view.plans[count], one(view.importance), None, one(view.features),
        one(view.parts), view.modality, question=QuestionView(view.question.embeddings[count], view.question.valid[count]),
    )  # fmt: skip


@EACH
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.data(),
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 8)), min_size=1, max_size=3),
    st.integers(0, 10**6),
    st.floats(0.2, 0.9),
)
def test_counts_are_exact_and_clips_of_a_batch_are_independent(
    method: str, data: st.DataObject, clips: list[Clip], seed: int, still: float
) -> None:
    reducer = video_method(method, keep=None)
    counts = [data.draw(st.integers(1, steps * size)) for steps, size in clips]
    view = video_view(reducer, clips, counts, seed, still=still)
    together = reducer.select_tokens(view)
    for row, ((steps, size), count) in enumerate(zip(clips, counts, strict=True)):
        rows = rows_of_selection(together, row)
        assert [token for token, _ in rows] == sorted({token for token, _ in rows}) and len(rows) == count
        assert rows == rows_of_selection(reducer.select_tokens(alone_in_batch(view, row, steps * size)), 0)
        if method in MERGING:
            members = [token for _, made_of in rows for token, _ in made_of]
            assert len(members) == len(set(members))  # in one row at most
            # each is rounded
            assert all(
                sum(w for _, w in made_of) == pytest.approx(1, abs=1e-5 * len(made_of))
                for _, made_of in rows
                if made_of
            )
        if count == steps * size:
            assert torch.equal(merged_rows(view.features, together)[row, :count], view.features[row, :count])


@pytest.mark.parametrize("method", ["fastvid", "prunevid"])
def test_nothing_leaves_without_being_merged(method: str) -> None:
    reducer = video_method(method, keep=None)
    view = video_view(reducer, [(6, 8), (4, 4)], [24, 9], still=0.8)  # every segment has a row
    selection = reducer.select_tokens(view)
    for row, tokens in ((0, 48), (1, 16)):
        rows = rows_of_selection(selection, row)
        assert {token for _, members in rows for token, _ in members} | {token for token, _ in rows} == set(
            range(tokens)
        )


@pytest.mark.parametrize("method", ["holitom", "prunevid"])
def test_what_stands_still_is_averaged_over_time(method: str) -> None:
    """Three frames, place 0 the same in all, the others unlike: its row is the mean of the three, with a third of the
    weight each."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(1, 3, 4, 6, generator=generator)
    features[:, :, 0] = features[:, :1, 0] + 0.01 * torch.randn(1, 3, 6, generator=generator)
    reducer = video_method(method, keep=None, **({"windows": 0.3} if method == "prunevid" else {}), threshold=0.9)
    view = video_view(reducer, [(3, 4)], [10])
    view = EncoderView(
        view.valid,
        view.dominant,
        view.contextual,
        view.plans,
        view.importance,
        None,
        features.flatten(1, 2),
        view.parts,
        "video",
    )
    assert rows_of_selection(reducer.select_tokens(view), 0)[0] == (0, [(0, 0.33333), (4, 0.33333), (8, 0.33333)])


@pytest.mark.parametrize("method", ["holitom", "prunevid"])
def test_no_more_is_averaged_than_the_budget_asks_for(method: str) -> None:
    """Ten frames that are all the same are 8 rows after averaging; 40 are asked for, and 40 enter."""
    reducer = video_method(method, keep=None)
    rows = torch.randn(1, 1, 8, 6, generator=torch.Generator().manual_seed(0)).expand(-1, 10, -1, -1).flatten(1, 2)
    view = video_view(reducer, [(10, 8)], [40])
    view = EncoderView(
        view.valid, view.dominant, view.contextual, view.plans, view.importance, None, rows, view.parts, "video"
    )
    assert int(reducer.select_tokens(view).valid.sum()) == 40


@EACH
def test_nothing_is_read_back(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reducer = video_method(method, keep=None)
    view = video_view(reducer, [(3, 4), (2, 5)], [7, 3])

    def refuse(*args: Any) -> Any:
        raise AssertionError("reads the device")

    for name in ("item", "tolist", "__bool__", "__int__", "nonzero"):
        monkeypatch.setattr(Tensor, name, refuse)
    reducer.select_tokens(view)


@EACH
def test_images_are_clips_of_one_frame(method: str) -> None:
    reducer = video_method(method, keep=None)
    crops, picture = (video_view(reducer, [clip], [5], stream="image") for clip in ((3, 4), (1, 12)))
    shown = {"importance": crops.importance, "features": crops.features, "question": crops.question}
    picture = EncoderView(
        picture.valid, picture.dominant, picture.contextual, picture.plans, parts=picture.parts, **shown
    )
    assert (
        rows_of_selection(reducer.select_tokens(crops), 0) == rows_of_selection(reducer.select_tokens(picture), 0)
        and len(rows_of_selection(reducer.select_tokens(crops), 0)) == 5
    )


@EACH
@pytest.mark.parametrize("family", MOVING)
def test_reports_and_padded_batches(family: str, method: str) -> None:
    """Clips of different lengths, images among them, in one padded batch: measured tokens and FLOPs are those
    predicted."""
    family_made, model = FAMILIES[family], shared(family)
    for batch in ([CLIP_AND_IMAGE], clips_for(family, CLIPS)):
        with duet_vlm.attach(model, method, budget=0.4, **VIDEO_METHODS[method]) as handle:
            forward(model, family_made.inputs(batch))
            report = handle.report()
            for row in handle.trace:
                for span in row:
                    plan = duet_vlm.make_method(method, **VIDEO_METHODS[method]).plan(span.span.tokens, 8, 0.4)
                    assert len(span.stages[0].kept) == plan.entry and plan.mean <= 0.4 * span.span.tokens + 1e-9
                    assert method in STAGED or plan.entry == math.floor(0.4 * span.span.tokens + 1e-9)
        assert report.predicted == report.observed


@pytest.mark.parametrize("method", ["dycoke", "holitom", "prunevid"])
def test_places_are_not_known_behind_frames(method: str) -> None:
    with pytest.raises(ValueError, match=rf"compose\(frames, {method}\): {method} compares the same places of frames"):
        duet_vlm.make_method(f"frames+{method}")


# ---- inside the decoder


@pytest.mark.parametrize("method", STAGED)
def test_a_budget_lets_more_in_and_drops_where_the_paper_does(method: str) -> None:
    if method == "metok":
        counts = duet_vlm.make_method(method).plan(3136, 32, 0.2).counts
        assert [counts[layer] for layer in (7, 8, 16, 24)] == [
            math.floor(counts[0] * share + 1e-9) for share in (1, 0.5, 0.25, 0.125)
        ]
        assert 626.2 < sum(counts) / 32 <= 627.2
        return
    layer, share = {"holitom": (18, 0.5), "prunevid": (9, 0.4)}[method]  # 11 of 32 is 9 of 28
    counts = duet_vlm.make_method(method).plan(3136, 28, 0.1).counts
    assert set(counts[:layer]) == {counts[0]} and set(counts[layer:]) == {math.floor(share * counts[0] + 1e-9)}
    assert 312.6 < sum(counts) / 28 <= 313.6
    assert duet_vlm.make_method(method, schedule=((3, 0.2),)).plan(1000, 8, 0.25).counts[2:4] == (500, 100)
    # its own settings: nothing inside unless asked for
    assert duet_vlm.make_method(method, keep=0.5).plan(1000, 8, None).counts == (500,) * 8
    with pytest.raises(
        ValueError, match=rf"{method}: schedule drops before layer 0, but what it decides by is made by earlier layers"
    ):
        duet_vlm.make_method(method, schedule=((0, 0.5),))
    with pytest.raises(ValueError, match=rf"{method}: with a budget give fractions in schedule="):
        duet_vlm.make_method(method, schedule=((4, 7),)).plan(100, 8, 0.5)


@dataclass(frozen=True)
class Noting(VideoReducer, duet_vlm.DecoderReducer):
    """Keeps every other token and notes 100 times the step of time, plus the place; sees its notes again."""

    name, paper, summary = "noting", "-", "-"
    requires = frozenset({Input.PROJECTED_FEATURES, Input.SCORES, Input.TOKENS, Input.TAGS})

    def plan(self, tokens: int, depth: int, budget: Any) -> duet_vlm.SpanPlan:
        half = (tokens + 1) // 2
        return duet_vlm.SpanPlan(tokens, half, 0, (half,) * 3 + (half // 2,) * (depth - 3))

    def reduced(self, view: EncoderView, clips: VideoTokens, count: Tensor) -> VideoRows:
        kept = top(-torch.arange(view.valid.shape[1]).expand(view.valid.shape) % 2 * 1.0, view.valid, count)
        order = -clips.rows(
            torch.arange(clips.index.shape[1] * clips.index.shape[2])
            .view(clips.index.shape[1:])
            .expand(clips.index.shape)
        )
        alone = VideoRows.alone(kept)
        return alone._replace(
            notes=100 * clips.step + clips.place + 1, order=order if self.options.positions == "compact" else None
        )

    def prune_tokens(self, view: DecoderView) -> Tensor:
        SEEN.append(view)
        return top(view.tags, view.valid, view.num_keep)


SEEN: list[DecoderView] = []


@pytest.mark.parametrize("share", ["joint", "per_image"])
@pytest.mark.parametrize("family", MOVING)
def test_notes_come_back_inside_the_decoder(family: str, share: str) -> None:
    """Whatever is in a batch: clips of several lengths, images (clips of one step), padding, spans ranked together or
    by themselves."""
    with duet_vlm.attach(shared(family), Noting(options=TokenOptions(multi_image=share))) as handle:
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
                here = [
                    float(view.tags[b, t])
                    for b, t in view.valid.nonzero().tolist()
                    if int(view.span_index[b, t]) == number
                ]
                assert here == sorted(here) and len(set(here)) == len(here) == len(span.stages[0].kept)


def test_notes_follow_rows_that_are_renumbered() -> None:
    """A clip of the embedded family has 1-D positions: its rows stand in the method's order, and the notes with them."""
    with duet_vlm.attach(shared("llava"), Noting(options=TokenOptions(positions="compact"))) as handle:
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

    with (
        duet_vlm.attach(shared("llava"), Wrong()),
        pytest.raises(ValueError, match=r"select_tokens returned notes = a tensor \[3\] of torch.float32"),
    ):
        forward(shared("llava"), FAMILIES["llava"].inputs([ONE]))


@pytest.mark.parametrize(
    "method",
    [
        "frames+vidcom2",
        "evs+fastvid",
        "vidcom2+pyramiddrop",
        "holitom+duet",
        "dycoke+prunevid",
        "visionzip+holitom",
        "metok+duet",
        "evs+metok",
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
        ("fastvid", {"context": 1.5}, r"context=1.5: a share, in \[0, 1\]"),
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
        (
            "dycoke",
            {"options": {"crops": "per_crop"}},
            "dycoke compares the frames of a clip, and crops='per_crop' would separate them",
        ),
        ("evs", {"options": {"crops": "per_crop"}}, "evs compares the frames of a clip"),
        ("vidcom2", {"keep": -3}, "keep=-3: a token count"),
    ],
)
def test_settings_that_cannot_be(method: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        duet_vlm.make_method(method, **changes)
