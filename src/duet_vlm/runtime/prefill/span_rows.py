"""Visual rows of samples laid out by span (image or clip), so that each span can be ranked by itself, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from duet_vlm.ops.ragged import upload
from duet_vlm.planning.tokens import Selection


@dataclass(frozen=True)
class SpanRows:
    """Row numbers of each of S spans in tensors [B, V], whose spans follow each other within a sample, padded on the
    right.

    Attributes
    ----------
    index : Tensor
        [S, W] long, numbers of the flattened [B * V] rows, W the most rows of a span; those that are not valid point at
        row 0.
    valid : Tensor
        [S, W] bool.
    batch, width : int
        B and V.
    owners : tuple of int
        The sample of each span.
    """

    index: Tensor
    valid: Tensor
    batch: int
    width: int
    owners: tuple[int, ...] = ()

    @classmethod
    def of(cls, alive: Sequence[Sequence[int]], width: int, device: torch.device) -> SpanRows:
        """From the rows that each span of each sample has, known on the host; spans are numbered in the order of the
        batch.

        Two numbers per span are moved to ``device``, once; nothing is read back.
        """
        sizes = [rows for sample in alive for rows in sample]
        starts = [
            number * width + sum(sample[:before])
            for number, sample in enumerate(alive)
            for before in range(len(sample))
        ]
        start, size = upload([starts, sizes], device, torch.long)[..., None]
        column = torch.arange(max(sizes, default=0), device=device)
        valid = column < size
        owners = tuple(sample for sample, spans in enumerate(alive) for _ in spans)
        return cls(torch.where(valid, start + column, 0), valid, len(alive), width, owners)

    def take(self, x: Tensor) -> Tensor:
        """[B, V, ...] -> [S, W, ...]; what is not valid holds any row."""
        return x.flatten(0, 1)[self.index]

    def put(self, mask: Tensor) -> Tensor:
        """A mask of rows by span [S, W] bool as one by sample: [B, V] bool, False where no span has a row."""
        flat = mask.new_zeros(self.batch * self.width + 1)  # the last one collects what is not valid
        index = self.index.masked_fill(~self.valid, self.batch * self.width)
        return flat.scatter_(0, index.flatten(), (mask & self.valid).flatten())[:-1].view(self.batch, self.width)

    def join(self, selection: Selection, counts: Sequence[int]) -> Selection:
        """A selection by span, of ``counts`` rows each, as one by sample, spans after each other: columns [S, W] become
        those of [B, V]."""
        before, nth, total = [], [], [0] * self.batch
        for number, sample in enumerate(self.owners):
            before.append(total[sample])
            nth.append(self.owners[:number].count(sample))
            total[sample] += counts[number]
        most, members = max(total), selection.source_tokens.shape[1]
        device = self.index.device
        row, start, turn = (upload(x, device)[:, None] for x in (self.owners, before, nth))
        column = self.index % self.width
        target = start + torch.arange(selection.index.shape[1], device=device)
        spare = torch.where(selection.valid, target, most)
        rows = column.gather(1, selection.index), selection.valid
        index, valid = (x.new_zeros(self.batch, most + 1).index_put((row, spare), x)[:, :-1] for x in rows)
        slot = turn * members + torch.arange(members, device=device)
        wide = (max(nth, default=0) + 1) * members
        into = torch.where(selection.target_row < 0, -1, selection.target_row + start)
        joined = column.new_zeros(self.batch, wide).index_put((row, slot), column.gather(1, selection.source_tokens))
        targets = column.new_full((self.batch, wide), -1).index_put((row, slot), into)
        weights = selection.weights
        if weights is not None:
            weights = weights.new_zeros(self.batch, wide).index_put((row, slot), weights)
        return replace(selection, index=index, valid=valid, source_tokens=joined, target_row=targets, weights=weights)
