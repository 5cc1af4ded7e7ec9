"""What the multimodal model is called with: placeholders, image features and their decisions, before the decoder stack hides them."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import Tensor

from duet_vlm.models.adapter import Adapter
from duet_vlm.runtime.active_config import ActiveConfig
from duet_vlm.runtime.context import ENCODED, EncodedFeatures, ForwardContext, OriginalArgs, ReceivedFeatures
from duet_vlm.runtime.encode.encoder import is_marked, publish_features

OUTPUTS = "mm_encoder_outputs"  # of a forward call, and of generate()
SHOWN = ("image_hidden_states", "video_hidden_states")  # features among a model's outputs


def restore_decisions(note: OriginalArgs | None, kwargs: dict[str, Any]) -> None:
    """Give encoder outputs their decisions back, where they were rebuilt on their way from the call to the forward."""
    for name, given in ((note and note.encoder_outputs) or {}).items():
        output = (kwargs.get(OUTPUTS) or {}).get(name)
        if output is not None and hasattr(given, ENCODED) and not hasattr(output, ENCODED):
            setattr(output, ENCODED, getattr(given, ENCODED))


def swap_in_reduced(rules: ActiveConfig | None, kwargs: dict[str, Any], whole: bool = False) -> None:
    """Where encoder outputs come along that were made for the user, with all rows: those of a call that reduces get the reduced ones.

    ``whole``: also copy outputs that are not reduced, since generate() writes into what it is given.
    """
    outputs = kwargs.get(OUTPUTS)
    if rules is not None and outputs:
        kwargs[OUTPUTS] = {name: _taken_up(output, whole) for name, output in outputs.items()}


def _taken_up(output: Any, whole: bool) -> Any:
    encoded = getattr(output, ENCODED, None)
    if encoded is None or (encoded.reduced_rows is None and not whole):
        return output
    output, encoded = copy.copy(output), dataclasses.replace(encoded, decisions={})
    if encoded.reduced_rows is not None:
        publish_features(output, encoded)
    setattr(output, ENCODED, encoded)
    return output


def collect_features(call: ForwardContext, outputs: dict[str, Any] | None) -> None:
    """Take features and decisions from encoder outputs. Done where the outermost forward begins: hooks of device maps rebuild the outputs
    on their way in, and what rode on them is lost. A full model is given no decisions but those that its features cannot do without."""
    for name, output in (outputs or {}).items():
        encoded = getattr(output, ENCODED, None)
        if encoded is not None and encoded.reduced_rows is None and (call.config is not None or encoded.selection is not None):
            call.received[name] = ReceivedFeatures(list(output.pooler_output), encoded)


def collect_inputs(adapter: Adapter, call: ForwardContext, arguments: dict[str, Any]) -> None:
    """Note in ``call`` what a forward of the multimodal model was given; if it reduces, refuse what it cannot serve."""
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    outputs = arguments.get(OUTPUTS) or {}
    known = {stream.name for stream in adapter.modalities}
    active = call.config is not None
    for name, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if active and name not in known and (arguments.get(pixels) is not None or outputs.get(name) is not None):
            raise ValueError(f"{adapter.family}: {name} inputs are not supported yet: use handle.paused() for this call, or detach")
    brings_images = any(arguments.get(s.pixels) is not None or outputs.get(s.name) is not None for s in adapter.modalities)
    if active and ids is None and embeds is not None and not brings_images and _is_prompt(arguments.get("past_key_values")):
        raise ValueError(
            "inputs_embeds without input_ids and without images: visual rows merged by the caller cannot be told from text. Pass "
            "input_ids and pixel_values (or inputs_embeds and pixel_values), or use handle.paused()"
        )
    call.attention_mask = arguments.get("attention_mask")
    call.input_ids, call.input_embeds, call.brings_images = ids, embeds, brings_images
    decodes = ids is not None and ids.shape[1] == 1 and not brings_images
    if not decodes and (ids is not None or embeds is not None):
        call.placeholders = adapter.placeholders(ids, embeds)
    collect_features(call, {name: output for name, output in outputs.items() if name in known - call.received.keys()})
    for name in known & outputs.keys() - call.received.keys():
        if call.config is not None and outputs[name] is not None:
            call.received[name] = _encoded_elsewhere(name, list(outputs[name].pooler_output), call.config)


def _is_prompt(cache: Any) -> bool:
    return cache is None or int(cache.get_seq_length()) == 0


def _encoded_elsewhere(stream: str, features: list[Tensor], rules: ActiveConfig) -> ReceivedFeatures:
    """Decisions for features that the caller encoded without us: every row enters, drops inside the decoder follow the plan."""
    plans = tuple(rules.plan(len(rows)) for rows in features)
    if any(p.merges for p in plans):
        raise ValueError(
            "the image features were encoded before the reducer was attached (or while it was paused), so they cannot be merged any more; "
            "encode them with the attached model, or use a method that only drops inside the decoder"
        )
    sizes = tuple(len(rows) for rows in features)
    passes = tuple((n,) for n in sizes)
    return ReceivedFeatures(features, EncodedFeatures(stream, features, (None,) * len(features), plans, rules, tokens_per_crop=passes, projected_rows=sizes))


def without_marks(output: Any) -> Any:
    """A model's output whose image features hold zeros where rows left: NaN, which marks them on the way, is nothing to hand to users."""
    for name in SHOWN:
        if getattr(output, name, None) is not None:
            setattr(output, name, _zeroed(getattr(output, name)))
    return output


def _zeroed(shown: Any) -> Any:
    """Features as a family shows them: rows, several of them, or the encoder's own output (which generate() goes on using)."""
    if isinstance(shown, Tensor):
        return shown.masked_fill(is_marked(shown)[..., None], 0)
    if isinstance(shown, list | tuple):
        return type(shown)(_zeroed(rows) for rows in shown)
    if getattr(shown, "pooler_output", None) is not None:
        shown = copy.copy(shown)
        shown.pooler_output = _zeroed(shown.pooler_output)
    return shown
