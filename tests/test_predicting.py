"""Rows that predict never leave: prompts that end in an image, captions right behind one, an image alone."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, ONE, TEXT, Picture, Row, forward, shared
from method_matrix import Case, matrix
from reference_forward import choices_of, walk_batch
from test_invariants import CLOSE, VISIBLE, beams_equal_oracle, surviving_logits

import duet_vlm
from duet_vlm.methods.decoder.fastv import FastV
from duet_vlm.methods.decoder.pyramiddrop import PyramidDrop
from duet_vlm.methods.encoder.visionzip import VisionZip
from duet_vlm.methods.two_stage.duet import Duet
from duet_vlm.reducers.options import TokenOptions

IMAGE_LAST: Row = (1, 5, 6, 7, Picture(21, 4, 5))
TWO_LAST: Row = (1, Picture(22, 3, 4), 8, 9, Picture(23, 4, 4))
ALONE: Row = (Picture(24, 5, 4),)
ROWS = (IMAGE_LAST, ONE, TWO_LAST, TEXT, ALONE)
METHODS = ("duet", "duet_plus", "fastv", "visionzip", "random")
EVERYTHING_GOES = {  # schedules that end at nothing
    "duet": {"budget": 0.3},
    "duet_plus": {"budget": 0.3},
    "fastv": {"layers": 2, "keep": 0},
    "pyramiddrop": {"schedule": ((2, 0.5), (5, 0.0))},
    "uniform": {"entry": 0.5, "schedule": ((4, 0.0),)},
    "frames+duet": {"budget": 0.3},
}


@matrix(*METHODS, side=("left", "right"))
def test_an_image_at_the_end_equals_the_oracle(case: Case, side: str) -> None:
    """Every surviving row of a padded batch, the last one (visual) among them."""
    inputs, model = FAMILIES[case.family].inputs(ROWS, side), case.model()
    with case.attach() as handle:
        logits = forward(model, inputs).logits
        choices, slots, report = choices_of(handle), handle.slots, handle.report()
        assert report.predicted == report.observed and report.nominal == report.measured
        assert len(handle.trace) == len(ROWS)
    walks = walk_batch(shared(case.family, "eager"), inputs, choices)
    for sample, walk in enumerate(walks):
        real = inputs["attention_mask"][sample].bool().nonzero().flatten().tolist()
        places, rows_left = surviving_logits(logits, slots, sample)
        assert places[-1] == real[-1]  # the row that predicts
        torch.testing.assert_close(rows_left, walk.logits[[p - real[0] for p in places]], **CLOSE)


@matrix("duet", "fastv", attention=("sdpa",))
def test_beams_behind_an_image_equal_the_oracle(case: Case) -> None:
    beams_equal_oracle(case, ROWS, 4)


@pytest.mark.parametrize("method", EVERYTHING_GOES)
@pytest.mark.parametrize("family", FAMILIES)
def test_six_pictures_give_six_answers(family: str, method: str) -> None:
    made, model = FAMILIES[family], shared(family)
    for row in ((1, 5, 6, 7), ()):
        with duet_vlm.attach(model, method, **EVERYTHING_GOES[method]) as handle:
            answers = []
            for seed in range(6):
                answers.append(forward(model, made.inputs([(*row, Picture(30 + seed, 4, 5))])).logits[0, -1])
                assert handle.slots[0, -1] == made.inputs([(*row, Picture(30 + seed, 4, 5))])["input_ids"].shape[1] - 1
    for first in range(6):
        for second in range(first):
            assert float((answers[first] - answers[second]).abs().max()) > VISIBLE


@matrix("duet", "fastv", "visionzip")
def test_a_caption_right_behind_an_image(case: Case) -> None:
    """Image, then caption, as LLaVA is pretrained: the loss is that of the oracle's rows, and its first token depends
    on the image."""
    made, model = FAMILIES[case.family], case.model()
    rows: list[Row] = [(1, Picture(41, 4, 5), 61, 62, 63), (1, Picture(42, 3, 4), 64, 65, Picture(43, 4, 4), 66, 67)]
    inputs = made.inputs(rows)
    visual = inputs["input_ids"] == model.config.image_token_id
    last = (visual.flip(1).cumsum(1).flip(1) == 0) & inputs["attention_mask"].bool()
    labels = inputs["input_ids"].masked_fill(~last, -100)
    labels[labels >= 97] = -100  # marks of images
    with case.attach() as handle:
        output = forward(model, inputs, labels=labels)
        choices, slots = choices_of(handle), handle.slots
    walks = walk_batch(shared(case.family, "eager"), inputs, choices)
    losses = []
    for sample, walk in enumerate(walks):
        pad = int((inputs["attention_mask"][sample] == 0).sum())
        for slot in (labels[sample] != -100).nonzero().flatten().tolist():
            assert slot - 1 in slots[sample].tolist()  # the row that predicts it
            losses.append(torch.nn.functional.cross_entropy(walk.logits[slot - 1 - pad], labels[sample, slot]))
    torch.testing.assert_close(output.loss, torch.stack(losses).mean(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "preset",
    [
        Duet.official_llava(9, 3, 2),
        PyramidDrop.official(((2, 0.5), (5, 0.0))),
        FastV.official(keep=0),
        VisionZip.official(8, 3),
    ],
    ids=lambda preset: preset.name,
)
def test_official_presets_drop_such_rows_as_released(preset: duet_vlm.Reducer) -> None:
    model, made = shared("llava"), FAMILIES["llava"]
    with duet_vlm.attach(model, preset) as handle:
        forward(model, made.inputs([IMAGE_LAST]))
        assert handle.report().measured[-1] == handle.plan(36).counts[-1]
        if handle.plan(36).counts[-1] == 0:
            with pytest.raises(ValueError, match=r"sample 0 has no token left .* protect_predicting_tokens=True"):
                forward(model, made.inputs([ALONE]))
    for cls in (Duet, PyramidDrop, FastV, VisionZip):
        assert cls().options.protect_predicting_tokens


def test_keep_predicting_is_a_bool() -> None:
    with pytest.raises(TypeError, match="protect_predicting_tokens=1: give True or False"):
        Duet(dominant=3, options=TokenOptions(protect_predicting_tokens=1))  # type: ignore[arg-type]
