"""State of the running calls, on stacks per thread.

Nothing of it lives on modules, so calls may nest, and calls of several threads do not meet.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from duet_vlm.models.adapter import EncoderCall, RecordedQK
from duet_vlm.planning.budget import SpanPlan
from duet_vlm.planning.tokens import Selection
from duet_vlm.runtime.active_config import ActiveConfig
from duet_vlm.runtime.prefill.projection_reuse import ProjectionCache
from duet_vlm.runtime.prefill.token_stream import TokenStream
from duet_vlm.runtime.prompt import PromptState

ENCODED = "_duet_vlm_encoded"  # attribute of the encoder output that carries its EncodedFeatures to the decoder


@dataclass
class EncodeAccounting:
    """Counts of an encoder call that the trace and the report read, per span and part. "Part" means a crop of an image
    or a frame of a video.

    Attributes
    ----------
    tokens_per_crop : tuple of tuple of int
        Per span and part, visual tokens as the tower sees them.
    projected_rows : tuple of int
        Per span, rows that the projector works on where all tokens are kept.
    sizes : tuple of tuple of int
        Per span and part, visual tokens as the encoder stage sees them.
    spare : tuple
        Per span and part, (patches that become no token, padding patches that are embedded).
    skipped_layers : bool
        Tower layers with unused output were not run.
    repeated_parts : tuple of tuple of bool
        Per span, parts that were not encoded, as they repeat the part before.
    tower_survivors : Tensor or None
        [spans, N] bool, tokens that went through a reduced tower.
    tower_state : TowerState or None
        State of the reduced tower (runtime/vision_tower/state.py).
    """

    tokens_per_crop: tuple[tuple[int, ...], ...] = ()
    projected_rows: tuple[int, ...] = ()
    sizes: tuple[tuple[int, ...], ...] = ()
    spare: tuple[tuple[tuple[int, int], ...], ...] = ()
    skipped_layers: bool = False
    repeated_parts: tuple[tuple[bool, ...], ...] = ()
    tower_survivors: Tensor | None = None
    tower_state: Any = None  # one of several classes, by the kind of tower


@dataclass
class FeatureChecks:
    """Checks of an encoder call that stay on the device until the prefill reads them.

    Attributes
    ----------
    finite : Tensor or None
        0-dim bool, every feature is finite.
    invalid_code : Tensor or None
        0-dim code of what is wrong with the selection (runtime/validation.py).
    """

    finite: Tensor | None = None
    invalid_code: Tensor | None = None


@dataclass(frozen=True)
class LastRows:
    """The last token of each span, for prompts that predict from it: [spans, C], before the projector or behind it."""

    rows: Tensor
    unprojected: bool = False


@dataclass(frozen=True)
class ReducedRows:
    """Reduced features [n, D] of each span, and of the levels that are added after the first decoder layers."""

    rows: list[Tensor]
    deepstack: list[Any] = field(default_factory=list)


@dataclass
class EncodedFeatures:
    """The result of one reduced encoder call, with the decisions that were made in it.

    It is stored on the encoder's output object, which generate() hands to every later step.

    Attributes
    ----------
    modality : str
        "image" or "video".
    rows : list of Tensor
        The features [n, D] as handed out, one tensor per span. Beam expansion repeats these very objects, so a span is
        found by identity.
    grids : tuple
        Per span its (rows, columns), or None.
    plans : tuple of SpanPlan
        Per span.
    config : ActiveConfig
        Method and budget of the call.
    selection : Selection or None
        Kept tokens of all spans; None where every span keeps all of its tokens.
    slots : Tensor or None
        [spans, K] positions within the span that the selected tokens were written to.
    reduced : ReducedRows or None
        Reduced features, where ``rows`` are those of the stock model: the user called the encoder. They are used when
        the output comes back with a prompt.
    last : LastRows or None
        The last token of each span, where a selection was made.
    checks : FeatureChecks
        Checks that the prefill reads.
    accounting : EncodeAccounting
        Counts that the trace and the report read.
    decisions : dict
        Kept tokens of the first pass without a cache, which later passes replay.
    """

    modality: str
    rows: list[Tensor]
    grids: tuple[tuple[int, int] | None, ...]
    plans: tuple[SpanPlan, ...]
    config: ActiveConfig
    selection: Selection | None = None
    slots: Tensor | None = None
    reduced: ReducedRows | None = None
    last: LastRows | None = None
    checks: FeatureChecks = field(default_factory=FeatureChecks)
    accounting: EncodeAccounting = field(default_factory=EncodeAccounting)
    decisions: dict[Any, Any] = field(default_factory=dict)

    @property
    def cls_token(self) -> bool:
        """True if the selection counts a CLS row before the tokens."""
        return self.selection is not None and self.config.reducer.options.cls_token

    def span_number(self, rows: Tensor, position: int, total: int) -> int:
        """The number of the span that a feature tensor belongs to.

        Tensors are compared by identity. Where none is the same object (moved to another device or dtype), it is the
        span at ``position`` of ``total``.
        """
        for number, span_rows in enumerate(self.rows):
            if span_rows is rows:
                return number
        if total == len(self.rows) and self.rows[position].shape == rows.shape:
            return position
        raise ValueError(
            "the image features were rebuilt between encoder and decoder, their reduction is unknown: pass them on "
            "unchanged"
        )


@dataclass(frozen=True)
class SpanSelection:
    """The tokens that are kept of the spans of one encoder call.

    Attributes
    ----------
    plans : tuple of SpanPlan
        Per span, how many tokens are kept.
    selection : Selection or None
        The kept tokens; None where every span keeps all of its tokens.
    invalid_code : Tensor or None
        0-dim code of what is wrong with the selection (runtime/validation.py).
    tower_survivors : Tensor or None
        [spans, N] bool, tokens that could be chosen, where the tower was reduced.
    sizes : tuple of tuple of int
        Per span, tokens of each crop or frame.
    """

    plans: tuple[SpanPlan, ...]
    selection: Selection | None = None
    invalid_code: Tensor | None = None
    tower_survivors: Tensor | None = None
    sizes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class PromptText:
    """The text arguments of generate(), or of a forward, for methods that select by the question."""

    input_ids: Tensor | None = None
    input_embeds: Tensor | None = None
    attention_mask: Any = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class EncodeCall:
    """Facts of one encoder call that are known when it begins.

    Attributes
    ----------
    standalone : bool
        The user called the encoder, and gets the features of the stock model.
    per_crop : bool
        Crops or frames are reduced one by one.
    skips_unused_layers : bool
        Tower layers with unused output are not run.
    prompt : PromptText or None
        The text around the call; None where the encoder was called without a prompt.
    run_stock_too : bool
        The stock encoder runs a second time for the user, as the tower itself is reduced.
    depth : tuple of int
        Numbers of forwards and of generate() calls that were running when the encoder call began.
    is_chunk : bool
        The call encodes one chunk of a video: it records features and signals and selects nothing.
    needs_grad : bool
        A gradient flows into what a trainable module reads.
    """

    standalone: bool = False
    per_crop: bool = False
    skips_unused_layers: bool = False
    prompt: PromptText | None = None
    run_stock_too: bool = False
    depth: tuple[int, int] = (0, 0)
    is_chunk: bool = False
    needs_grad: bool = False


@dataclass
class RecordedSignals:
    """Records of the vision tower and the projector, until the selection is made.

    Attributes
    ----------
    qk : dict
        Attention module -> queries and keys that its layer recorded.
    captured_layers : set of int
        Numbers of the signal layers whose attention has run.
    signals : dict
        Number of a signal layer -> signal name -> one tensor per span.
    block_outputs : dict
        Number of a signal layer -> output of its block, where that carries a gradient.
    projector_args : tuple or None
        Arguments of the projector, for methods that call it themselves.
    cls_row : Tensor or None
        The CLS row, where the method counts it.
    unprojected_rows : Tensor or None
        Rows of a chunk before the projector, where the encoder stage works on those.
    """

    qk: dict[nn.Module, list[RecordedQK]] = field(default_factory=dict)
    captured_layers: set[int] = field(default_factory=set)
    signals: dict[int, dict[str, list[Tensor]]] = field(default_factory=dict)
    block_outputs: dict[int, Tensor] = field(default_factory=dict)
    projector_args: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    cls_row: Tensor | None = None
    unprojected_rows: Tensor | None = None


@dataclass
class TowerWork:
    """Work of a call whose vision tower is reduced.

    Attributes
    ----------
    patches : Tensor or None
        Patch embeddings [P, D, h, w], until the patches of the tower are selected.
    pixels : Tensor or None
        Pixels of ``patches``.
    embedded : Tensor or None
        Patch embeddings of the selected patches, until a packed tower embeds them.
    state : TowerState or None
        State of the reduced tower (runtime/vision_tower/state.py).
    captured_attention : list of RecordedQK
        Queries and keys of the running block, where patches are dropped after it.
    active_cut : BlockCut or None
        The drop inside the running block.
    """

    patches: Tensor | None = None
    pixels: Tensor | None = None
    embedded: Tensor | None = None
    state: Any = None  # one of several classes, by the kind of tower
    captured_attention: list[RecordedQK] = field(default_factory=list)
    active_cut: Any = None


@dataclass
class EncodeContext:
    """State of one running encoder call: what was recorded so far and what was decided before the projector.

    Attributes
    ----------
    encoding : EncoderCall
        Modality, arguments and sizes of the call.
    config : ActiveConfig
        Method and budget of the call.
    call : EncodeCall
        Facts that do not change while it runs.
    recorded : RecordedSignals
        Records of the tower and the projector.
    tower_work : TowerWork
        Work of a reduced tower.
    selection : SpanSelection or None
        The selection, once it is made.
    pending_features : EncodedFeatures or None
        Reduced features on their way through the projector.
    merged_rows : Tensor or None
        Reduced rows that go through the projector a second time, besides all rows.
    """

    encoding: EncoderCall
    config: ActiveConfig
    call: EncodeCall = EncodeCall()
    recorded: RecordedSignals = field(default_factory=RecordedSignals)
    tower_work: TowerWork = field(default_factory=TowerWork)
    selection: SpanSelection | None = None
    pending_features: EncodedFeatures | None = None
    merged_rows: Tensor | None = None


@dataclass
class ReceivedFeatures:
    """Visual features as they reached the decoder: one tensor per span, and the encoder call that made them."""

    features: Sequence[Tensor]
    decisions: EncodedFeatures | None


@dataclass(frozen=True)
class OriginalArgs:
    """Arguments of the model's forward as the caller gave them.

    Other wrappers of the forward may change them on the way: a device map rebuilds encoder outputs, a trainer's fused
    head takes the labels away.
    """

    labels: Tensor | None = None
    logits_to_keep: Any = None
    encoder_outputs: dict[str, Any] | None = None


@dataclass
class ForwardCall:
    """Arguments of a running forward, as the caller gave them.

    Attributes
    ----------
    input_ids, input_embeds : Tensor or None
        Of the call.
    attention_mask : Tensor, dict or None
        The caller's mask, before the family prepares others from it.
    labels : Tensor or None
        Of the call.
    num_draft_tokens : int
        Tokens at the end that assisted decoding guessed; they are no part of the question.
    logits_by_prompt_position : bool
        The caller selects logits by prompt position, so the output has one row for each position of the prompt.
    brings_images : bool
        The call has pixels or encoder outputs.
    """

    input_ids: Tensor | None = None
    input_embeds: Tensor | None = None
    attention_mask: Any = None
    labels: Tensor | None = None
    num_draft_tokens: int = 0
    logits_by_prompt_position: bool = False
    brings_images: bool = False


@dataclass
class ForwardContext:
    """State of one running forward of the model.

    Attributes
    ----------
    owner : nn.Module or None
        The module whose forward began it.
    config : ActiveConfig or None
        Method and budget; None for the full model.
    call : ForwardCall
        Arguments of the call.
    in_base_model : bool
        The multimodal model inside the owner is running.
    layer : int
        The decoder layer that is running.
    placeholders : dict
        Modality -> [B, S] bool, placeholder positions.
    received : dict
        Modality -> its visual features.
    prompt_state : PromptState or None
        The prompt that is being processed.
    rotary_calls : list
        Calls of the decoder's rotary embedding: (module, arguments, keywords, output).
    projection_cache : ProjectionCache or None
        Projections that scoring computed in the running prefill.
    token_stream : TokenStream or None
        States of all tokens of the running prefill, with re-entry.
    """

    owner: nn.Module | None
    config: ActiveConfig | None
    call: ForwardCall = field(default_factory=ForwardCall)
    in_base_model: bool = False
    layer: int = 0
    placeholders: dict[str, Tensor] = field(default_factory=dict)
    received: dict[str, ReceivedFeatures] = field(default_factory=dict)
    prompt_state: PromptState | None = None
    rotary_calls: list[Any] | None = None
    projection_cache: ProjectionCache | None = None
    token_stream: TokenStream | None = None


class ThreadState(threading.local):
    """The running calls of one thread, innermost last.

    Attributes
    ----------
    active_configs : list of ActiveConfig or None
        Of every call that has begun (generate, forward, encoder); None for the full model.
    forward_contexts : list of ForwardContext
        Running forwards.
    encode_contexts : list of EncodeContext
        Running encoder calls.
    generate_preparations : int
        Steps of generate() that are encoding the images of their prompt.
    generate_prompts : list of PromptText
        Of the running calls of generate().
    original_args : OriginalArgs or None
        Of the model that was called last, until its forward has ended.
    has_prompt_state : bool
        This thread has made a call.
    last_prompt_state : PromptState or None
        Of its last call; None where there is nothing to report.
    """

    def __init__(self) -> None:
        self.active_configs: list[ActiveConfig | None] = []
        self.forward_contexts: list[ForwardContext] = []
        self.encode_contexts: list[EncodeContext] = []
        self.generate_preparations = 0
        self.generate_prompts: list[PromptText] = []
        self.original_args: OriginalArgs | None = None
        self.has_prompt_state = False
        self.last_prompt_state: PromptState | None = None
