"""Floating-point operations, counted as two per multiply-add of every matrix product (norms, softmax and activations left out)."""

from __future__ import annotations

from collections.abc import Sequence

from duet_vlm.measure.shapes import DecoderShape, VisionShape


def decoder_layer_flops(shape: DecoderShape, rows: int, keys: int | None = None) -> int:
    """One decoder layer over ``rows`` new rows that see ``keys`` rows (default: themselves; attention counted without causal saving)."""
    keys = rows if keys is None else keys
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    projections = 2 * rows * shape.hidden * (2 * wide + 2 * narrow)
    attention = 4 * rows * keys * wide
    return projections + attention + 6 * rows * shape.hidden * shape.mlp


def scoring_flops(shape: DecoderShape, rows: int, queries: int) -> int:
    """Ranking before one drop: keys of every row, queries of the query rows, their products."""
    keys = 2 * rows * shape.hidden * shape.kv_heads * shape.head_dim
    return keys + 2 * queries * shape.hidden * shape.heads * shape.head_dim + 2 * queries * rows * shape.heads * shape.head_dim


def prefill_flops(shape: DecoderShape, rows_per_layer: Sequence[int], logits: int = 1) -> int:
    """A prompt through the decoder, ``rows_per_layer[l]`` rows entering layer l, and ``logits`` rows through the head."""
    return sum(decoder_layer_flops(shape, rows) for rows in rows_per_layer) + 2 * logits * shape.hidden * shape.vocab


def vision_flops(shape: VisionShape, tokens: int) -> int:
    """The vision tower for one image of ``tokens`` visual tokens (every layer is counted; stock towers run all of them)."""
    rows = tokens * shape.patches_per_token + shape.extra_rows
    per_layer = 8 * rows * shape.width**2 + 2 * shape.mlp_matrices * rows * shape.width * shape.mlp
    full = shape.layers if shape.full_layers is None else shape.full_layers
    window = rows if shape.window is None else min(rows, shape.window)
    attention = 4 * shape.width * rows * (full * rows + (shape.layers - full) * window)
    return shape.layers * per_layer + attention + 2 * tokens * shape.patches_per_token * shape.patch_inputs * shape.width


def projector_flops(shape: VisionShape, tokens: int) -> int:
    """The projector (or merger) over ``tokens`` rows."""
    return sum(2 * tokens * a * b for a, b in shape.projector)
