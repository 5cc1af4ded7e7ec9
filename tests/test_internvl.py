"""InternVL: images of several tiles, and which patches a token stands for."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, IMAGE, VISION_END, VISION_START, build, generate, noise, shared
from reference_forward import choices_of, step_logits, walk_batch

import duet_vlm


def test_an_image_of_three_tiles_has_three_spans() -> None:
    """As the processor writes it: one run of placeholders; each tile keeps its share, and generation follows."""
    model = shared("internvl")
    ids = torch.tensor(
        [[1, VISION_START, *[IMAGE] * 48, VISION_END, 5, 6, 7], [1, VISION_START, *[IMAGE] * 48, VISION_END, 8, 9, 10]]
    )
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": noise(3, 6, 3, 32, 32)}
    with duet_vlm.attach(model, "duet", dominant=5, contextual=2, schedule=((3, 0.5), (5, 0.2))) as handle:
        result = generate(model, inputs)
        choices, trace = choices_of(handle), handle.trace
    assert [[span.span.tokens for span in row] for row in trace] == [[16] * 3] * 2
    assert [[len(span.stages[0].kept) for span in row] for row in trace] == [[7] * 3] * 2
    # half of 7, and the tiles rank together
    assert [sum(len(span.stages[1].kept) for span in row) for row in trace] == [3 * 3] * 2
    new = result.sequences[:, ids.shape[1] :]
    expected = step_logits(walk_batch(build("internvl", "eager"), inputs, choices, new), choices, len(result.logits))
    for ours, wanted in zip(result.logits, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=2e-3)


def test_the_stock_shuffle_makes_tokens_of_the_patches_that_are_scored_together() -> None:
    """Every patch carries its number: a token of the stock model's pixel shuffle holds 2 x 2 neighbours, row by row."""
    rows = torch.arange(64.0).view(1, 8, 8, 1)
    shuffled = shared("internvl").model.pixel_shuffle(rows).view(16, 4).sort(1).values
    wanted = [[first, first + 1, first + 8, first + 9] for r in range(4) for first in range(16 * r, 16 * r + 8, 2)]
    assert shuffled.long().tolist() == wanted


def test_a_tower_whose_cls_row_would_be_shuffled_is_refused() -> None:
    model = FAMILIES["internvl"].make()
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(TypeError, match="only InternVL towers with vision_feature_select_strategy='default'"):
        duet_vlm.attach(model, "duet", budget=0.5)


@pytest.mark.parametrize("method", ["duet", "visionzip", "fastv"])
def test_tiles_of_another_size_than_the_configs(method: str) -> None:
    """The stock model interpolates its positions: 16 x 16 patches here, 64 tokens."""
    model = shared("internvl")
    ids = torch.tensor([[1, VISION_START, *[IMAGE] * 64, VISION_END, 5, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": noise(3, 1, 3, 64, 64)}
    with duet_vlm.attach(model, method, budget=0.5) as handle:
        generate(model, inputs)
        ((span,),) = handle.trace
        report = handle.report()
    assert 31 < report.measured_mean == report.nominal_mean <= 32
    assert span.span.grid == (8, 8)


def test_tiles_that_are_not_square_are_refused() -> None:
    model = FAMILIES["internvl"].make()
    model.config.vision_config.image_size = [32, 64]
    with pytest.raises(TypeError, match="only square tiles are supported, got image_size 32 x 64"):
        duet_vlm.attach(model, "duet", budget=0.5)
