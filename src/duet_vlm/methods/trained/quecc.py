"""QueCC: a few queries conditional on the question, each attends to its own cell of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from duet_vlm.methods.encoder.pool import places_of, windows_of
from duet_vlm.ops.ragged import gather_rows
from duet_vlm.ops.windows import GridWindows, within
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.compressor import Compressor, ModuleSizes, attended, check_heads
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.encoder_view import Layer
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register

EPSILON = 1e-6  # of its norms
LEVELS = (12 / 24, 16 / 24, 22 / 24, None)  # of the tower's depth; None: where the features come from


@register("quecc")
@dataclass(frozen=True)
class QueCC(Compressor):
    """QueCC (ICLR 2025, arXiv 2411.03312): query-conditional convolution into a few tokens (trained).

    A depth-wise convolution makes one query for every cell of the image, from its tokens and the question; each query
    attends to the tokens of its cell, as seen by four layers of the tower. The question alone, without the image, runs
    through the decoder, and the hidden state of its last token is added to every visual token before the queries are
    made. Cells are those of ``pool``, so any number of tokens can be requested. Where a cell has ``kernel`` x
    ``kernel`` tokens this is the paper's convolution with that stride; over other cells the kernel is stretched, its
    sum kept. An output token has the position of the token in the middle of its cell.

    Parameters beyond ``Compressor``
    ----------
    heads : int
        Attention heads.
    kernel : int
        Rows and columns of the kernel, at least 1: 3 for 64 tokens of 24 x 24, 6 for 16.

    Cost: six linear layers on every token, two of them on the features of four tower layers; and the question runs
    through the decoder once more, which waits for the device once. Needs: the question, so the encoder cannot be called
    alone. For training: new weights are random; the gradient flows through the tower's layers and through the decoder's
    pass over the question.

    Differences from the released code: the question is all text after the last image (released: the text between a line
    break and "ASSISTANT"); any tower (released: CLIP-L); several images, crops and frames (released: refused).
    """

    paper = "QueCC, ICLR 2025, arXiv 2411.03312"
    summary = "trained: convolve the picture with the question into a few queries, each attends to its cell, before the decoder"
    requires = frozenset({Input.STATES, Input.FEATURES, Input.GRID, Input.QUESTION, Input.QUESTION_STATE})
    module_inputs: ClassVar[tuple[str, ...]] = ("heads", "kernel")

    default_options = TokenOptions(crops="per_crop")
    heads: int = 8
    kernel: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel < 1:
            raise ValueError(f"kernel={self.kernel}: a number of rows and columns, at least 1")

    @property
    def signal_layers(self) -> tuple[Layer, ...]:
        return (*LEVELS[:-1], self.options.signal_layer)

    def module(self, sizes: ModuleSizes) -> nn.Module:
        check_heads(self.heads, sizes.rows, "rows")
        return QueCCModule(sizes.rows, sizes.levels, sizes.decoder, self.heads, self.kernel)

    def select_tokens(self, view: EncoderView) -> Selection:
        grid_windows = windows_of(view)
        assert isinstance(view.module, QueCCModule)
        levels = torch.cat([view.require(Input.STATES, layer=number) for number in range(len(view.layers))], -1)
        features, state = view.require(Input.FEATURES), view.require(Input.QUESTION_STATE)
        return grid_windows.selection(
            view.module(features, levels, state, grid_windows, within(places_of(view), grid_windows))
        )


class QueCCModule(nn.Module):
    """Trained module of QueCC, with the parameter names of the released code.

    Parameters
    ----------
    rows : int
        Width of the features.
    levels : int
        Width of the features of all tower layers, concatenated.
    text : int
        Width of the question's hidden state.
    heads : int
        Attention heads.
    kernel : int
        Rows and columns of the convolution kernel.
    """

    def __init__(self, rows: int, levels: int, text: int, heads: int, kernel: int) -> None:
        super().__init__()
        self.text_projection = nn.Sequential(nn.Linear(text, rows), nn.LayerNorm(rows, eps=EPSILON))
        self.q_proj, self.k_proj, self.v_proj = (_twice(width, rows) for width in (rows, levels, levels))
        self.q_downsample = nn.Conv2d(rows, rows, kernel, stride=kernel, groups=rows)  # run cell by cell in ``queries``
        self.clip_attn = nn.MultiheadAttention(rows, heads, batch_first=True)

    def forward(self, features: Tensor, levels: Tensor, text: Tensor, cells: GridWindows, coords: Tensor) -> Tensor:
        """Make one token per cell.

        Parameters
        ----------
        features : Tensor
            [B, N, C] features.
        levels : Tensor
            [B, N, L] features of all tower layers, concatenated.
        text : Tensor
            [B, T] hidden state of the question.
        cells : GridWindows
            Cells.
        coords : Tensor
            [B, K, M, 2] position of each token in its cell, from -1 to 1.

        Returns
        -------
        Tensor
            [B, K, C].
        """
        kind = self.q_downsample.weight.dtype
        asking = features.to(kind) + self.text_projection(text.to(kind))[:, None]
        index, shape = cells.tokens.flatten(1), cells.tokens.shape
        query = self.queries(gather_rows(self.q_proj(asking), index).view(*shape, -1), cells.real, coords)
        key, value = (
            gather_rows(part(levels.to(kind)), index).view(shape[0] * shape[1], shape[2], -1)
            for part in (self.k_proj, self.v_proj)
        )
        hidden = ~cells.real.flatten(0, 1)
        hidden = hidden & ~hidden.all(1, keepdim=True)  # the output of padding cells is unused, but must be finite
        return attended(self.clip_attn, query.flatten(0, 1)[:, None], key, value, hidden).view(shape[0], shape[1], -1)

    def queries(self, rows: Tensor, real: Tensor, coords: Tensor) -> Tensor:
        """Convolve each cell into a query: rows [B, K, M, C], of which ``real`` [B, K, M] are valid -> [B, K, C]."""
        weight, bias = self.q_downsample.weight, self.q_downsample.bias
        assert bias is not None
        there = coords.to(weight.dtype).flip(-1).flatten(0, 2)[None, :, None]  # grid_sample counts across first
        kernel = nn.functional.grid_sample(weight.transpose(0, 1), there, padding_mode="border", align_corners=False)
        kernel = kernel[0, :, :, 0].T.view(*real.shape, -1) * real[..., None]
        sides = weight.shape[2] * weight.shape[3]
        return (rows * kernel).sum(2) * (sides / real.sum(2).clamp(min=1))[..., None] + bias


def _twice(width: int, rows: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, rows), nn.GELU(), nn.Linear(rows, rows), nn.LayerNorm(rows, eps=EPSILON))
