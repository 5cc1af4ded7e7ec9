"""Video-LLaVA: what frames keep, and the settings of the paper on frames of the real size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CLIP, CLIPS, FAMILIES, forward, generate, noise, shared
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

import duet_vlm
from duet_vlm.methods.two_stage.duet import Duet
from duet_vlm.reducers.options import TokenOptions

ROWS = 17  # of a frame of the tiny model: CLS and 4 x 4 patches
PAPER = {"dominant": 160, "contextual": 32, "schedule": ((16, 0.5), (24, 0.0))}


@pytest.mark.parametrize("method", ["duet", "visionzip"])
def test_every_frame_keeps_its_share_and_its_cls_row(method: str) -> None:
    with duet_vlm.attach(shared("video_llava"), method, dominant=3, contextual=2) as handle:
        forward(shared("video_llava"), FAMILIES["video_llava"].inputs([CLIP]))
        ((span,),) = handle.trace
    kept = span.stages[0].kept
    assert len(kept) == 2 * 5 and {0, ROWS} <= set(kept)
    assert [sum(row // ROWS == frame for row in kept) for frame in (0, 1)] == [5, 5]
    members = [(centre, row) for centre, rows in span.merged.items() for row in rows]
    assert (
        members and all(centre // ROWS == row // ROWS for centre, row in members) and not {0, ROWS} & set(span.merged)
    )


def test_frames_together_keep_every_cls_row() -> None:
    with duet_vlm.attach(
        shared("video_llava"), "visionzip", dominant=7, contextual=0, options=TokenOptions(crops="joint")
    ) as handle:
        forward(shared("video_llava"), FAMILIES["video_llava"].inputs([CLIP]))
        kept = handle.trace[0][0].stages[0].kept
    assert len(kept) == 7 and {0, ROWS} <= set(kept)


def test_only_survivors_of_a_clip_are_projected() -> None:
    model, rows = shared("video_llava"), []
    hook = model.model.multi_modal_projector.linear_1.register_forward_pre_hook(
        lambda module, args: rows.append(tuple(args[0].shape[:-1]))
    )
    with duet_vlm.attach(model, "duet", dominant=3, contextual=2):
        forward(model, FAMILIES["video_llava"].inputs([CLIP, CLIP]))
    hook.remove()
    assert rows == [(2, 2 * 5)]


def test_the_old_name_of_the_image_argument_works() -> None:
    model, inputs = shared("video_llava"), FAMILIES["video_llava"].inputs(CLIPS)
    old = {"pixel_values_images" if name == "pixel_values" else name: value for name, value in inputs.items()}
    with duet_vlm.attach(model, "duet", budget=0.4):
        assert torch.equal(forward(model, old).logits, forward(model, inputs).logits)
        assert torch.equal(generate(model, old).sequences, generate(model, inputs).sequences)


def test_a_cls_row_cannot_be_added() -> None:
    with pytest.raises(TypeError, match="feeds the CLS row of every frame already"):
        duet_vlm.attach(shared("video_llava"), Duet.official_llava(4, 1))


def frames_of_real_size() -> tuple[nn.Module, dict[str, Any]]:
    """32 layers and 8 frames of 257 rows, as LanguageBind/Video-LLaVA-7B-hf, everything else as small as can be."""
    torch.manual_seed(0)
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 32,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=224, patch_size=14
        ),
        text_config=LlamaConfig(**text, vocab_size=100, max_position_embeddings=4096),
        image_token_index=98, video_token_index=99,
    )  # fmt: skip
    ids = torch.tensor([[1, *[99] * 8 * 257, 5, 6, 7]])
    return VideoLlavaForConditionalGeneration(config).eval(), {
        "input_ids": ids,
        "pixel_values_videos": noise(0, 1, 8, 3, 224, 224),
    }


@pytest.mark.parametrize("settings", [PAPER, "duet-video-llava-960"], ids=str)
def test_the_papers_settings_mean_960_tokens(settings: Any) -> None:
    """The released scripts: 160 + 32 rows of each of 8 frames, half of them from layer 16 on, none from layer 24 on."""
    model, inputs = frames_of_real_size()
    chosen = {"method": duet_vlm.preset(settings)} if isinstance(settings, str) else {"method": "duet", **settings}
    with duet_vlm.attach(model, **chosen) as handle:
        forward(model, inputs)
        report, ((span,),) = handle.report(), handle.trace
    assert report.measured == report.nominal == (1536.0,) * 16 + (768.0,) * 8 + (0.0,) * 8
    assert report.measured_mean == 960
    assert [sum(row // 257 == frame for row in span.stages[0].kept) for frame in range(8)] == [192] * 8


def test_a_budget_of_136_tokens_for_a_clip() -> None:
    model, inputs = frames_of_real_size()
    with duet_vlm.attach(model, "duet", budget=136) as handle:
        forward(model, inputs)
        assert 135 < handle.report().measured_mean <= 136
