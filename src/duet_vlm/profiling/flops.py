"""Floating-point operations, counted as two per multiply-add of every matrix product (norms, softmax and activations
not counted).

Attention is counted as the whole rectangle of queries by keys, as ``torch.utils.flop_counter`` counts it: the part that
a causal or windowed kernel skips is not taken off. ``profiling.flop_counter`` measures the count that these predictions
are tested against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from duet_vlm.planning.budget import TowerStages
from duet_vlm.profiling.model_dims import LINEAR, DecoderDims, VisionDims

Grid = tuple[int, int] | None
# of a picture: patches that become no token, and patches of padding around it, which are embedded and go no further
Spare = tuple[int, int]


def decoder_layer_flops(shape: DecoderDims, rows: int, keys: int | None = None, layer: int = 0) -> int:
    """One decoder layer over ``rows`` new rows that attend to ``keys`` rows (default: themselves)."""
    keys = rows if keys is None else keys
    mixing = linear_attention_flops(shape, rows) if shape.kind(layer) == LINEAR else _attention_flops(shape, rows, keys)
    return mixing + mlp_flops(shape, rows, layer)


def _attention_flops(shape: DecoderDims, rows: int, keys: int) -> int:
    return 2 * rows * shape.hidden * (shape.query_width + shape.wide + 2 * shape.narrow) + 4 * rows * keys * shape.wide


def linear_attention_flops(shape: DecoderDims, rows: int) -> int:
    """A gated delta rule: projections, convolution, and the products with and within chunks (the triangular solves are
    not counted).

    A single row updates the state number by number, without a product.
    """
    linear = shape.linear
    assert linear is not None  # a layer of this kind has one
    values = linear.value_heads * linear.value_dim
    maps = (
        2 * rows * shape.hidden * (linear.mixed + 2 * values + 2 * linear.value_heads)
        + 2 * rows * linear.mixed * linear.kernel
    )
    if rows == 1:
        return maps
    padded = math.ceil(rows / linear.chunk) * linear.chunk
    within = 2 * padded * linear.chunk * linear.value_heads * (2 * linear.key_dim + linear.value_dim)
    return maps + within + 6 * padded * values * linear.key_dim


def mlp_flops(shape: DecoderDims, rows: int, layer: int = 0) -> int:
    """The MLP, or the router and the experts that each row visits."""
    if not shape.has_experts(layer):
        return 6 * rows * shape.hidden * shape.mlp
    experts = shape.experts
    assert experts is not None
    return 2 * rows * shape.hidden * (experts.count + 3 * (experts.active * experts.mlp + experts.shared))


def scoring_flops(
    shape: DecoderDims, rows: int, queries: int, reused: int = 0, products: bool = True, layer: int | None = None
) -> int:
    """Ranking before one drop: keys of every row, queries of the query rows, their products (unless ``products`` is
    False).

    ``reused`` of the keys serve the layer, too. If ``layer`` (None: one with attention) has a state, the cost of its
    scores.
    """
    linear = shape.linear
    if layer is not None and linear is not None and shape.kind(layer) == LINEAR:
        keys = linear.key_heads * linear.key_dim
        projections = 2 * rows * shape.hidden * (linear.mixed + linear.value_heads) + 4 * rows * keys * linear.kernel
        return projections + 2 * queries * rows * keys * products
    projections = 2 * (rows - reused) * shape.hidden * shape.narrow + 2 * queries * shape.hidden * shape.query_width
    return projections + 2 * queries * rows * shape.wide * products


def probe_flops(shape: DecoderDims, rows: int, layer: int, predicted: int) -> int:
    """A gradient of ``rows`` rows through one layer with attention, and of ``predicted`` of them through the head:
    forward, and backward to the rows alone (a linear map costs once more, attention two and a half times)."""
    attention = 4 * rows * rows * shape.wide
    return (
        2 * (decoder_layer_flops(shape, rows, layer=layer) - attention)
        + attention * 7 // 2
        + 2 * head_flops(shape, predicted)
    )


def head_flops(shape: DecoderDims, rows: int) -> int:
    return 2 * rows * shape.hidden * shape.vocab


def prefill_flops(shape: DecoderDims, rows_per_layer: Sequence[int], logits: int = 1) -> int:
    """A prompt through the decoder, ``rows_per_layer[l]`` rows entering layer l, and ``logits`` rows through the
    head."""
    return sum(decoder_layer_flops(shape, rows, layer=i) for i, rows in enumerate(rows_per_layer)) + head_flops(
        shape, logits
    )


def tower_rows(shape: VisionDims, tokens: int) -> int:
    return tokens * shape.patches_per_token + shape.extra_rows


def tower_flops(shape: VisionDims, parts: Sequence[tuple[int, Grid, TowerStages, Spare]]) -> int:
    """The vision tower over the ``parts`` of a call: tokens, grid, stages and spare patches of each, as
    ``vision_flops`` takes them.

    Further mergers count with the tokens they get beyond those of the last one; concatenated images with the attention
    between them.
    """
    total = sum(vision_flops(shape, *part) for part in parts)
    mergers = 1 + len(shape.deeper)
    one = sum(2 * a * b for a, b in shape.projector[: len(shape.projector) // mergers])
    for tokens, _, stages, _ in parts:
        total += one * sum(
            _left_after(tokens, stages, after) - _left_after(tokens, stages, shape.layers) for after in shape.deeper
        )
    if shape.joined:
        for layer in range(shape.layers):
            rows = [
                tower_rows(shape, _left_after(n, stages, layer)) + spare[0] * (not stages)
                for n, _, stages, spare in parts
            ]
            total += 4 * shape.width * (sum(rows) ** 2 - sum(n * n for n in rows))
    return total


def _left_after(tokens: int, stages: TowerStages, blocks: int) -> int:
    """Tokens kept once the attention of ``blocks`` blocks has run."""
    return next((kept for after, kept in reversed(stages) if after <= blocks), tokens)


def vision_flops(
    shape: VisionDims, tokens: int, grid: Grid = None, stages: TowerStages = (), spare: Spare = (0, 0)
) -> int:
    """The vision tower over one image, crop or frame of ``tokens`` visual tokens (every layer is counted; stock towers
    run all of them).

    ``grid`` (rows, columns) of its tokens tells which windows at the border are not full; without it every window is
    taken as full. ``stages``: number of blocks whose attention has run at a drop, and tokens kept by it, evenly over
    the windows; all are embedded. ``spare`` patches pass through a tower without drops.
    """
    spare_rows, total = 0 if stages else spare[0], 0
    all_rows = tower_rows(shape, tokens) + spare_rows
    windowed = _windowed(shape, all_rows, grid)
    full = shape.layers if shape.full_layers is None else shape.full_layers
    for begin, end, attending, kept in stretches(shape, tokens, stages):
        layers, rows = end - begin, tower_rows(shape, attending) + spare_rows
        global_layers = share_of(full, begin, end, shape.layers)
        attention = (
            4
            * shape.width
            * (global_layers * rows**2 + (layers - global_layers) * round(windowed * (rows / all_rows) ** 2))
        )
        total += layers * (8 * rows * shape.width**2) + attention
        total += (
            2
            * shape.mlp_matrices
            * shape.width
            * shape.mlp
            * ((layers - 1) * rows + tower_rows(shape, kept) + spare_rows)
        )
    return total + patch_flops(shape, tokens, sum(spare))


def stretches(shape: VisionDims, tokens: int, stages: TowerStages) -> list[tuple[int, int, int, int]]:
    """Runs of blocks over equally many tokens: first and end block, the tokens, and those that reach the last block's
    MLP."""
    current, begin, runs = tokens, 0, []
    for after, kept in (*stages, (shape.layers, None)):
        if min(after, shape.layers) > begin:
            runs.append((begin, min(after, shape.layers), current, current if kept is None else kept))
        begin, current = max(begin, after), current if kept is None else kept
    return runs


def mean_rows(shape: VisionDims, tokens: int, grid: Grid, stages: TowerStages) -> float:
    """Rows that a block of the tower attends over, mean over the blocks."""
    return (
        sum((end - begin) * tower_rows(shape, count) for begin, end, count, _ in stretches(shape, tokens, stages))
        / shape.layers
    )


def share_of(full: int, begin: int, end: int, layers: int) -> int:
    """Number of blocks from ``begin`` to ``end`` that attend to whole images, where ``full`` of all do, evenly spread
    and the last one."""
    return full * end // layers - full * begin // layers


def patch_flops(shape: VisionDims, tokens: int, more: int = 0) -> int:
    """The patch embedding of the tokens' patches and of ``more`` others."""
    return 2 * (tokens * shape.patches_per_token + more) * shape.patch_inputs * shape.width


