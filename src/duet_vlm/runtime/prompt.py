"""The prompt as a value between the stages: what the encoder stage selected, who is ranked together, which tokens each
layer has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from duet_vlm.planning.budget import SpanPlan
from duet_vlm.planning.tokens import Selection, Span, TokenMap
from duet_vlm.runtime.active_config import ActiveConfig


@dataclass(eq=False)
class LayerGroup:
    """Decoder layers that process the same tokens.

    Attributes
    ----------
    first_layer : int
        The group begins here and ends where the next one begins.
    tokens : TokenMap
        The tokens, [B, T].
    lengths : tuple of int
        Valid tokens per sample, known on the host.
    merged_into : Selection or None
        The selection before ``first_layer``, where tokens were merged, with prompt positions instead of token numbers.
    """

    first_layer: int
    tokens: TokenMap
    lengths: tuple[int, ...]
    merged_into: Selection | None = None

    @property
    def width(self) -> int:
        return self.tokens.prompt_index.shape[1]

    @property
    def padded(self) -> bool:
        return min(self.lengths) < self.width


@dataclass(frozen=True)
class ProtectedCount:
    """Visual tokens that are always kept, since their logits predict.

    Attributes
    ----------
    in_sequence : int
        How many there are.
    beyond_plan : int
        How many of them the encoder stage had dropped.
    """

    in_sequence: int = 0
    beyond_plan: int = 0


@dataclass(frozen=True)
class RankingGroup:
    """Spans of one sample whose visual tokens are ranked together, and the number of their protected tokens."""

    plans: tuple[SpanPlan, ...]
    protected: ProtectedCount = ProtectedCount()

    def num_visual(self, layer: int) -> int:
        """Visual tokens at the input of ``layer``; -1: those that entered the decoder."""
        planned = sum(plan.entry if layer < 0 else plan.counts[layer] for plan in self.plans)
        return max(planned + self.protected.beyond_plan, self.protected.in_sequence)

    def num_prunable(self, layer: int) -> int:
        """The same without the protected ones."""
        return self.num_visual(layer) - self.protected.in_sequence


@dataclass
class PrefillRecord:
    """Facts of the prefill that the report and the cache read.

    Attributes
    ----------
    num_text_after_image : int
        The smallest number of tokens of a sample after its last visual token.
    drafts : int
        Tokens at the prompt's end that assisted decoding guessed.
    num_queries : tuple of int
        Per sample, text queries.
    scored_layers : tuple of int
        Layers whose attention scored tokens.
    reused_layers : tuple of int
        Those of them that reused the keys of the scoring.
    element_bytes : int
        Bytes of one number of the hidden states.
    trimmed_layers : tuple of int
        Layers whose cache was cut to the tokens of the last group.
    rows_evicted_elsewhere : tuple of int
        Per layer, cache rows that other code (cache compression) removed during the prefill; empty if none.
    cache_bytes : tuple of int or None
        Per layer, measured after the prefill.
    """

    num_text_after_image: int = 0
    drafts: int = 0
    num_queries: tuple[int, ...] = ()
    scored_layers: tuple[int, ...] = ()
    reused_layers: tuple[int, ...] = ()
    element_bytes: int = 4
    trimmed_layers: tuple[int, ...] = ()
    rows_evicted_elsewhere: tuple[int, ...] = ()
    cache_bytes: tuple[int, ...] | None = None


@dataclass
class PendingChecks:
    """Checks of the decoder stages that stay on the device until somebody asks for the run.

    Attributes
    ----------
    finite : list of (Tensor, str)
        Flags that scores are finite, and their description for the error.
    invalid_code : list of Tensor
        Codes of what the method returned at the decoder stages.
    """

    finite: list[tuple[Tensor, str]] = field(default_factory=list)
    invalid_code: list[Tensor] = field(default_factory=list)


@dataclass
class Continuation:
    """Point at which the steps after a prompt go on.

    Attributes
    ----------
    num_real_tokens : Tensor or None
        [B] tokens of each sample without padding.
    next_position : Tensor or None
        [B] or [3, B] position of the first generated token.
    num_decoded : int
        Tokens processed after the prompt.
    """

    num_real_tokens: Tensor | None = None
    next_position: Tensor | None = None
    num_decoded: int = 0


@dataclass
class PromptState:
    """One prompt: its spans, the tokens of each layer, and the position of the next token. Plain data; no modules, no
    cache.

    Attributes
    ----------
    config : ActiveConfig
        Method and budget.
    prompt_len : int
        Length of the prompt as sent.
    spans : tuple of tuple of Span
        Per sample.
    ranking_groups : tuple of tuple of RankingGroup
        Per sample.
    prompt : TokenMap
        The tokens of the prompt as sent.
    sources : tuple of (EncodedFeatures, int)
        Per span, in order: its encoder call and its number in it.
    layer_groups : list of LayerGroup
        The first one is the sequence that entered the decoder.
    reduces : bool
        Any token is dropped.
    record : PrefillRecord
        Facts that the report and the cache read.
    pending : PendingChecks
        Checks that wait on the device.
    continuation : Continuation
        Where the next step goes on.
    """

    config: ActiveConfig
    prompt_len: int
    spans: tuple[tuple[Span, ...], ...]
    ranking_groups: tuple[tuple[RankingGroup, ...], ...]
    prompt: TokenMap
    sources: tuple[tuple[Any, int], ...] = ()
    layer_groups: list[LayerGroup] = field(default_factory=list)
    reduces: bool = False
    record: PrefillRecord = field(default_factory=PrefillRecord)
    pending: PendingChecks = field(default_factory=PendingChecks)
    continuation: Continuation = field(default_factory=Continuation)

    @property
    def depth(self) -> int:
        return self.config.depth

    @property
    def positions(self) -> str:
        return self.config.reducer.options.positions

    @property
    def plans(self) -> tuple[tuple[SpanPlan, ...], ...]:
        """Per sample, the plans of its spans."""
        return tuple(tuple(plan for group in row for plan in group.plans) for row in self.ranking_groups)

    def num_visual(self, layer: int) -> list[int]:
        """Visual tokens per sample at the input of ``layer``; -1: those that entered the decoder."""
        return [sum(group.num_visual(layer) for group in row) for row in self.ranking_groups]

    def num_prunable(self, layer: int) -> list[list[int]]:
        """As ``num_visual``, by ranking group and without protected tokens."""
        return [[group.num_prunable(layer) for group in row] for row in self.ranking_groups]

    def layer_group(self, layer: int) -> LayerGroup:
        """The group that ``layer`` belongs to; the first one for -1."""
        return next(
            (group for group in reversed(self.layer_groups) if group.first_layer <= layer), self.layer_groups[0]
        )

    def candidate_layer(self, layer: int) -> int:
        """The layer among whose tokens a stage before ``layer`` decides; -1: among those that entered the decoder."""
        return -1 if self.config.reducer.reenters else layer - 1

    def cached_group(self, layer: int) -> LayerGroup:
        """The layer group whose tokens the cache of ``layer`` holds."""
        return self.layer_groups[-1] if layer in self.record.trimmed_layers else self.layer_group(layer)

    def cache_rows(self, layer: int) -> int:
        """Number of rows of the prompt in the cache of ``layer``."""
        return self.cached_group(layer).width - (
            self.record.rows_evicted_elsewhere[layer] if self.record.rows_evicted_elsewhere else 0
        )
