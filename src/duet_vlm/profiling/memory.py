"""Bytes of the weights, and at the peak of a prompt's pass. Estimates from shapes; ``profiling.flop_counter`` measures
the real ones."""

from __future__ import annotations

from collections.abc import Sequence

from duet_vlm.profiling.kv import kv_bytes_per_layer, state_bytes
from duet_vlm.profiling.model_dims import LINEAR, DecoderDims, VisionDims


def layer_weights(shape: DecoderDims, layer: int, rows: int | None = None) -> float:
    """Number of weights of one decoder layer; with ``rows``, of the experts only those that this many rows are expected
    to visit.

    Rows are taken to choose experts evenly and independently: an expert is not visited with probability (1 - active /
    count) ** rows.
    """
    linear, experts = shape.linear, shape.experts
    if shape.kind(layer) == LINEAR and linear is not None:
        values = linear.value_heads * linear.value_dim
        mixing = shape.hidden * (linear.mixed + 2 * values + 2 * linear.value_heads) + linear.mixed * linear.kernel
    else:
        mixing = shape.hidden * (shape.query_width + shape.wide + 2 * shape.narrow)
    if experts is None or not shape.has_experts(layer):
        return mixing + 3 * shape.hidden * shape.mlp
    visited = experts.count * (1.0 if rows is None else 1 - (1 - experts.active / experts.count) ** rows)
    return mixing + shape.hidden * (experts.count + 3 * (visited * experts.mlp + experts.shared))


def mlp_width(shape: DecoderDims, layer: int) -> int:
    """Inner width of a layer's MLP; all experts of a row together."""
    experts = shape.experts
    return (
        experts.active * experts.mlp + experts.shared if experts is not None and shape.has_experts(layer) else shape.mlp
    )


def decoder_weights(shape: DecoderDims) -> int:
    """Number of weights of the decoder's maps, its embeddings and its head."""
    return round(sum(layer_weights(shape, layer) for layer in range(shape.layers))) + shape.hidden * shape.vocab * (
        2 - shape.tied
    )


def vision_weights(shape: VisionDims, towers: int = 1) -> int:
    """Number of weights of the projector and of ``towers`` towers: one by default, as an image passes through one."""
    per_layer = 4 * shape.width**2 + shape.mlp_matrices * shape.width * shape.mlp
    return towers * (shape.layers * per_layer + shape.patch_inputs * shape.width) + sum(
        a * b for a, b in shape.projector
    )


def vision_peak_bytes(shape: VisionDims, rows: int, element_bytes: int) -> int:
    """Activations at the widest point of the tower, the MLP of a layer over ``rows`` patches: its inputs, its inner
    activations, and the hidden states around it."""
    return rows * (4 * shape.width + max(2, shape.mlp_matrices) * shape.mlp) * element_bytes


def prefill_peak_bytes(
    shape: DecoderDims, entry: int, rows_per_layer: Sequence[int], tokens: int, element_bytes: int
) -> int:
    """Activations and cache at the peak of one prompt's pass through the decoder.

    In layer l: the cache of the layers so far, ``rows_per_layer[l]`` rows in the MLP (gate, up and their product, the
    residual stream and its norm) or in attention (queries, keys, values, and their rotated copies), and, held by the
    callers, the embeddings of the ``entry`` rows and the features of ``tokens`` visual tokens, twice each.
    """
    embeddings = 2 * (entry + tokens) * shape.hidden
    cache, peak = state_bytes(shape, element_bytes), 0
    for layer, (rows, layer_cache) in enumerate(
        zip(rows_per_layer, kv_bytes_per_layer(shape, rows_per_layer, element_bytes), strict=True)
    ):
        cache += layer_cache
        # one for each expert
        copies = shape.experts.active * shape.hidden if shape.experts is not None and shape.has_experts(layer) else 0
        activations = max(3 * (mlp_width(shape, layer) + copies), shape.query_width + 4 * shape.wide + 2 * shape.narrow)
        peak = max(peak, cache + (embeddings + rows * (activations + 3 * shape.hidden)) * element_bytes)
    return peak
