"""One step of an engine through a decoder with stages: rows, lengths and cache slots of every stage, for several
requests at once.

All of it is counted on the host, in numpy arrays, before the step runs. R requests, S stages, T_s rows of all requests
in stage s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from duet_vlm.ops.ragged import upload
from duet_vlm.serve.decoder_stages import DecoderStages
from duet_vlm.serve.staged_prompt import StagedPrompt

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class CutPromptError(RuntimeError):
    """A step that holds a part of a prompt with images: rows that rank, or rows that are ranked, are in another one."""


@dataclass(frozen=True)
class StageDrop:
    """The drop in front of one stage: the D requests that lose rows there, as a batch padded to L rows.

    Attributes
    ----------
    requests : [D] int
        Their numbers in the step.
    rows : [D, L] int
        Their rows in the flat batch of the stage before; 0 for padding, which stands on the right.
    valid : [D, L] bool
        False for padding.
    counts : tuple of (int, int)
        Visual rows of each that are there, and that stay.
    num_queries : tuple of int
        Text rows of each that rank.
    """

    requests: Ints
    rows: Ints
    valid: Bools
    counts: tuple[tuple[int, int], ...]
    num_queries: tuple[int, ...]


class StagedStep:
    """One step.

    Parameters
    ----------
    stages : DecoderStages
        Of the decoder.
    prompts : sequence of StagedPrompt
        Of each request, in the order of the flat batch.
    computed, scheduled : sequence of int
        Tokens of each request that are in the cache, and that this step reads behind them.

    Attributes
    ----------
    dropping : [R] bool
        Requests whose images and whole question are in this step.
    num_rows : [S, R] int
        Rows of each request in each stage.
    first_rows : [S, R] int
        The number of the first of them in the request's own sequence of that stage.

    Raises
    ------
    CutPromptError
        A request with images is read in part.
    """

    def __init__(
        self,
        stages: DecoderStages,
        prompts: Sequence[StagedPrompt],
        computed: Sequence[int] | Ints,
        scheduled: Sequence[int] | Ints,
    ) -> None:
        self.stages, self.prompts = stages, tuple(prompts)
        self.computed, self.scheduled = np.asarray(computed, np.int64), np.asarray(scheduled, np.int64)
        self._lengths = np.array([prompt.length for prompt in self.prompts], np.int64)
        self.dropping = self._dropping()
        nobody = (0,) * len(stages)
        counts = np.array([prompt.counts or nobody for prompt in self.prompts], np.int64).reshape(-1, len(stages)).T
        gone = counts[0] - counts
        self.num_rows: Ints = self.scheduled - gone * self.dropping
        self.first_rows: Ints = self.computed - gone * ~self.dropping

    def _dropping(self) -> Bools:
        visual = np.array([bool(prompt.spans) for prompt in self.prompts], bool)
        first = np.array([prompt.first_visual for prompt in self.prompts], np.int64)
        reading = visual & (self.computed < self._lengths)
        whole = (self.computed <= first) & (self.computed + self.scheduled >= self._lengths)
        if (cut := reading & ~whole).any():
            number = int(cut.argmax())
            raise CutPromptError(
                f"request {number} of the step has a prompt of {self._lengths[number]} tokens with images from {first[number]} on, and is read "
                f"from {self.computed[number]} to {self.computed[number] + self.scheduled[number]}: a prompt with images goes in one step"
            )
        return reading

    @property
    def visual(self) -> bool:
        """True where a request has images; without, every stage is as stage 0."""
        return any(prompt.spans for prompt in self.prompts)

    # ---- tables of a stage

    def query_starts(self, stage: int) -> Ints:
        """Starts of each request's rows in the flat batch of ``stage``, and the end of the last [R + 1]."""
        return np.concatenate([[0], self.num_rows[stage].cumsum()])

    def seq_lens(self, stage: int) -> Ints:
        """Rows of each request that are in the cache of ``stage`` when it has run [R]."""
        return self.first_rows[stage] + self.num_rows[stage]

    def requests(self, stage: int) -> Ints:
        """The request of every row of the flat batch [T_s]."""
        return np.repeat(np.arange(len(self.prompts)), self.num_rows[stage])

    def rows(self, stage: int) -> Ints:
        """The number of every row of the flat batch in its request's own sequence of that stage [T_s]: its place in the
        cache, and its position where positions are compact."""
        shift = self.first_rows[stage] - self.query_starts(stage)[:-1]
        return np.arange(self.num_rows[stage].sum()) + np.repeat(shift, self.num_rows[stage])

    def slots(self, stage: int, blocks: Tensor, block_size: int) -> Tensor:
        """The place of every row in the cache [T_s] int64, on the device of ``blocks`` [R, M], the numbers of each
        request's blocks."""
        rows, requests = (upload(torch.from_numpy(x), blocks.device) for x in (self.rows(stage), self.requests(stage)))
        return blocks[requests, rows // block_size].long() * block_size + rows % block_size

    # ---- rows as they came

    @cached_property
    def visual_rows(self) -> Bools:
        """Mask of the rows of stage 0 that are visual and may leave in this step [T_0]."""
        begins = self.query_starts(0)[:-1] - self.computed
        edges = np.zeros(int(self.scheduled.sum()) + 1, np.int64)
        for number in self.dropping.nonzero()[0]:
            spans = np.array(self.prompts[number].spans, np.int64) + begins[number]
            np.add.at(edges, spans[:, 0], 1)
            np.add.at(edges, spans[:, 1], -1)
        return edges[:-1].cumsum().astype(bool)

    def query_rows(self, text_query: str) -> Bools:
        """Mask of the rows of stage 0 that rank [T_0]: of requests that drop, the prompt's text behind its last image
        ("all"), or its "last" row. What was generated before a preemption comes back behind the prompt, and does not
        rank."""
        last_end = np.array([prompt.last_end for prompt in self.prompts], np.int64)
        first = self._lengths - 1 if text_query == "last" else last_end
        row, request = self.rows(0), self.requests(0)
        asks: Bools = self.dropping[request] & (row >= first[request]) & (row < self._lengths[request])
        return asks

    def drop(self, stage: int, text_query: str) -> StageDrop | None:
        """The drop in front of ``stage``, from 1 on; None where no request of the step loses rows there."""
        counts = [
            (p.counts[stage - 1], p.counts[stage]) if now else (0, 0)
            for p, now in zip(self.prompts, self.dropping, strict=True)
        ]
        losing = np.array([number for number, (before, after) in enumerate(counts) if after < before], np.int64)
        if not len(losing):
            return None
        begins, sizes = self.query_starts(stage - 1)[losing, None], self.num_rows[stage - 1][losing, None]
        column = np.arange(sizes.max())
        valid = column < sizes
        queries = [
            1 if text_query == "last" else self.prompts[number].length - self.prompts[number].last_end
            for number in losing
        ]
        return StageDrop(
            losing,
            np.where(valid, begins + column, 0),
            valid,
            tuple(counts[number] for number in losing),
            tuple(queries),
        )
