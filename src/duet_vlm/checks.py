"""Settings that cannot be right for a model, found before any call."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

from duet_vlm.budget import Budget, SpanPlan
from duet_vlm.flow.decoder import scoring_layers
from duet_vlm.models.adapter import Adapter
from duet_vlm.reducer import DecoderReducer, EncoderReducer, Reducer
from duet_vlm.spelling import did_you_mean

ANY_SIZE = 4096  # a span size to try settings on where images differ in size


def with_fields(method: type[Reducer] | Reducer, fields: dict[str, Any]) -> Reducer:
    """The method with these settings; an unknown one is a ValueError that lists those there are."""
    cls = method if isinstance(method, type) else type(method)
    known = [field.name for field in dataclasses.fields(cls)]
    for name in fields:
        if name not in known:
            raise ValueError(f"{cls.name} has no setting {name!r}{did_you_mean(name, known)}; its settings: {', '.join(known)}")
    return method(**fields) if isinstance(method, type) else dataclasses.replace(method, **fields)


def signal_layer(reducer: Reducer) -> tuple[Any, ...]:
    """What the hooks on the vision tower were chosen by."""
    return (getattr(reducer, "signal_layer", None), getattr(reducer, "cls_token", None))


def check(adapter: Adapter, reducer: Reducer, plan: Callable[[int], SpanPlan], processor: Any, budget: Budget | None) -> None:
    """Everything that can be known to be wrong before a call."""
    if reducer.positions == "compact" and adapter.mrope:
        raise TypeError(f"positions='compact' cannot work on {adapter.family}: its positions are grids (M-RoPE); use positions='keep'")
    if isinstance(reducer, EncoderReducer):
        if reducer.tower is not None:
            adapter.blocks_to_reduce()  # raises where nothing can leave
            if reducer.signal_layer is not None and not adapter.sees_whole(reducer.signal_layer):
                raise ValueError(f"signal_layer={reducer.signal_layer} attends within windows, of which a reduced tower leaves pieces: name another")
        if reducer.cls_token:
            adapter.cls_module()
            if adapter.feeds_cls:
                raise ValueError("cls_token=True adds the CLS row, but this model feeds it already (vision_feature_select_strategy='full')")
        if reducer.signal_layer is not None:
            try:
                adapter.vision_attention(reducer.signal_layer)
            except IndexError:
                raise ValueError(f"signal_layer={reducer.signal_layer}: this vision tower has no such layer") from None
    if isinstance(reducer, DecoderReducer) and reducer.text_query == "salient":
        if processor is None:
            warnings.warn(
                "text_query='salient' without processor=: every call must bring salient_mask (duet_vlm.text.salient_mask)", stacklevel=3
            )
        elif not hasattr(processor, "tokenizer"):
            raise TypeError(f"processor= must be the model's processor (with a tokenizer), got {type(processor).__name__}")
    stored = reducer.calibration() if isinstance(reducer, DecoderReducer) else None
    if stored is not None:
        stored.check(facts(adapter))
    if adapter.fixed_tokens is not None:
        _check_counts(adapter.fixed_tokens, reducer)
    if adapter.fixed_tokens is not None or budget is None:  # layers out of range are wrong for every image; budgets wait for its size
        made = plan(adapter.fixed_tokens or ANY_SIZE)
        counts = made.counts
        if made.floored:
            reducer.plan(made.tokens, len(counts), budget)  # raises: no image of this tower could do better
        scoring_layers(adapter, reducer, [layer for layer in range(1, len(counts)) if 0 < counts[layer] < counts[layer - 1]])


def facts(adapter: Adapter) -> dict[str, Any]:
    """What a calibration must share with the model that it is used on."""
    shape = adapter.decoder_shape()
    return {"family": adapter.family, "layers": shape.layers, "hidden": shape.hidden, "heads": shape.heads, "tokens": adapter.fixed_tokens}


def _check_counts(tokens: int, reducer: Reducer) -> None:
    """Asking for more tokens than a fixed tower makes is a mistake in the settings."""
    for name in ("dominant", "contextual", "entry", "keep"):
        value = getattr(reducer, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > tokens + getattr(reducer, "cls_token", False):
            raise ValueError(f"{name}={value}: this model's images have {tokens} visual tokens")
