"""Clips through the families that take them: one span each, alone and among images, held to the same oracle as images."""

from __future__ import annotations

import pytest
import torch
from families import (
    CLIP,
    CLIP_AND_IMAGE,
    FAMILIES,
    IMAGE_AND_CLIPS,
    build,
    clips_for,
    forward,
    generate,
    pictures_of,
    shared,
)
from method_matrix import pairs
from reference_forward import choices_of, step_logits, walk_batch

import duet_vlm

MOVING = [name for name, family in FAMILIES.items() if family.video]
SETTINGS = {
    "duet": {"dominant": 0.4, "contextual": 0.2, "schedule": ((3, 0.6), (5, 0.25), (7, 0.0))},
    "duet_plus": {"keep": 0.5, "pool": 0.6, "tau": -1.0, "schedule": ((3, 0.6), (5, 0.25))},
    "visionzip": {"dominant": 0.3, "contextual": 0.2},
    "fastv": {"layers": 2, "keep": 0.4},
    "frames": {"keep": 0.5},
    "evs": {"keep": 0.5},
    "dycoke": {"keep": 0.6},
    "fastvid": {"keep": 0.5},
    "holitom": {"keep": 0.6, "threshold": 0.0, "schedule": ((4, 0.4),)},
    "prunevid": {
        "keep": 0.6,
        "windows": 0.5,
        "threshold": 0.2,
        "schedule": ((4, 0.4),),
        "options": {"trim_kv_cache": False},
    },
    "metok": {"keep": 0.6, "threshold": 0.0, "schedule": ((3, 0.6), (5, 0.25)), "options": {"trim_kv_cache": False}},
    "vidcom2": {"keep": 0.5},
    "frames+duet": {
        "frames_keep": 0.7,
        "duet_dominant": 0.4,
        "duet_contextual": 0.2,
        "duet_schedule": ((3, 0.6), (5, 0.25)),
    },
    "frames+pyramiddrop": {"frames_keep": 0.7, "pyramiddrop_schedule": ((3, 0.6), (5, 0.25))},
    "uniform": {"entry": 0.6, "schedule": ((4, 0.3),)},
}
EACH = pytest.mark.parametrize("family", MOVING)
METHODS = pytest.mark.parametrize("method", SETTINGS)


@EACH
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_everything_changes_nothing(family: str, attention: str) -> None:
    model, inputs = shared(family, attention), FAMILIES[family].inputs(clips_for(family))
    plain = forward(model, inputs).logits
    for method, options in (("duet", {"budget": 1.0}), ("none", {}), ("fastv", {"keep": 1.0})):
        with duet_vlm.attach(model, method, **options):
            assert torch.equal(forward(model, inputs).logits, plain)
    assert torch.equal(forward(model, inputs).logits, plain)


@pairs(SETTINGS, MOVING)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_equals_the_oracle(family: str, method: str, attention: str) -> None:
    model, inputs = shared(family, attention), FAMILIES[family].inputs(clips_for(family))
    with duet_vlm.attach(model, method, **SETTINGS[method]) as handle:
        result = generate(model, inputs)
        choices = choices_of(handle)
    new = result.sequences[:, inputs["input_ids"].shape[1] :]
    expected = step_logits(walk_batch(build(family, "eager"), inputs, choices, new), choices, len(result.logits))
    untouched = generate(model, inputs).logits[0]
    for ours, wanted in zip(result.logits, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=2e-3)
    assert float((result.logits[0] - untouched).abs().max()) > 0.05


@pairs(SETTINGS, MOVING)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_equals_that_row_alone(family: str, method: str, side: str) -> None:
    model, made = shared(family), FAMILIES[family]
    with duet_vlm.attach(model, method, **SETTINGS[method]) as handle:
        batch = made.inputs(clips_for(family), side)
        logits = forward(model, batch).logits
        slots, traces = handle.slots, handle.trace
        for i, row in enumerate(clips_for(family)):
            alone = forward(model, made.inputs([row])).logits[0]
            torch.testing.assert_close(logits[i][slots[i] >= 0], alone, rtol=1e-3, atol=2e-3)
            if pictures_of([row]):
                assert [span.stages for span in handle.trace[0]] == [span.stages for span in traces[i]]


@EACH
@pytest.mark.parametrize("row", [CLIP, CLIP_AND_IMAGE, IMAGE_AND_CLIPS])
def test_every_span_meets_the_budget(family: str, row: tuple[object, ...]) -> None:
    model, made = shared(family), FAMILIES[family]
    rows = clips_for(family, [row])  # type: ignore[list-item]
    sizes = [made.tokens(picture) for picture in pictures_of(rows)]
    with duet_vlm.attach(model, "duet", budget=0.5) as handle:
        forward(model, made.inputs(rows))
        report = handle.report()
        spans = [entry.span for entry in handle.trace[0]]
    assert [span.tokens for span in spans] == sizes
    assert [span.offset for span in spans] == [sum(sizes[:i]) for i in range(len(sizes))]
    wanted = sum(0.5 * size for size in sizes)
    assert wanted - len(sizes) < report.measured_mean <= wanted + 1e-6


@EACH
def test_a_clip_that_was_not_passed_is_missed(family: str) -> None:
    model, inputs = shared(family), FAMILIES[family].inputs([CLIP])
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    places = sum(FAMILIES[family].tokens(picture) for picture in pictures_of([CLIP]))
    message = rf"sample 0 has {places} video placeholders .* no video was passed"
    with duet_vlm.attach(model, "duet", budget=0.5), pytest.raises(ValueError, match=message):
        forward(model, prompt)


@EACH
def test_several_answers_per_prompt_equal_the_oracle(family: str) -> None:
    """generate() repeats the spans of every sample for its answers, clips and images apart."""
    model, inputs = shared(family), FAMILIES[family].inputs(clips_for(family))
    with duet_vlm.attach(model, "duet", **SETTINGS["duet"]) as handle:
        torch.manual_seed(7)
        written = generate(model, inputs, do_sample=True, temperature=2.0, top_k=0, num_return_sequences=2)
        choices = choices_of(handle)
    assert len(choices) == 2 * len(clips_for(family))
    new = written.sequences[:, inputs["input_ids"].shape[1] :]
    expected = step_logits(walk_batch(build(family, "eager"), inputs, choices, new), choices, len(written.logits))
    for ours, wanted in zip(written.logits, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_answers_go_on_behind_the_last_row_whoever_survives(family: str, keep: float) -> None:
    """Time positions of a clip may run past those of the text: the stock model goes on behind the text, so do we,
    whichever frames are left."""
    model, inputs = shared(family), FAMILIES[family].inputs([IMAGE_AND_CLIPS])
    stock = generate(model, inputs, 4)
    with duet_vlm.attach(model, "frames", keep=keep) as handle:
        written = generate(model, inputs, 4)
        choices = choices_of(handle)
    generated = written.sequences[:, inputs["input_ids"].shape[1] :]
    walks = walk_batch(shared(family, "eager"), inputs, choices, generated)
    for step, expected in enumerate(step_logits(walks, choices, generated.shape[1])):
        torch.testing.assert_close(written.logits[step], expected, rtol=1e-3, atol=2e-4)
        if keep == 1.0:
            assert torch.equal(written.logits[step], stock.logits[step])
