"""One prompt with images as a decoder with stages reads it: where its visual rows stand, and how many of them each
stage has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class StagedPrompt:
    """Numbers of one request that never change while it is served, also where it is preempted and read again.

    Attributes
    ----------
    length : int
        Tokens of the prompt as it came; what was generated since does not count, and never ranks.
    spans : tuple of (int, int)
        Runs [first, end) of visual rows, ascending; marks and timestamps between rows are text. Empty for text alone.
    counts : tuple of int
        Visual rows of all images together in each stage: those that entered first. Empty for text alone.
    """

    length: int
    spans: Spans = ()
    counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, length: int, spans: Sequence[tuple[int, int]], counts: Sequence[Sequence[int]]) -> StagedPrompt:
        """From the spans of its images in any order, and for each image the rows of every stage
        (``DecoderStages.counts``).

        Raises
        ------
        ValueError
            Spans that overlap, leave the prompt or hold another number of rows than entered: layout and plan disagree.
        """
        ordered = tuple(sorted((int(first), int(end)) for first, end in spans))
        ends = [0, *(end for _, end in ordered)]
        if (
            any(first < before or end <= first for before, (first, end) in zip(ends, ordered, strict=False))
            or ends[-1] > length
        ):
            raise ValueError(
                f"spans={ordered}: runs of visual rows that follow each other in a prompt of {length} tokens are needed"
            )
        together = tuple(int(sum(stage)) for stage in zip(*counts, strict=True))
        rows = sum(end - first for first, end in ordered)
        if rows != sum(together[:1]):
            raise ValueError(f"the prompt shows {rows} visual rows, and {sum(together[:1])} were planned")
        return cls(length, ordered, together)

    @property
    def first_visual(self) -> int:
        """The place of its first visual row; its length where it has none. No prefix is cached beyond it."""
        return self.spans[0][0] if self.spans else self.length

    @property
    def last_end(self) -> int:
        """The place behind its last visual row: text from there on ranks; 0 where it has none."""
        return self.spans[-1][1] if self.spans else 0

    def dropped(self, stage: int) -> int:
        """Rows that ``stage`` does not have."""
        return self.counts[0] - self.counts[stage] if self.counts else 0

    def check(self, most: int) -> None:
        """Refuse a prompt that no step can read; ``most``: tokens that a step takes at most.

        Raises
        ------
        ValueError
            It ends in an image, or is longer than a step. Text alone is never refused.
        """
        if not self.spans:
            return
        if self.last_end >= self.length:
            raise ValueError(
                "the prompt ends in an image, so no text could rank its visual tokens: write the question behind it"
            )
        if self.length > most:
            raise ValueError(
                f"the prompt has {self.length} tokens, and one with images is read in one step of at most {most} "
                "(max_num_batched_tokens): send fewer or smaller images, or serve with a larger step"
            )
