"""What LLaVA's relatives do beside the common matrix: images that are not alone, resized crops, the row that ends a
clip."""

from __future__ import annotations

import pytest
import torch
from families import CLIP, FAMILIES, IMAGE, ONE, Picture, build, forward, generate, shared
from families.llava import any_res_pixels
from reference_forward import choices_of, step_logits, walk_batch

import duet_vlm
from duet_vlm.methods.encoder.visionzip import VisionZip
from duet_vlm.models.lookup import adapter_for
from duet_vlm.reducers.options import TokenOptions

BOTH = (Picture(1, 4, 5), Picture(2, 3, 4))  # in one prompt: neither is cut into crops


def two_images() -> dict[str, torch.Tensor]:
    """A prompt of two images as the processor makes it: 4 x 4 patches and a newline row each."""
    ids = torch.tensor([[1, *[IMAGE] * 17, 11, *[IMAGE] * 17, 12, 13]])
    inputs = any_res_pixels(BOTH) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | {"batch_num_images": torch.tensor([2])}


def test_several_images_of_a_prompt_are_not_cut_into_crops() -> None:
    model, inputs = shared("llava_onevision"), two_images()
    with duet_vlm.attach(model, "duet", dominant=5, contextual=2, schedule=((3, 0.5),)) as handle:
        result = generate(model, inputs)
        choices, spans = choices_of(handle), handle.trace[0]
    assert [span.span.tokens for span in spans] == [17, 17]
    # the newline leaves first
    assert all(len(span.stages[0].kept) == 7 and 16 not in span.stages[0].kept for span in spans)
    new = result.sequences[:, inputs["input_ids"].shape[1] :]
    expected = step_logits(
        walk_batch(build("llava_onevision", "eager"), inputs, choices, new), choices, len(result.logits)
    )
    for ours, wanted in zip(result.logits, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=2e-3)


def test_the_row_that_ends_a_clip_leaves_or_stays_as_structure() -> None:
    model, inputs = shared("llava_onevision"), FAMILIES["llava_onevision"].inputs([CLIP])
    for newline, stays in (("drop", False), ("keep", True)):
        with duet_vlm.attach(model, "visionzip", budget=6, options=TokenOptions(newline_tokens=newline)) as handle:
            forward(model, inputs)
            kept = handle.trace[0][0].stages[0].kept
        assert len(kept) == 6 and (12 in kept) == stays


@pytest.mark.parametrize("family", ["llava_next_video", "llava_onevision"])
def test_frames_and_crops_one_by_one_keep_equal_shares(family: str) -> None:
    """Three frames of four tokens; an image's overview and its crops."""
    model, made = shared(family), FAMILIES[family]
    with duet_vlm.attach(
        model, "visionzip", dominant=2, contextual=1, options=TokenOptions(crops="per_crop")
    ) as handle:
        forward(model, made.inputs([CLIP]))
        frames = handle.trace[0][0].stages[0].kept
        forward(model, made.inputs([ONE]))
        image = handle.trace[0][0].stages[0].kept
    assert [sum(row // 4 == frame for row in frames) for frame in range(3)] == [3, 3, 3]
    assert sum(row < 16 for row in image) == 3 and len(image) % 3 == 0 and len(image) >= 6


def test_rows_between_crops_belong_to_one_of_them() -> None:
    """6 x 8 patches of 2 x 2 crops resized to 3 x 4: the line in the middle lies between the upper crops, 1 and 2, and
    the lower, 3 and 4."""
    adapter = adapter_for(shared("llava_onevision"))
    (rows,) = adapter.parts(adapter.modalities[0].encoding(any_res_pixels([Picture(1, 7, 10)])), [])
    assert rows[:16].tolist() == [0] * 16
    upper, middle, lower = rows[16:].view(3, 5).tolist()
    assert upper == [1, 1, 2, 2, -1] and lower == [3, 3, 4, 4, -1]
    assert middle in (upper, lower)


def test_towers_that_are_not_known_are_refused() -> None:
    model = build("llava_onevision")
    model.config.vision_feature_select_strategy = "default"
    with pytest.raises(
        TypeError,
        match=r"only SigLIP towers with vision_feature_select_strategy='full' .* got SiglipVisionModel with 'default'",
    ):
        duet_vlm.attach(model, "duet", budget=0.5)


@pytest.mark.parametrize("family", ["vipllava", "llava_onevision"])
def test_no_cls_row_to_add(family: str) -> None:
    with pytest.raises(TypeError, match="joins several|has no CLS row"):
        duet_vlm.attach(shared(family), VisionZip.official(4, 1))
