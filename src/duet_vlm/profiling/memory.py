"""Bytes at the peak of a prompt's pass, and of a whole request. Estimates from shapes; ``profiling.flop_counter``
measures the real ones."""

from __future__ import annotations

from collections.abc import Sequence

from duet_vlm.profiling.flops import tower_rows
from duet_vlm.profiling.kv import kv_bytes, kv_bytes_per_layer, rows_held, state_bytes
from duet_vlm.profiling.model_dims import DecoderDims, VisionDims
from duet_vlm.profiling.report import SampleCounts


def mlp_width(shape: DecoderDims, layer: int) -> int:
    """Inner width of a layer's MLP; all experts of a row together."""
    experts = shape.experts
    return (
        experts.active * experts.mlp + experts.shared if experts is not None and shape.has_experts(layer) else shape.mlp
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


def request_bytes(
    decoder: DecoderDims,
    vision: VisionDims,
    weights: int,
    sample: SampleCounts,
    new: int,
    element_bytes: int,
    *,
    cut: bool = False,
    batch: int = 1,
) -> float:
    """Bytes of ``weights`` numbers, and of ``batch`` equal requests where they need the most: in the tower, in the
    prompt's pass, or with the full cache of prompt and ``new`` tokens (the prompt gives the first of them); ``cut`` as
    in ``make_report``."""
    rows = [sample.text + sample.num_visual(layer) for layer in range(decoder.layers)]
    steps = max(0, new - 1)
    end = kv_bytes(decoder, [n + steps for n in rows_held(decoder, rows, cut)], element_bytes)
    patches = sum(tower_rows(vision, dict(stages).get(0, n)) for n, _, stages, _ in sample.in_tower())
    peak = max(
        prefill_peak_bytes(decoder, sample.text + sample.num_visual(-1), rows, sum(sample.spans), element_bytes),
        vision_peak_bytes(vision, patches, element_bytes),
        end + state_bytes(decoder, element_bytes),
    )
    return weights * element_bytes + batch * peak
