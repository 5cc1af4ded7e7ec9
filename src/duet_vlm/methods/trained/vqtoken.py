"""VQToken: video tokens as a few cluster means, refined by where and when each cluster occurs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from duet_vlm.methods.trained.resampler import of_all
from duet_vlm.ops.kmeans import cluster_sums, farthest_start, kmeans, means
from duet_vlm.ops.merge import shares, unit_rows
from duet_vlm.ops.ragged import pack_right
from duet_vlm.planning.budget import Keep
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.compressor import Compressor, ModuleSizes, attended, check_heads
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.utils.field_types import check_choice

FORMS = ("paper", "code", "codebook")
BINS = (4, 8, 8)  # of time (or crops), rows and columns, in which a cluster's places are told
WIDE = 2048  # feed-forward of the released module


@register("vqtoken")
@dataclass(frozen=True)
class VQToken(Compressor):
    """VQToken (NeurIPS 2025, arXiv 2503.16980): vector-quantised tokens with their places (trained).

    All projected tokens of an image or video are clustered by cosine (k-means), with as many clusters as tokens may
    enter. An output token is the mean of its cluster's unit vectors plus a term that a module computes from where and
    when the tokens of each cluster occur. Its position is that of the token most similar to the cluster's mean, and the
    trace records it as made of its cluster; in the paper's form attention mixes in other clusters, too.

    Parameters beyond ``Compressor``
    ----------
    form : str
        "paper": codebook vectors attend to each other, with values made of each cluster's places. "code": the released
        module, a decoder layer whose queries are made of the cluster numbers of each frame, repeated up to the number
        of output tokens; not fewer output tokens than frames, and towers of one input size only; each output token is
        made of every token. "codebook": the means alone, no weights.
    norms : bool
        Scale every output token of the paper's form to the mean norm of its members, which unit vectors have lost.
        Released: lost.
    frame : int or None
        Tokens of one frame, for the released module; None: of an image, where the tower fixes their number.
    heads : int
        Attention heads.
    rounds : int
        Rounds of k-means, at least 1; all are run, but converged centres do not move. Released: 50.

    Cost: a product of tokens by clusters for each round of k-means; the module is small, and the projector runs on
    every token. Needs: the grid; no attention and no text. For training: gradients flow through the means, not through
    the assignment.

    Differences from the released code: clusters start from farthest points, not from random ones, so that the result is
    deterministic. The paper's single flattened map of cluster numbers is replaced by one map per cluster, in 4 x 8 x 8
    bins, since cluster numbers are arbitrary and videos have any length (reconstruction). Untrained, the paper's form
    is the codebook.
    """

    paper = "VQToken, NeurIPS 2025, arXiv 2503.16980"
    summary = "trained: cluster means of the projected rows, and where each cluster occurs, before the decoder"
    requires = frozenset({Input.PROJECTED_FEATURES, Input.GRID})
    compares_frames = True
    module_inputs: ClassVar[tuple[str, ...]] = ("heads", "form", "frame")

    default_options = TokenOptions(crops="joint")
    form: str = "paper"
    norms: bool = True
    frame: int | None = None
    heads: int = 8
    rounds: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("form", self.form, FORMS)
        if self.frame is not None and self.frame < 1:
            raise ValueError(f"frame={self.frame}: a number of tokens, at least 1")
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds}: at least 1")

    @classmethod
    def official(cls, keep: Keep = 12) -> VQToken:
        """Return the released settings: the bare codebook with 12 tokens.

        The released code finds the number of clusters by an elbow rule over 12 to 32, which gives 12 nearly always and
        22 at the most (``duet_vlm.ops.kmeans.elbow``); here the number is known before the image is encoded.
        """
        return cls(keep=keep, form="codebook", norms=False, rounds=100)

    def module(self, sizes: ModuleSizes) -> nn.Module:
        if self.form == "codebook":
            return nn.Module()
        check_heads(self.heads, sizes.decoder, "rows")
        if self.form == "paper":
            return PlaceModule(sizes.decoder, self.heads)
        tokens = self.frame or sizes.tokens
        if tokens is None:
            raise ValueError(
                "form='code' reads maps of one size, and this model's pictures are of any: give frame= (tokens of one), or form='paper'"
            )
        return FrameModule(tokens, sizes.decoder, self.heads)

    def select_tokens(self, view: EncoderView) -> Selection:
        module = view.require_module()
        clusters = self._clusters(view)
        if self.form == "codebook":
            return clusters.selection(clusters.codebook)
        if isinstance(module, PlaceModule):
            made = module(clusters.codebook, self._occupied(view, clusters))
            return clusters.selection(made * clusters.length if self.norms else made)
        assert isinstance(module, FrameModule)
        return of_all(clusters.place, clusters.there, view.valid, clusters.whole, self._frames(view, clusters, module))

    def _clusters(self, view: EncoderView) -> TokenClusters:
        rows, valid, wanted = view.require(Input.FEATURES).float(), view.valid, view.dominant + view.contextual
        most = max(plan.entry for plan in view.plans)
        there = torch.arange(most, device=rows.device) < wanted[:, None]
        unit = unit_rows(rows)
        with torch.no_grad():
            labels, centres = kmeans(unit, valid, farthest_start(unit, valid, most), there, self.rounds)
            seed, labels = cluster_sums(unit, valid, labels, centres, there)
        whole = wanted >= valid.sum(1)
        seed = torch.where(whole[:, None], pack_right(valid, most)[0], seed)
        codebook = means(unit, labels, torch.zeros_like(centres))
        length = means(rows.norm(dim=-1, keepdim=True), labels, torch.zeros_like(centres[..., :1]))
        return TokenClusters(seed, there, labels, codebook, length, whole)

    def _occupied(self, view: EncoderView, clusters: TokenClusters) -> Tensor:
        """Share of each cluster's tokens in each bin: [B, K, bins]."""
        coords, size, _ = view.require(Input.GRID)
        time = view.require_parts().clamp(min=0)
        steps = time.amax(1, keepdim=True) + 1
        row, column = coords.clamp(min=0).unbind(-1)
        rows, columns = size[:, None].clamp(min=1).unbind(-1)
        bins = [
            (at * count // size).clamp(max=count - 1)
            for at, count, size in zip((time, row, column), BINS, (steps, rows, columns), strict=True)
        ]
        cell = (bins[0] * BINS[1] + bins[1]) * BINS[2] + bins[2]
        total, (batch, count) = BINS[0] * BINS[1] * BINS[2], clusters.place.shape
        slot = torch.where(clusters.labels < 0, count * total, clusters.labels * total + cell)
        counted = clusters.codebook.new_zeros(batch, count * total + 1).scatter_add(
            1, slot, torch.ones_like(slot, dtype=clusters.codebook.dtype)
        )
        counted = counted[:, :-1].view(batch, count, total)
        return counted / counted.sum(2, keepdim=True).clamp(min=1)

    def _frames(self, view: EncoderView, clusters: TokenClusters, module: FrameModule) -> Tensor:
        """Run the released module on each span's frames."""
        made, frames = [], [1] * len(view.plans)
        for number, plan in enumerate(view.plans):
            if plan.tokens % module.tokens:
                raise ValueError(
                    f"form='code' reads maps of {module.tokens} tokens, {plan.tokens} are no number of them: take form='paper'"
                )
            frames[number] = plan.tokens // module.tokens
            if frames[number] > plan.entry:
                raise ValueError(
                    f"form='code' makes a row for each of {frames[number]} frames, and {plan.entry} may enter: raise the budget or take form='paper'"
                )
            codes = clusters.codebook[number : number + 1, : plan.entry]
            maps = clusters.labels[number, : plan.tokens].view(1, frames[number], module.tokens)
            rows = module(maps, codes)
            made.append(nn.functional.pad(rows, (0, 0, 0, clusters.place.shape[1] - rows.shape[1])))
        return torch.cat(made)


@dataclass(frozen=True)
class TokenClusters:
    """B spans of N tokens in up to K clusters.

    Attributes
    ----------
    place : Tensor
        [B, K] long, the token whose position each cluster takes.
    there : Tensor
        [B, K] bool, False for padding.
    labels : Tensor
        [B, N] long, cluster of each token; -1 for padding.
    codebook : Tensor
        [B, K, C] means of unit vectors.
    length : Tensor
        [B, K, 1] means of norms.
    whole : Tensor
        [B] bool, spans with as many clusters as tokens.
    """

    place: Tensor
    there: Tensor
    labels: Tensor
    codebook: Tensor
    length: Tensor
    whole: Tensor

    def selection(self, rows: Tensor) -> Selection:
        numbers = torch.arange(self.labels.shape[1], device=self.labels.device).expand_as(self.labels)
        into = self.labels.masked_fill(self.whole[:, None], -1)
        return Selection(
            self.place, self.there, numbers, into, weights=shares(into, self.place.shape[1]), custom_rows=rows
        )


class PlaceModule(nn.Module):
    """Module of the paper's form: attention of codebook vectors with values made of places, then a feed-forward, both
    residual and zero at the start.
    """

    def __init__(self, rows: int, heads: int) -> None:
        super().__init__()
        self.places = nn.Sequential(nn.Linear(BINS[0] * BINS[1] * BINS[2], rows), nn.GELU(), nn.Linear(rows, rows))
        self.norm, self.mlp_norm = nn.LayerNorm(rows), nn.LayerNorm(rows)
        self.attention = nn.MultiheadAttention(rows, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(rows, 4 * rows), nn.GELU(), nn.Linear(4 * rows, rows))
        for last in (self.attention.out_proj, self.mlp[-1]):
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, codebook: Tensor, occupied: Tensor) -> Tensor:
        """Refine the codebook.

        Parameters
        ----------
        codebook : Tensor
            [B, K, C] means of unit vectors.
        occupied : Tensor
            [B, K, bins] share of each cluster's tokens in each bin.

        Returns
        -------
        Tensor
            [B, K, C].
        """
        kind = self.norm.weight.dtype
        rows, hidden = codebook.to(kind), occupied.sum(2) == 0
        hidden = hidden & ~hidden.all(1, keepdim=True)
        known = self.norm(rows)
        rows = rows + attended(self.attention, known, known, self.places(occupied.to(kind)), hidden)
        made: Tensor = rows + self.mlp(self.mlp_norm(rows))
        return made


