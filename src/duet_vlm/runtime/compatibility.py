"""Check settings against a model before any call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from duet_vlm.inputs.clip_text import ClipTextEncoder
from duet_vlm.models.adapter import Adapter
from duet_vlm.planning.budget import Budget, SpanPlan
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.compressor import compressor_of
from duet_vlm.reducers.decoder import DecoderReducer, decisions
from duet_vlm.reducers.encoder import EncoderReducer
from duet_vlm.reducers.inputs import ENCODER_INPUTS, FEATURE_INPUTS, Input
from duet_vlm.runtime.encode.build_view import layer_number
from duet_vlm.runtime.prefill.layers import scoring_layers
from duet_vlm.runtime.vision_tower.block_hooks import check_boundaries

WITHOUT = {
    Input.TEXT_SIMILARITY.value: "take relevance='decoder', which compares with the question as the decoder encodes it"
}
ANY_SIZE = 4096  # a span size to try settings on where images differ in size


def hook_settings(reducer: Reducer) -> tuple[Any, ...]:
    """The settings that decide the hooks on the vision tower and the method's own module."""
    compressor = compressor_of(reducer)
    module = None if compressor is None else (compressor.weights, compressor.seed, tuple(compressor.shape.items()))
    return (
        reducer.clip_model if isinstance(reducer, EncoderReducer) else None,
        reducer.signal_layers,
        reducer.requires & (ENCODER_INPUTS - FEATURE_INPUTS),
        reducer.options.cls_token,
        module,
    )


def check(
    adapter: Adapter,
    reducer: Reducer,
    plan: Callable[[int], SpanPlan],
    processor: Any,
    budget: Budget | None,
    text_tower: Any = None,
) -> None:
    """Raise for every setting that is known to be wrong before a call."""
    if reducer.options.positions == "compact" and adapter.mrope:
        raise TypeError(
            f"positions='compact' cannot work on {adapter.family}: its positions are grids (M-RoPE); use positions='keep'"
        )
    if isinstance(reducer, EncoderReducer):
        if reducer.tower_reducer is not None:
            check_boundaries(adapter, reducer)
            for layer in (layer_number(adapter, layer) for layer in reducer.signal_layers):
                if layer is not None and not adapter.attends_globally(layer):
                    raise ValueError(
                        f"signal_layer={layer} attends within windows, of which a reduced tower leaves pieces: name another"
                    )
            if Input.STATES in reducer.requires:
                raise TypeError(
                    f"{reducer.name} uses the output of blocks of the vision tower, which a reduced tower has for some patches only: do not reduce the tower"
                )
        if reducer.options.cls_token:
            adapter.cls_module()
            if adapter.feeds_cls:
                raise ValueError(
                    "cls_token=True adds the CLS row, but this model feeds it already (vision_feature_select_strategy='full')"
                )
        _check_layers(adapter, reducer)
        for missing in sorted(
            {needed.value for needed in reducer.requires & ENCODER_INPUTS} & adapter.unsupported.keys()
        ):
            raise TypeError(
                f"{reducer.name} needs {missing!r}, which {adapter.family} cannot give: {adapter.unsupported[missing]}. {WITHOUT[missing]}"
            )
        if Input.TEXT_SIMILARITY in reducer.requires:
            _check_text_tower(adapter, reducer, text_tower, processor)
    if processor is not None and not hasattr(processor, "tokenizer"):
        raise TypeError(f"processor= must be the model's processor (with a tokenizer), got {type(processor).__name__}")
    if isinstance(reducer, DecoderReducer) and reducer.options.text_query == "salient" and processor is None:
        raise ValueError("text_query='salient' reads the words of the question: pass processor= to attach()")
    stored = reducer.calibration()
    if stored is not None:
        stored.check(facts(adapter))
    if adapter.fixed_tokens is not None:
        _check_counts(adapter.fixed_tokens, reducer)
    # layers out of range are wrong for every image; budgets wait for its size
    if adapter.fixed_tokens is not None or budget is None:
        example_plan = plan(adapter.fixed_tokens or ANY_SIZE)
        counts = example_plan.counts
        if example_plan.floored:
            reducer.plan(example_plan.tokens, len(counts), budget)  # raises: no image of this tower could do better
        if isinstance(reducer, DecoderReducer):
            drops = decisions(reducer, (example_plan.entry, *counts))
            scoring_layers(adapter, reducer, [layer for layer, *_ in drops if layer])


def facts(adapter: Adapter) -> dict[str, Any]:
    """Facts that a calibration must share with the model that it is used on."""
    shape = adapter.decoder_dims()
    return {
        "family": adapter.family,
        "layers": shape.layers,
        "hidden": shape.hidden,
        "heads": shape.heads,
        "tokens": adapter.fixed_tokens,
    }


def _check_layers(adapter: Adapter, reducer: EncoderReducer) -> None:
    """Refuse signal layers that the vision tower does not have."""
    depth = adapter.vision_dims().layers
    for layer in reducer.signal_layers:
        if layer is not None and not (0 <= layer <= 1 if isinstance(layer, float) else -depth <= layer < depth):
            raise ValueError(
                f"signal_layer={layer}: this vision tower has no such layer, it has {depth}; give a number from {-depth} to {depth - 1}, or a share "
                "of the depth from 0.0 to 1.0"
            )


def _check_text_tower(adapter: Adapter, reducer: EncoderReducer, text_tower: Any, processor: Any) -> None:
    """Refuse a text tower that does not share a space with the vision tower, or a missing tokenizer."""
    if not isinstance(text_tower, ClipTextEncoder):
        got = "" if text_tower is None else f", got {type(text_tower).__name__}"
        raise ValueError(
            f"{reducer.name} compares tokens with the question in the space of a text tower{got}: name it (clip='openai/clip-vit-large-patch14-336'), pass "
            f"text_tower=duet_vlm.inputs.clip_text.ClipTextEncoder(clip, tokenizer) to attach(), or {WITHOUT[Input.TEXT_SIMILARITY.value]}"
        )
    if not hasattr(processor, "tokenizer"):
        raise ValueError(f"{reducer.name} reads the question's words for text_tower: pass processor= to attach()")
    if text_tower.width != adapter.vision_dims().width:
        raise ValueError(
            f"text_tower was trained with a vision tower of width {text_tower.width}, this model's has {adapter.vision_dims().width}: load the CLIP "
            "model that this vision tower comes from"
        )


def _check_counts(tokens: int, reducer: Reducer) -> None:
    """Refuse counts above the number of tokens of a tower with a fixed size."""
    for name in ("dominant", "contextual", "entry", "keep"):
        value = getattr(reducer, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > tokens + reducer.options.cls_token:
            raise ValueError(f"{name}={value}: this model's images have {tokens} visual tokens")
