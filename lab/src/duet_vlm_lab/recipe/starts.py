"""Starting points that replace thousands of steps.

Tower: whitened cosine patch filters, loud 2-D position waves, and three layers that begin as a convolution (attention
to fixed neighbours). Decoder: content matching in the early layers, nearly nothing in the late ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import CLIPVisionModel, LlamaModel

from duet_vlm.evaluation.tiny.network import HEAD_SIZE, HEADS, WIDTH
from duet_vlm.evaluation.tiny.scenes import GRID, PATCH

POSITION_GAIN = 0.6  # as loud as the patch content; at the usual 0.02 the tower cannot tell rows apart for a long time
NEIGHBOUR_GAIN = 1.8
NEIGHBOURS = (
    ((0, 1), (0, -1), (1, 0), (-1, 0)),
    ((1, 1), (1, -1), (-1, 1), (-1, -1)),
    ((0, 2), (0, -2), (2, 0), (-2, 0)),
)
LOOKUP_LAYERS = 6


def _frequencies() -> Tensor:
    return torch.linspace(0.1, 3.0, WIDTH // 4)


def position_waves() -> Tensor:
    """(256, WIDTH): sine and cosine pairs of the row in the first half, of the column in the second."""
    angle = torch.arange(float(GRID))[:, None] * _frequencies()
    one = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
    rows, columns = one[:, None].expand(-1, GRID, -1), one[None].expand(GRID, -1, -1)
    return torch.cat([rows, columns], -1).reshape(GRID * GRID, WIDTH)


def cosine_filters() -> Tensor:
    """(WIDTH, 3, 14, 14): low-frequency cosine patterns, 64 of luminance and 32 of each of two colour axes."""
    x = (torch.arange(float(PATCH)) + 0.5) * math.pi / PATCH
    waves = sorted(((u, v) for u in range(10) for v in range(10)), key=lambda w: w[0] ** 2 + w[1] ** 2)
    filters = []
    for axis, n, gain in (((1, 1, 1), 64, 1.0), ((1, 0, -1), 32, 2.0), ((1, -2, 1), 32, 2.0)):
        color = torch.tensor(axis).float()
        color = color / color.norm()
        for u, v in waves[:n]:
            pattern = torch.outer(torch.cos(u * x), torch.cos(v * x))
            # pictures have less energy up there
            pattern = pattern / pattern.norm() * (1 + u * u + v * v) ** 0.5 / PATCH * gain
            filters.append(color[:, None, None] * pattern)
    return torch.stack(filters)


def _neighbour_projections(offsets: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
    """Query and key weights with which head h looks ``offsets[h]`` away: sin(w(r+d)) written out in sin(wr) and
    cos(wr)."""
    query, key = torch.zeros(WIDTH, WIDTH), torch.zeros(WIDTH, WIDTH)
    freq = _frequencies()
    for head, offset in enumerate(offsets):
        row = head * HEAD_SIZE
        for axis, step in enumerate(offset):
            for i in range(head, WIDTH // 4, HEADS):
                column = axis * WIDTH // 2 + 2 * i
                turn = float(freq[i]) * step
                query[row, column], query[row, column + 1] = math.cos(turn), math.sin(turn)
                query[row + 1, column + 1], query[row + 1, column] = math.cos(turn), -math.sin(turn)
                key[row, column] = key[row + 1, column + 1] = 1
                row += 2
    return query, key


@torch.no_grad()
def start_tower(tower: CLIPVisionModel, rng: torch.Generator) -> None:
    """Set the start of the vision tower in place."""
    tower.embeddings.patch_embedding.weight.copy_(cosine_filters())
    tower.embeddings.position_embedding.weight[1:] = position_waves() * POSITION_GAIN
    for layer, offsets in zip(tower.encoder.layers, NEIGHBOURS, strict=False):
        query, key = _neighbour_projections(offsets)
        for linear, weight in ((layer.self_attn.q_proj, query), (layer.self_attn.k_proj, key)):
            linear.weight.copy_(weight * NEIGHBOUR_GAIN + 0.02 * torch.randn(WIDTH, WIDTH, generator=rng))


@torch.no_grad()
def start_decoder(decoder: LlamaModel, rng: torch.Generator) -> None:
    """Set the start of the decoder in place.

    Query and key are one projection, strong on the slowly turning rotary pairs, so attention begins as "look at what
    resembles me"; value and output begin as a copy. Layers after the look-up ones add almost nothing at first.
    """
    decoder.embed_tokens.weight.normal_(std=0.15, generator=rng)
    pairs = torch.full((HEAD_SIZE,), 0.3)
    pairs[HEAD_SIZE // 4 - 1 : HEAD_SIZE // 2] = 1
    pairs[3 * HEAD_SIZE // 4 - 1 :] = 1
    strength = (0.5, 0.7, 1.0, 1.0, 0.9, 0.7)
    for i, layer in enumerate(decoder.layers):
        early = i < LOOKUP_LAYERS
        match = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=rng))[0] * pairs.repeat(HEADS)[:, None]
        gain = 1.6 * (strength[i] if early else 0.7)
        copy = torch.eye(WIDTH)
        starts = {
            "q_proj": match * gain,
            "k_proj": match * gain,
            "v_proj": 0.6 * copy,
            "o_proj": (0.6 if early else 0.1) * copy,
        }
        for name, weight in starts.items():
            getattr(layer.self_attn, name).weight.copy_(weight + 0.02 * torch.randn(WIDTH, WIDTH, generator=rng))
        if not early:
            layer.mlp.down_proj.weight.mul_(0.2)
