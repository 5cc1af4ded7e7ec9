"""ALVTS: in front of every layer those wake that text and visual tokens attend to, the same number everywhere."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, ONE, forward, generate, shared

import duet_vlm
from duet_vlm.methods.decoder.alvts import Alvts


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_first_layer_keeps_the_largest_products_of_its_own_attention(family: str) -> None:
    """By the attention map of the untouched model, in which all tokens are awake in front of the first layer."""
    inputs = FAMILIES[family].inputs([ONE])
    full = forward(shared(family, "eager"), inputs, output_attentions=True).attentions[0][0].mean(0)
    visual = (inputs["input_ids"][0] == shared(family).config.image_token_id).nonzero().flatten()
    text = torch.arange(int(visual.max()) + 1, full.shape[0])
    product = full[text][:, visual].mean(0) * full[visual][:, visual].mean(0)
    expected = sorted(product.topk(int(0.4 * len(visual))).indices.tolist())
    with duet_vlm.attach(shared(family), "alvts", keep=0.4) as handle:
        out = generate(shared(family), inputs)
        stages = handle.trace[0][0].stages[1:]
    assert [stage.layer for stage in stages] == list(range(8)) and list(stages[0].kept) == expected
    assert len({stage.kept for stage in stages}) > 1  # others wake
    rows = out.sequences.shape[1] - len(visual) + len(expected) - 1  # the last token is read by nobody
    assert {layer.get_seq_length() for layer in out.past_key_values.layers} == {rows}


def test_every_layer_keeps_the_budget() -> None:
    plan = Alvts().plan(576, 32, 64)
    assert plan.entry == 576 and plan.counts == (64,) * 32 and plan.mean == 64
    assert Alvts(keep=1 / 9).plan(576, 32, None).counts == (64,) * 32
    with pytest.raises(ValueError, match="needs a budget"):
        Alvts().plan(576, 32, None)


def test_a_decoder_whose_first_layer_has_no_attention_is_refused() -> None:
    with (
        duet_vlm.attach(shared("qwen3_5"), "alvts", keep=0.4),
        pytest.raises(ValueError, match="drops before decoder layer 0, but qwen3_5 has no attention to rank tokens by"),
    ):
        forward(shared("qwen3_5"), FAMILIES["qwen3_5"].inputs([ONE]))
