"""What the multimodal model is called with: placeholders, image features and their decisions, before the decoder stack hides them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from duet_vlm.budget import SpanPlan
from duet_vlm.flow.call import ENCODED, Arrived, Call, Encoded
from duet_vlm.models.adapter import Adapter


def look(adapter: Adapter, active: bool, plan: Callable[[int], SpanPlan], call: Call, arguments: dict[str, Any]) -> None:
    """Note in ``call`` what a forward of the multimodal model was given; ``active``: a reducer is at work, so refuse what it cannot serve."""
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    outputs = arguments.get("mm_encoder_outputs") or {}
    known = {stream.name for stream in adapter.streams}
    for name, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if active and name not in known and (arguments.get(pixels) is not None or outputs.get(name) is not None):
            raise ValueError(f"{adapter.family}: {name} inputs are not supported yet: use handle.paused() for this call, or detach")
    brings_images = any(arguments.get(s.pixels) is not None or outputs.get(s.name) is not None for s in adapter.streams)
    if active and ids is None and embeds is not None and not brings_images and _is_prompt(arguments.get("past_key_values")):
        raise ValueError(
            "inputs_embeds without input_ids and without images: visual rows merged by the caller cannot be told from text. Pass "
            "input_ids and pixel_values (or inputs_embeds and pixel_values), or use handle.paused()"
        )
    call.mask = arguments.get("attention_mask")
    call.input_ids, call.brings_images = ids, brings_images
    decodes = ids is not None and ids.shape[1] == 1 and not brings_images
    if not decodes and (ids is not None or embeds is not None):
        call.placeholders = adapter.placeholders(ids, embeds)
    for name in known & set(outputs):
        if outputs[name] is not None and (name not in call.arrived or call.arrived[name].encoded is None):
            arrived = adopt(call, name, outputs[name])
            if arrived.encoded is None and active:
                arrived.encoded = encoded_elsewhere(name, list(arrived.features), plan)


def adopt(call: Call, stream: str, output: Any) -> Arrived:
    """Take features and decisions from an encoder output. Done where the outermost forward begins: hooks of device maps rebuild the
    output on their way in, and what rode on it is lost."""
    call.arrived[stream] = Arrived(list(output.pooler_output), getattr(output, ENCODED, None))
    return call.arrived[stream]


def _is_prompt(cache: Any) -> bool:
    return cache is None or int(cache.get_seq_length()) == 0


def encoded_elsewhere(stream: str, features: list[Tensor], plan: Callable[[int], SpanPlan]) -> Encoded:
    """Decisions for features that the caller encoded without us: every row enters, drops inside the decoder follow the plan."""
    plans = tuple(plan(len(rows)) for rows in features)
    if any(p.merges for p in plans):
        raise ValueError(
            "the image features were encoded before the reducer was attached, so they cannot be merged any more; encode them with the "
            "attached model, or use a method that only drops inside the decoder"
        )
    sizes = tuple(len(rows) for rows in features)
    return Encoded(stream, features, (None,) * len(features), plans, passes=tuple((n,) for n in sizes), projected=sizes)
