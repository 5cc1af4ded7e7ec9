"""Image features outside of a prompt: what users get who ask for them, and what becomes of features that come back."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from families import FAMILIES, MIXED, ONE, TWO, clips_for, forward, generate, shared
from method_matrix import REDUCING, Case, matrix, pairs
from torch import Tensor, nn

import duet_vlm
from duet_vlm.evaluation.speed.prompts import encode
from duet_vlm.reducers.options import TokenOptions

PIXELS = {
    "pixel_values": "get_image_features",
    "pixel_values_images": "get_image_features",
    "pixel_values_videos": "get_video_features",
}


def asked(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The encoder outputs of a batch as a user asks for them."""
    found = {}
    for pixels, name in PIXELS.items():
        if pixels in inputs and hasattr(model.model, name):
            call = getattr(model.model, name)
            known = inspect.signature(call).parameters
            if pixels in known:
                stream = "video" if "video" in name else "image"
                found[stream] = call(**{key: value for key, value in inputs.items() if key in known}, return_dict=True)
    return found


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, "to_tuple"):
        value = value.to_tuple()
    return [t for item in value for t in tensors(item)] if isinstance(value, list | tuple) else []


def same(a: Any, b: Any) -> bool:
    ours, theirs = tensors(a), tensors(b)
    return len(ours) == len(theirs) and all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def without_pixels(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in inputs.items()
        if name not in PIXELS and name not in ("pixel_attention_mask", "image_sizes")
    }


@pairs(parts=1)
def test_features_are_those_of_the_stock_model(family: str, method: str) -> None:
    """Bit for bit, every level, while attached and paused; nothing of the call is left."""
    made, model = FAMILIES[family], shared(family)
    for rows in (MIXED, clips_for(family) if made.video else [ONE]):
        inputs = made.inputs(rows)
        with torch.no_grad():
            plain = asked(model, inputs)
            with duet_vlm.attach(model, method, **REDUCING[method]) as handle:
                if duet_vlm.Input.QUESTION in handle.reducer.requires:
                    with pytest.raises(
                        ValueError,
                        match=f"{method} chooses by the question, and an encoder that is called by itself has none",
                    ):
                        asked(model, inputs)
                    with handle.paused():
                        assert all(same(asked(model, inputs)[name], plain[name]) for name in plain)
                    continue
                ours = asked(model, inputs)
                with handle.paused():
                    paused = asked(model, inputs)
        assert plain and plain.keys() == ours.keys()
        for name in plain:
            assert same(ours[name], plain[name]) and same(paused[name], plain[name])
            assert all(bool(torch.isfinite(t).all()) for t in tensors(ours[name]))


@matrix("duet", "fastv", "visionzip", attention=("sdpa",))
def test_features_that_come_back_carry_their_plan(case: Case) -> None:
    """Asked for under one budget: reduced by it in prompts of the attached model, whatever it is set to since; whole
    where it is paused, and when it is detached; the user's own object stays as it is."""
    made, model = FAMILIES[case.family], case.model()
    if case.family in ("idefics3", "smolvlm"):
        return  # their forward takes no outputs of that form beside text of several crops
    inputs = made.inputs([ONE, TWO])
    text = without_pixels(inputs)
    with torch.no_grad():
        full = forward(model, inputs).logits
        with case.attach() as handle:
            reduced, trace = forward(model, inputs).logits, handle.trace
            written = generate(model, inputs, 4).logits
            beams = generate(model, inputs, 4, num_beams=3, num_return_sequences=3).sequences
            outputs = asked(model, inputs)
            kept = [t.clone() for t in tensors(outputs["image"])]
            handle.set(options=TokenOptions(protect_predicting_tokens=False))
            for _ in range(2):
                assert (
                    torch.equal(forward(model, text, mm_encoder_outputs=dict(outputs)).logits, reduced)
                    and handle.trace == trace
                )
            again = generate(model, text, 4, mm_encoder_outputs=dict(outputs)).logits
            assert all(torch.equal(a, b) for a, b in zip(again, written, strict=True))
            several = generate(
                model, text, 4, mm_encoder_outputs=dict(outputs), num_beams=3, num_return_sequences=3
            ).sequences
            assert torch.equal(several, beams)
            with handle.paused():
                assert torch.equal(forward(model, text, mm_encoder_outputs=dict(outputs)).logits, full)
            # as generate() does
            early = encode(model, {k: v for k, v in inputs.items() if k not in text or k.endswith("_thw")})
            assert torch.equal(forward(model, text, mm_encoder_outputs=dict(early)).logits, reduced)
            # of these rows are gone: their own rules apply, nothing that is marked reaches the stock decoder
            with handle.paused():
                found = forward(model, text, mm_encoder_outputs=dict(early)).logits
                assert torch.equal(found, reduced) or torch.equal(found, full)
        assert torch.equal(forward(model, text, mm_encoder_outputs=dict(outputs)).logits, full)
        assert all(torch.equal(a, b) for a, b in zip(kept, tensors(outputs["image"]), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_from_before_are_refused_where_they_cannot_be_merged(family: str) -> None:
    made, model = FAMILIES[family], shared(family)
    if family in ("idefics3", "smolvlm"):
        return
    inputs = made.inputs([ONE])
    outputs, text = asked(model, inputs), without_pixels(inputs)
    with duet_vlm.attach(model, "duet", **REDUCING["duet"]):
        with pytest.raises(
            ValueError, match=r"encoded before the reducer was attached .* encode them with the attached model"
        ):
            forward(model, text, mm_encoder_outputs=outputs)
    with duet_vlm.attach(model, "fastv", **REDUCING["fastv"]):
        assert torch.equal(forward(model, text, mm_encoder_outputs=outputs).logits, forward(model, inputs).logits)


@matrix("duet", "fastv", "visionzip", attention=("sdpa",))
def test_no_output_holds_marks(case: Case) -> None:
    """image_hidden_states and all else that a model returns: finite, zeros where a token left."""
    inputs, model = FAMILIES[case.family].inputs(MIXED), case.model()
    with case.attach():
        for output in (
            forward(model, inputs),
            model.model(**inputs),
            forward(model, inputs, output_hidden_states=True),
        ):
            for name in ("image_hidden_states", "video_hidden_states"):
                shown = getattr(output, name, None)
                assert shown is None or all(bool(torch.isfinite(t).all()) for t in tensors(shown))