def _windowed(shape: VisionDims, rows: int, grid: Grid) -> int:
    """Pairs of patches that share a window."""
    if shape.window is None:
        return rows * rows
    if grid is None:
        return rows * min(rows, shape.window)
    side = math.isqrt(shape.window // shape.patches_per_token)
    high, wide = (sum(n * n for n in _pieces(size, side)) for size in grid)
    return high * wide * shape.patches_per_token**2


def _pieces(size: int, side: int) -> list[int]:
    """``size`` cut into pieces of ``side``, the last one shorter."""
    count, rest = divmod(size, side)
    return [side] * count + [rest] * bool(rest)


def projector_flops(shape: VisionDims, tokens: int) -> int:
    """The projector (or merger) over ``tokens`` rows."""
    return sum(2 * tokens * a * b for a, b in shape.projector)


def signal_flops(shape: VisionDims, tokens: int, queries: int | None = None, heads: int = 0, more: int = 0) -> int:
    """Attention scores of one tower layer over one image: of its CLS row, or without one of ``queries`` rows (None: of
    every one), whose ``heads`` are then added up as a product. ``more``: patches of the image that become no token."""
    rows = tower_rows(shape, tokens) + more
    return 2 * query_rows(shape, rows, queries) * rows * (shape.width + heads * (shape.extra_rows == 0))


def query_rows(shape: VisionDims, rows: int, queries: int | None) -> int:
    """Number of a tower's ``rows`` that are queries of a ranking."""
    return shape.extra_rows or min(rows, queries or rows)
