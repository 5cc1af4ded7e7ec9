"""Bytes of the key-value cache, and of the states that linear layers keep instead."""

from __future__ import annotations

from collections.abc import Sequence

from duet_vlm.profiling.model_dims import LINEAR, SLIDING, DecoderDims

STATE_BYTES = 4  # states are kept in float32


def kv_bytes_per_layer(shape: DecoderDims, rows_per_layer: Sequence[int], element_bytes: int) -> tuple[int, ...]:
    """Keys and values that each layer l keeps of ``rows_per_layer[l]`` rows of one sample, ``element_bytes`` per
    number.

    Full layers keep every row, sliding ones all but one of their window, linear ones none.
    """
    return tuple(
        2 * _kept(shape, rows, layer) * shape.narrow * element_bytes for layer, rows in enumerate(rows_per_layer)
    )


def rows_held(shape: DecoderDims, rows_per_layer: Sequence[int], cut: bool) -> tuple[int, ...]:
    """Rows in each layer's cache after the prompt; ``cut``: full layers keep only those that reached the last layer."""
    last = rows_per_layer[-1]
    return tuple(
        last if cut and shape.kind(layer) not in (LINEAR, SLIDING) else rows
        for layer, rows in enumerate(rows_per_layer)
    )


def kv_bytes(shape: DecoderDims, rows_per_layer: Sequence[int], element_bytes: int) -> int:
    """Key-value bytes of all layers together."""
    return sum(kv_bytes_per_layer(shape, rows_per_layer, element_bytes))


def state_bytes(shape: DecoderDims, element_bytes: int) -> int:
    """States of the linear layers and the last rows of their convolutions, for one sample of any length."""
    linear = shape.linear
    if linear is None:
        return 0
    layer_bytes = (
        linear.value_heads * linear.key_dim * linear.value_dim * STATE_BYTES
        + linear.mixed * linear.kernel * element_bytes
    )
    return layer_bytes * sum(shape.kind(layer) == LINEAR for layer in range(shape.layers))


def _kept(shape: DecoderDims, rows: int, layer: int) -> int:
    kind = shape.kind(layer)
    if kind == LINEAR:
        return 0
    return min(rows, shape.window - 1) if kind == SLIDING and shape.window is not None else rows
