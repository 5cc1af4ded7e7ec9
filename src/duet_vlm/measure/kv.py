"""Bytes of the key-value cache."""

from __future__ import annotations

from collections.abc import Sequence

from duet_vlm.measure.shapes import DecoderShape


def kv_bytes(shape: DecoderShape, rows_per_layer: Sequence[int], element_bytes: int) -> int:
    """Keys and values of ``rows_per_layer[l]`` rows in each layer l, ``element_bytes`` per number."""
    return 2 * sum(rows_per_layer) * shape.kv_heads * shape.head_dim * element_bytes
