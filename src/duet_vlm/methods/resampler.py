"""A resampler: learned queries that attend to the whole picture, the other baseline of trained compressors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from duet_vlm.methods.pool import places_of, windows_of
from duet_vlm.ops.ragged import gather_rows
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.compressor import Compressor, ModuleSizes, attended, check_heads
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.registry import register

LONGEST = 10_000.0  # of the waves that places are written in


@register("resampler")
@dataclass(frozen=True)
class Resampler(Compressor):
    """As many queries as rows may enter attend to all tokens of a picture, in one layer: the plain form of the resamplers of Flamingo and Qwen-VL.

    A query is one learned vector plus the place of its row, so one module serves any number of rows; keys have their places added, too. Rows stand
    evenly spaced over the picture (where ``pool`` would put them), and every row is made of every token: that is what the trace says.

    Parameters beyond ``Compressor``
    ----------
    heads : int
        Of the attention.
    layers : int
        Rounds of attention and feed-forward.

    Cost: two maps of the rows' square per token, and attention of rows by tokens, for each layer. Needs nothing of the tower or of the text. For
    training: new weights are random. Chosen here: two-dimensional sines for places, norms in front, a feed-forward of four times the width.
    """

    paper = "baseline (after Flamingo, arXiv 2204.14198, and Qwen-VL, arXiv 2308.12966)"
    summary = "trained: learned queries attend to the whole picture, before the decoder (baseline)"
    requires = frozenset({Input.FEATURES, Input.GRID})
    module_inputs: ClassVar[tuple[str, ...]] = ("heads", "layers")

    crops: str = "per_crop"
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
        found = windows_of(view)
        assert isinstance(view.module, ResamplerModule)
        features = view.require(Input.FEATURES)
        places = waves(places_of(view), features.shape[2])
        made = view.module(features, places, gather_rows(places, found.centre), view.valid)
        return of_all(found.centre, found.valid, view.valid, found.whole, made)

    def imitation_target(self, view: EncoderView, made: Selection) -> Tensor:
        """The means of windows: those of all tokens would be one and the same for every row."""
        return super().imitation_target(view, windows_of(view).selection())


def of_all(index: Tensor, there: Tensor, valid: Tensor, whole: Tensor, rows: Tensor) -> Selection:
    """Rows [B, K, C] that stand at tokens ``index`` [B, K], of which ``there`` are, each made of all ``valid`` tokens [B, N]; spans that are kept
    ``whole`` stay as they are."""
    count = index.shape[1]
    number, row = torch.arange(valid.shape[1], device=index.device), torch.arange(count, device=index.device)
    joins = there[:, :, None] & valid[:, None] & ~whole[:, None, None]
    into = torch.where(joins, row[:, None], -1).flatten(1)
    weights = (joins / valid.sum(1).clamp(min=1)[:, None, None]).flatten(1)
    return Selection(index, there, number.repeat(len(index), count), into, weights=weights, custom_rows=rows)


def waves(place: Tensor, width: int) -> Tensor:
    """Rows and columns [..., 2] as sines and cosines of ``width`` numbers [..., width]: half of them for either, the last ones 0 where 4 does not
    divide the width."""
    quarter = width // 4
    rate = LONGEST ** (-torch.arange(quarter, device=place.device, dtype=torch.float32) / max(1, quarter))
    angle = place.clamp(min=0)[..., None].float() * rate
    written = torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)
    return nn.functional.pad(written, (0, width - written.shape[-1]))


class ResamplerBlock(nn.Module):
    """Attention to the picture, then a feed-forward, each behind a norm and beside what it is given."""

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
    """The module: ``rows`` wide."""

    def __init__(self, rows: int, heads: int, layers: int) -> None:
        super().__init__()
        self.query = nn.Embedding(1, rows)
        self.norm, self.out = nn.LayerNorm(rows), nn.Linear(rows, rows)
        self.rounds = nn.ModuleList(ResamplerBlock(rows, heads) for _ in range(layers))

    def forward(self, features: Tensor, places: Tensor, standing: Tensor, valid: Tensor) -> Tensor:
        """features and their places [B, N, C], of which ``valid`` [B, N] are there, the places of the rows [B, K, C] -> rows [B, K, C]."""
        kind = self.query.weight.dtype
        value = self.norm(features.to(kind))
        key = value + places.to(kind)
        hidden = ~valid & valid.any(1, keepdim=True)
        rows = self.query.weight + standing.to(kind)
        for each in self.rounds:
            rows = each(rows, key, value, hidden)
        made: Tensor = self.out(rows)
        return made
