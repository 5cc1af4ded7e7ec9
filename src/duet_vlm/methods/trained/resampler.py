"""Resampler: learned queries that attend to the whole image, a baseline of trained compressors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from duet_vlm.methods.encoder.pool import places_of, windows_of
from duet_vlm.ops.ragged import gather_rows
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.compressor import Compressor, ModuleSizes, attended, check_heads
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register

LONGEST = 10_000.0  # of the waves that places are written in


@register("resampler")
@dataclass(frozen=True)
class Resampler(Compressor):
    """Resampler (baseline after Flamingo, arXiv 2204.14198, and Qwen-VL, arXiv 2308.12966): learned queries (trained).

    As many queries as tokens may enter attend to all tokens of an image, in one layer: the plain form of the resamplers
    of Flamingo and Qwen-VL. A query is one learned vector plus the encoding of its place, so one module serves any
    number of tokens; keys have their places added, too. Output tokens are evenly spaced over the image (at the
    positions that ``pool`` uses), and the trace records each as made of every token.

    Parameters beyond ``Compressor``
    ----------
    heads : int
        Attention heads.
    layers : int
        Blocks of attention and feed-forward, at least 1.

    Cost: two width x width products per token, and attention of output tokens x tokens, for each layer. Needs: the
    grid; no attention of the tower and no text. For training: new weights are random.

    Chosen here: two-dimensional sines for places, pre-norm blocks, a feed-forward of four times the width.
    """

    paper = "baseline (after Flamingo, arXiv 2204.14198, and Qwen-VL, arXiv 2308.12966)"
    summary = "trained: learned queries attend to the whole picture, before the decoder (baseline)"
    requires = frozenset({Input.FEATURES, Input.GRID})
    module_inputs: ClassVar[tuple[str, ...]] = ("heads", "layers")

    default_options = TokenOptions(crops="per_crop")
    heads: int = 8
    layers: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise ValueError(f"layers={self.layers}: at least 1")

    def module(self, sizes: ModuleSizes) -> nn.Module:
        check_heads(self.heads, sizes.rows, "rows")
        return ResamplerModule(sizes.rows, self.heads, self.layers)

    def select_tokens(self, view: EncoderView) -> Selection:
        grid_windows = windows_of(view)
        assert isinstance(view.module, ResamplerModule)
        features = view.require(Input.FEATURES)
        places = waves(places_of(view), features.shape[2])
        made = view.module(features, places, gather_rows(places, grid_windows.centre), view.valid)
        return of_all(grid_windows.centre, grid_windows.valid, view.valid, grid_windows.whole, made)

    def imitation_target(self, view: EncoderView, made: Selection) -> Tensor:
        """Means of windows as the target: means of all tokens would be the same for every output token."""
        return super().imitation_target(view, windows_of(view).selection())


def of_all(index: Tensor, there: Tensor, valid: Tensor, whole: Tensor, rows: Tensor) -> Selection:
    """Make a selection whose rows are each made of all tokens of their span.

    Parameters
    ----------
    index : Tensor
        [B, K] long, tokens whose positions the rows take.
    there : Tensor
        [B, K] bool, False for padding.
    valid : Tensor
        [B, N] bool, False for padding.
    whole : Tensor
        [B] bool, spans that are kept unchanged.
    rows : Tensor
        [B, K, C] rows made by a module.
    """
    count = index.shape[1]
    number, row = torch.arange(valid.shape[1], device=index.device), torch.arange(count, device=index.device)
    joins = there[:, :, None] & valid[:, None] & ~whole[:, None, None]
    into = torch.where(joins, row[:, None], -1).flatten(1)
    weights = (joins / valid.sum(1).clamp(min=1)[:, None, None]).flatten(1)
    return Selection(index, there, number.repeat(len(index), count), into, weights=weights, custom_rows=rows)


def waves(coords: Tensor, width: int) -> Tensor:
    """Encode grid places by sines and cosines.

    Parameters
    ----------
    coords : Tensor
        [..., 2] row and column.
    width : int
        Length of the encoding: half for rows, half for columns; the last numbers are 0 if 4 does not divide it.

    Returns
    -------
    Tensor
        [..., width] float32.
    """
    quarter = width // 4
    rate = LONGEST ** (-torch.arange(quarter, device=coords.device, dtype=torch.float32) / max(1, quarter))
    angle = coords.clamp(min=0)[..., None].float() * rate
    written = torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)
    return nn.functional.pad(written, (0, width - written.shape[-1]))


class ResamplerBlock(nn.Module):
    """Pre-norm attention to the image, then a feed-forward, both residual."""

    def __init__(self, rows: int, heads: int) -> None:
        super().__init__()
        self.query_norm, self.mlp_norm = nn.LayerNorm(rows), nn.LayerNorm(rows)
        self.attention = nn.MultiheadAttention(rows, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(rows, 4 * rows), nn.GELU(), nn.Linear(4 * rows, rows))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
        query = query + attended(self.attention, self.query_norm(query), key, value, hidden)
        made: Tensor = query + self.mlp(self.mlp_norm(query))
        return made


class ResamplerModule(nn.Module):
    """Trained module of ``Resampler``, of width ``rows``."""

    def __init__(self, rows: int, heads: int, layers: int) -> None:
        super().__init__()
        self.query = nn.Embedding(1, rows)
        self.norm, self.out = nn.LayerNorm(rows), nn.Linear(rows, rows)
        self.rounds = nn.ModuleList(ResamplerBlock(rows, heads) for _ in range(layers))

    def forward(self, features: Tensor, places: Tensor, standing: Tensor, valid: Tensor) -> Tensor:
        """Make output tokens from all tokens.

        Parameters
        ----------
        features : Tensor
            [B, N, C].
        places : Tensor
            [B, N, C] encoded places of the tokens.
        standing : Tensor
            [B, K, C] encoded places of the output tokens.
        valid : Tensor
            [B, N] bool, False for padding.

        Returns
        -------
        Tensor
            [B, K, C].
        """
        kind = self.query.weight.dtype
        value = self.norm(features.to(kind))
        key = value + places.to(kind)
        hidden = ~valid & valid.any(1, keepdim=True)
        rows = self.query.weight + standing.to(kind)
        for each in self.rounds:
            rows = each(rows, key, value, hidden)
        made: Tensor = self.out(rows)
        return made
