"""The frames method: clips and images against plain loops, and on models with real encoder calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CLIP_AND_IMAGE, CLIPS, FAMILIES, IMAGE_AND_CLIPS, clips_for, forward, pictures_of, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from method_views import MOVING, Clip, frames_view, kept_of_clip
from torch import Tensor

import duet_vlm
from duet_vlm import EncoderView
from duet_vlm.methods.video.frames import Frames
from duet_vlm.reducers.options import TokenOptions


def kept_of_frames(view: EncoderView) -> list[list[int]]:
    selection = Frames(keep=1.0).select_tokens(view)
    assert not selection.source_tokens.numel()
    return [row[real].tolist() for row, real in zip(selection.index, selection.valid, strict=True)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.data(),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(0, 10**6),
)
def test_equals_plain_loops(data: st.DataObject, clips: list[Clip], shift: int, seed: int) -> None:
    """Clips of different length and frame size in one batch, rows that hold nothing in front of them."""
    counts = [data.draw(st.integers(1, steps * size)) for steps, size in clips]
    view = frames_view(clips, counts, seed, shift=shift)
    assert view.features is not None
    for row, ((steps, size), count, kept) in enumerate(zip(clips, counts, kept_of_frames(view), strict=True)):
        rows = view.features[row, shift : shift + steps * size].double().tolist()
        assert [i - shift for i in kept] == kept_of_clip(rows, steps, count)


def test_what_never_changes_is_kept_once() -> None:
    """A still picture, one place of which changes in step 2 and changes back: beyond the first step, exactly those two
    rows come first."""
    still = torch.randn(4, 8)
    features = still.repeat(4, 1, 1)
    features[2, 1] += 1
    view = frames_view([(4, 4)], [6])
    view = EncoderView(
        view.valid,
        view.dominant,
        view.contextual,
        view.plans,
        features=features.view(1, 16, 8),
        parts=view.parts,
        modality="video",
    )
    assert kept_of_frames(view) == [[0, 1, 2, 3, 9, 13]]


def test_ties_go_to_the_lower_index() -> None:
    view = frames_view([(3, 4)], [7])
    features = torch.randn(1, 4, 8).repeat(1, 3, 1)  # nothing ever changes: all later rows tie at exactly 0
    view = EncoderView(
        view.valid, view.dominant, view.contextual, view.plans, features=features, parts=view.parts, modality="video"
    )
    assert kept_of_frames(view) == [[0, 1, 2, 3, 4, 5, 6]]


def test_brightness_alone_is_no_change() -> None:
    """Cosine, not distance: rows scaled in length have not changed, a row that turns a little has."""
    view = frames_view([(2, 4)], [5])
    rows = torch.randn(4, 8)
    turned = rows * torch.tensor([0.1, 10.0, 5.0, 3.0])[:, None]
    turned[2] += 0.5
    features = torch.stack([rows, turned]).view(1, 8, 8)
    view = EncoderView(
        view.valid, view.dominant, view.contextual, view.plans, features=features, parts=view.parts, modality="video"
    )
    assert kept_of_frames(view) == [[0, 1, 2, 3, 6]]


@pytest.mark.parametrize(("count", "expected"), [(1, [11]), (3, [3, 7, 11]), (4, [2, 5, 8, 11]), (12, list(range(12)))])
def test_images_are_thinned_evenly(count: int, expected: list[int]) -> None:
    """There is no frame before; crops of an image are not compared with each other."""
    assert (
        kept_of_frames(frames_view([(1, 12)], [count], stream="image"))
        == kept_of_frames(frames_view([(3, 4)], [count], stream="image"))
        == [expected]
    )


def test_nothing_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    view = frames_view([(3, 4), (2, 5)], [7, 3])

    def refuse(*args: Any) -> Any:
        raise AssertionError("reads the device")

    for name in ("item", "tolist", "__bool__", "__int__", "nonzero"):
        monkeypatch.setattr(Tensor, name, refuse)
    Frames(keep=0.5).select_tokens(view)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="crops='per_crop' would separate them"):
        Frames(options=TokenOptions(crops="per_crop"))
    with pytest.raises(ValueError, match="no place in the frame to compare"):
        Frames(options=TokenOptions(cls_token=True, positions="compact"))
    with pytest.raises(ValueError, match=r"keep=1.5"):
        Frames(keep=1.5)


@pytest.mark.parametrize("family", MOVING)
def test_reads_the_rows_that_would_enter(family: str) -> None:
    """Spans of a batch of clips and images: the choice is that of the loops over the untouched model's own rows."""
    made, model = FAMILIES[family], shared(family)
    for batch in (clips_for(family, rows) for rows in ([CLIP_AND_IMAGE], [IMAGE_AND_CLIPS], CLIPS)):
        inputs = made.inputs(batch)
        with torch.no_grad():
            clips = list(
                model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
            )
        with duet_vlm.attach(model, "frames", keep=0.4) as handle:
            forward(model, inputs)
            spans = [span for row in handle.trace for span in row]
        number = 0
        for span, picture in zip(spans, pictures_of(batch), strict=True):
            tokens, count = span.span.tokens, int(span.span.tokens * 0.4 + 1e-9)
            if picture.frames:
                expected = kept_of_clip(clips[number].double().tolist(), picture.frames, count)
                number += 1
            else:
                expected = kept_of_clip([[0.0]] * tokens, 1, count)
            assert list(span.stages[0].kept) == expected
        assert number == len(clips)