class FrameModule(nn.Module):
    """Released module, with its parameter names: one decoder layer over the codebook, with maps of ``tokens`` cluster
    numbers as queries.
    """

    def __init__(self, tokens: int, rows: int, heads: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.to_q_proj = nn.Linear(tokens, rows)
        self.transformer_decoder = nn.Module()
        self.transformer_decoder.layers = nn.ModuleList(
            [nn.TransformerDecoderLayer(rows, heads, WIDE, dropout=0.0, batch_first=True)]
        )

    def forward(self, maps: Tensor, codebook: Tensor) -> Tensor:
        """Make output tokens from maps and codebook; the shorter of the two is repeated cyclically.

        Parameters
        ----------
        maps : Tensor
            [B, T, tokens] cluster numbers of each frame.
        codebook : Tensor
            [B, K, C].

        Returns
        -------
        Tensor
            [B, max(T, K), C].
        """
        kind = self.to_q_proj.weight.dtype
        query, codes = self.to_q_proj(maps.to(kind)), codebook.to(kind)
        count = max(query.shape[1], codes.shape[1])
        query, codes = (each[:, torch.arange(count, device=each.device) % each.shape[1]] for each in (query, codes))
        layers: nn.ModuleList = self.transformer_decoder.layers  # type: ignore[assignment]
        for layer in layers:
            query = layer(query, codes)
        return query
