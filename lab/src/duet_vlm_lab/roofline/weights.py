"""Number of weights of a model's parts, from its sizes."""

from __future__ import annotations

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
