"""QueCC: few queries that hold the question, each of which attends to its own cell of the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from duet_vlm.methods.pool import places_of, windows_of
from duet_vlm.ops.ragged import gather_rows
from duet_vlm.ops.windows import GridWindows, within
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.compressor import Compressor, ModuleSizes, attended, check_heads
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.encoder_view import Layer
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.registry import register

EPSILON = 1e-6  # of its norms
LEVELS = (12 / 24, 16 / 24, 22 / 24, None)  # of the tower's depth; None: where the features come from


@register("quecc")
@dataclass(frozen=True)
class QueCC(Compressor):
    """A depth-wise convolution makes one query for every cell of the picture, of its tokens and of the question; each query attends to the tokens of
    its cell, as four layers of the tower see them.

    The question is read by the decoder alone, without the picture, and its last word's state is added to every token in front of the queries. Cells
    are those of ``pool``, so any number of rows can be asked for. Where a cell has ``kernel`` x ``kernel`` tokens this is the paper's convolution
    with that stride; over other cells the kernel is stretched, its sum kept. A row stands where the token in the middle of its cell stood.

    Parameters beyond ``Compressor``
    ----------
    heads : int
        Of the attention.
    kernel : int
        Rows and columns of the kernel: 3 for 64 rows of 24 x 24 tokens, 6 for 16.

    Cost: six maps of every token, two of them from four layers of the tower; and the question goes through the decoder once by itself, which is one
    more read of the device. Needs the question, so the encoder cannot be called by itself. For training: new weights are
    random; the gradient goes through the tower's layers and through the decoder's reading of the question.

    Differences to the released code: the question is all text behind the last picture (there: what stands between a line break and "ASSISTANT");
    any tower (there: CLIP-L); several images, crops and frames (there: refused).
    """

    paper = "QueCC, ICLR 2025, arXiv 2411.03312"
    summary = "trained: convolve the picture with the question into a few queries, each attends to its cell, before the decoder"
    requires = frozenset({Input.STATES, Input.FEATURES, Input.GRID, Input.QUESTION, Input.QUESTION_STATE})
    module_inputs: ClassVar[tuple[str, ...]] = ("heads", "kernel")

    crops: str = "per_crop"
    heads: int = 8
    kernel: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel < 1:
            raise ValueError(f"kernel={self.kernel}: a number of rows and columns, at least 1")

    @property
    def signal_layers(self) -> tuple[Layer, ...]:
        return (*LEVELS[:-1], self.signal_layer)

    def module(self, sizes: ModuleSizes) -> nn.Module:
        check_heads(self.heads, sizes.rows, "rows")
        return QueCCModule(sizes.rows, sizes.levels, sizes.decoder, self.heads, self.kernel)

    def select_tokens(self, view: EncoderView) -> Selection:
        found = windows_of(view)
        assert isinstance(view.module, QueCCModule)
        levels = torch.cat([view.require(Input.STATES, layer=number) for number in range(len(view.layers))], -1)
        features, state = view.require(Input.FEATURES), view.require(Input.QUESTION_STATE)
        return found.selection(view.module(features, levels, state, found, within(places_of(view), found)))


class QueCCModule(nn.Module):
    """The module, named as in the released code; ``rows`` wide, reading levels that are ``levels`` wide together and a text state of ``text``."""

    def __init__(self, rows: int, levels: int, text: int, heads: int, kernel: int) -> None:
        super().__init__()
        self.text_projection = nn.Sequential(nn.Linear(text, rows), nn.LayerNorm(rows, eps=EPSILON))
        self.q_proj, self.k_proj, self.v_proj = (_twice(width, rows) for width in (rows, levels, levels))
        self.q_downsample = nn.Conv2d(rows, rows, kernel, stride=kernel, groups=rows)  # run cell by cell in ``queries``
        self.clip_attn = nn.MultiheadAttention(rows, heads, batch_first=True)

    def forward(self, features: Tensor, levels: Tensor, text: Tensor, cells: GridWindows, place: Tensor) -> Tensor:
        """features [B, N, C], levels [B, N, L], text [B, T], where in its cell each token stands [B, K, M, 2] -> rows [B, K, C]."""
        kind = self.q_downsample.weight.dtype
        asking = features.to(kind) + self.text_projection(text.to(kind))[:, None]
        index, shape = cells.tokens.flatten(1), cells.tokens.shape
        query = self.queries(gather_rows(self.q_proj(asking), index).view(*shape, -1), cells.real, place)
        key, value = (gather_rows(part(levels.to(kind)), index).view(shape[0] * shape[1], shape[2], -1) for part in (self.k_proj, self.v_proj))
        hidden = ~cells.real.flatten(0, 1)
        hidden = hidden & ~hidden.all(1, keepdim=True)  # cells that are not there: nobody reads what comes out, but it has to be a number
        return attended(self.clip_attn, query.flatten(0, 1)[:, None], key, value, hidden).view(shape[0], shape[1], -1)

    def queries(self, rows: Tensor, real: Tensor, place: Tensor) -> Tensor:
        """The convolution of each cell: rows [B, K, M, C], of which ``real`` are there -> [B, K, C]."""
        weight, bias = self.q_downsample.weight, self.q_downsample.bias
        assert bias is not None
        there = place.to(weight.dtype).flip(-1).flatten(0, 2)[None, :, None]  # grid_sample counts across first
        kernel = nn.functional.grid_sample(weight.transpose(0, 1), there, padding_mode="border", align_corners=False)
        kernel = kernel[0, :, :, 0].T.view(*real.shape, -1) * real[..., None]
        sides = weight.shape[2] * weight.shape[3]
        return (rows * kernel).sum(2) * (sides / real.sum(2).clamp(min=1))[..., None] + bias


def _twice(width: int, rows: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, rows), nn.GELU(), nn.Linear(rows, rows), nn.LayerNorm(rows, eps=EPSILON))
