"""Inputs of the multimodal model.

Placeholders, image features and their decisions, which the decoder stack does not see.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import Tensor

from duet_vlm.models.adapter import Adapter
from duet_vlm.runtime.active_config import ActiveConfig
from duet_vlm.runtime.context import (
    ENCODED,
    EncodeAccounting,
    EncodedFeatures,
    ForwardContext,
    OriginalArgs,
    ReceivedFeatures,
)
from duet_vlm.runtime.encode.encoder import publish_features
from duet_vlm.runtime.marks import is_marked

OUTPUTS = "mm_encoder_outputs"  # of a forward call, and of generate()
FEATURE_OUTPUTS = ("image_hidden_states", "video_hidden_states")  # features among a model's outputs


def restore_decisions(original_args: OriginalArgs | None, kwargs: dict[str, Any]) -> None:
    """Restore the decisions of encoder outputs that were rebuilt on their way from the call to the forward."""
    for name, original in ((original_args and original_args.encoder_outputs) or {}).items():
        output = (kwargs.get(OUTPUTS) or {}).get(name)
        if output is not None and hasattr(original, ENCODED) and not hasattr(output, ENCODED):
            setattr(output, ENCODED, getattr(original, ENCODED))


def swap_in_reduced(config: ActiveConfig | None, kwargs: dict[str, Any], copy_all: bool = False) -> None:
    """Replace encoder outputs with all features, made for the user, by the reduced ones, if the call reduces.

    ``copy_all``: also copy outputs that are not reduced, since generate() writes into its arguments.
    """
    outputs = kwargs.get(OUTPUTS)
    if config is not None and outputs:
        kwargs[OUTPUTS] = {name: _with_reduced_features(output, copy_all) for name, output in outputs.items()}


def _with_reduced_features(output: Any, copy_all: bool) -> Any:
    """A copy of an encoder output with its reduced features."""
    encoded = getattr(output, ENCODED, None)
    if encoded is None or (encoded.reduced is None and not copy_all):
        return output
    output = copy.copy(output)
    encoded = dataclasses.replace(encoded, decisions={})
    if encoded.reduced is not None:
        publish_features(output, encoded)
    setattr(output, ENCODED, encoded)
    return output


def collect_features(context: ForwardContext, outputs: dict[str, Any] | None) -> None:
    """Collect features and decisions of encoder outputs.

    Called where the outermost forward begins: hooks of device maps rebuild the outputs on their way in, which loses
    attributes. The full model gets decisions only for features that are reduced already.
    """
    for name, output in (outputs or {}).items():
        encoded = getattr(output, ENCODED, None)
        if (
            encoded is not None
            and encoded.reduced is None
            and (context.config is not None or encoded.selection is not None)
        ):
            context.received[name] = ReceivedFeatures(list(output.pooler_output), encoded)


def collect_inputs(adapter: Adapter, context: ForwardContext, arguments: dict[str, Any]) -> None:
    """Store the inputs of a forward of the multimodal model in ``context``; a call that reduces refuses unsupported
    ones."""
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    outputs = arguments.get(OUTPUTS) or {}
    modalities = {modality.name for modality in adapter.modalities}
    active = context.config is not None
    for name, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if active and name not in modalities and (arguments.get(pixels) is not None or outputs.get(name) is not None):
            raise ValueError(
                f"{adapter.family}: {name} inputs are not supported yet: use handle.paused() for this call, or detach"
            )
    brings_images = any(
        arguments.get(modality.pixels) is not None or outputs.get(modality.name) is not None
        for modality in adapter.modalities
    )
    if (
        active
        and ids is None
        and embeds is not None
        and not brings_images
        and _is_prompt(arguments.get("past_key_values"))
    ):
        raise ValueError(
            "inputs_embeds without input_ids and without images: visual rows merged by the caller cannot be told from text. Pass "
            "input_ids and pixel_values (or inputs_embeds and pixel_values), or use handle.paused()"
        )
    context.call.attention_mask = arguments.get("attention_mask")
    context.call.input_ids = ids
    context.call.input_embeds = embeds
    context.call.brings_images = brings_images
    decodes = ids is not None and ids.shape[1] == 1 and not brings_images
    if not decodes and (ids is not None or embeds is not None):
        context.placeholders = adapter.placeholders(ids, embeds)
    collect_features(
        context, {name: output for name, output in outputs.items() if name in modalities - context.received.keys()}
    )
    for name in modalities & outputs.keys() - context.received.keys():
        if context.config is not None and outputs[name] is not None:
            context.received[name] = _encoded_elsewhere(name, list(outputs[name].pooler_output), context.config)


def _is_prompt(cache: Any) -> bool:
    return cache is None or int(cache.get_seq_length()) == 0


def _encoded_elsewhere(modality: str, features: list[Tensor], config: ActiveConfig) -> ReceivedFeatures:
    """Decisions for features that were encoded without the reducer.

    All tokens enter, the decoder stages follow the plan.
    """
    plans = tuple(config.plan(len(rows)) for rows in features)
    if any(plan.reduces_entry for plan in plans):
        raise ValueError(
            "the image features were encoded before the reducer was attached (or while it was paused), so they cannot be merged any more; "
            "encode them with the attached model, or use a method that only drops inside the decoder"
        )
    sizes = tuple(len(rows) for rows in features)
    tokens_per_crop = tuple((n,) for n in sizes)
    encoded = EncodedFeatures(
        modality=modality,
        rows=features,
        grids=(None,) * len(features),
        plans=plans,
        config=config,
        accounting=EncodeAccounting(tokens_per_crop=tokens_per_crop, projected_rows=sizes),
    )
    return ReceivedFeatures(features, encoded)


def without_marks(output: Any) -> Any:
    """A model's output with zeros in place of dropped image features: users do not see the NaN that marks them."""
    for name in FEATURE_OUTPUTS:
        if getattr(output, name, None) is not None:
            setattr(output, name, _zeroed(getattr(output, name)))
    return output


def _zeroed(features: Any) -> Any:
    """Features in any form a family returns them: a tensor, several, or the encoder's own output (which generate() uses
    again)."""
    if isinstance(features, Tensor):
        return features.masked_fill(is_marked(features)[..., None], 0)
    if isinstance(features, list | tuple):
        return type(features)(_zeroed(rows) for rows in features)
    if getattr(features, "pooler_output", None) is not None:
        features = copy.copy(features)
        features.pooler_output = _zeroed(features.pooler_output)
    return features
