"""What one call knows, on stacks per thread: nothing lives on modules, so calls nest and threads do not meet."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from duet_vlm.models.adapter import Encoding
from duet_vlm.planning.budget import SpanPlan
from duet_vlm.planning.tokens import Selection
from duet_vlm.runtime.active_config import ActiveConfig

ENCODED = "_duet_vlm_encoded"  # attribute of the encoder output that carries its decisions to the decoder


@dataclass
class EncodedFeatures:
    """The decisions of one encoder call; rides on the encoder's output object, which generate() hands to every later step.

    ``rows`` are the feature tensors as handed out, one per span: beam expansion repeats these very objects, so a span is found by
    identity. ``selection`` is None where V2V left the spans whole; ``slots`` [spans, K] says where its rows were put within their span.

    ``aside``: the encoder was called by the user, who got all rows; these are the reduced ones, for when its output comes back with a
    prompt, and ``levels`` those of the rows that are added behind the first decoder layers. ``ends`` [spans, C] are the last rows of the
    spans (before the projector if ``unprojected``), for prompts that are predicted from such a row.
    """

    modality: str
    rows: list[Tensor]
    grids: tuple[tuple[int, int] | None, ...]
    plans: tuple[SpanPlan, ...]
    config: ActiveConfig
    selection: Selection | None = None
    slots: Tensor | None = None
    cls_token: bool = False
    reduced_rows: list[Tensor] | None = None
    deepstack_rows: list[tuple[Tensor, ...]] | None = None
    last_rows: Tensor | None = None
    last_rows_unprojected: bool = False
    finite: Tensor | None = None
    invalid_code: Tensor | None = None  # the code of what the method returned (runtime/validation.py)
    tokens_per_crop: tuple[tuple[int, ...], ...] = ()  # per span, visual tokens of each part that the tower looked at by itself
    projected_rows: tuple[int, ...] = ()  # per span, rows that the projector works on where V2V leaves them all to it
    sizes: tuple[tuple[int, ...], ...] = ()  # per span, visual tokens of each part as V2V sees them
    spare: tuple[tuple[tuple[int, int], ...], ...] = ()  # per span and part, patches that become no token, and padding that is embedded
    skipped_layers: bool = False  # tower layers that nobody reads were not run
    repeated_parts: tuple[tuple[bool, ...], ...] = ()  # per span, parts that were not encoded since they repeat the one before
    tower_survivors: Tensor | None = None  # [spans, N], the tokens that went through a reduced tower
    tower_state: Any = None  # what went through the tower, where it was reduced (flow/tower)
    decisions: dict[Any, Any] = field(default_factory=dict)  # survivors of the first cache-free pass, replayed by later ones

    def number_of(self, rows: Tensor, position: int, total: int) -> int:
        """Which span of the encoder call a feature tensor is; failing identity (moved, or rows of one tensor), the one at ``position`` of
        ``total``."""
        for number, known in enumerate(self.rows):
            if known is rows:
                return number
        if total == len(self.rows) and self.rows[position].shape == rows.shape:  # moved to another device or dtype
            return position
        raise ValueError("the image features were rebuilt between encoder and decoder, their reduction is unknown: pass them on unchanged")


@dataclass(frozen=True)
class SpanSelection:
    """How many rows of each span go on, and which: ``selection`` is None where V2V leaves all spans whole. ``alive`` [spans, N]: those it
    could choose from, where a tower was reduced. ``sizes``: per span, tokens of each part."""

    plans: tuple[SpanPlan, ...]
    selection: Selection | None = None
    invalid_code: Tensor | None = None
    tower_survivors: Tensor | None = None
    sizes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class PromptText:
    """What generate(), or a forward of the multimodal model, was called with: text for those who choose by it."""

    input_ids: Tensor | None = None
    input_embeds: Tensor | None = None
    attention_mask: Any = None
    labels: Tensor | None = None


@dataclass
class EncodeContext:
    """Scratch of one running encoder call: what the recorder saw and what was decided in front of the projector.

    ``aside``: the user called the encoder, and gets what the stock model gives, ``twice``: by a run of its own; ``each``: parts are reduced one by
    one; ``skips``: tower layers that nobody reads are not run; ``signals``: by number of the layer that a method names, what it takes of it
    per span, made of what was ``recorded`` (by attention module), until the choice is made of them; ``projecting``: what the projector was
    called with, for methods that ask it themselves; ``heard``: numbers of the layers whose attention ran; ``prompt``: None where the encoder
    was called by itself; ``begun``: how many forwards and generations
    ran when it began; ``merged``: the rows that go through the projector a second time, beside all of them. ``gathers``: it is a piece of a
    call, which makes rows and signals and chooses nothing; ``unprojected``: its rows in front of the projector, where V2V works on those.
    ``learns``: a gradient goes through what a module reads, ``states``: rows of vision layers that carry it, as the
    blocks have them, by the numbers of ``signals``.
    ``patches``: patch embeddings [P, D, h, w] until units are chosen, ``pixels`` what they were made of, ``embedded``: those that were made to
    choose by, of what comes to the first block, until a packed tower asks for them, ``tower``: the units that go through the tower
    (flow/tower), ``watched``: attention of the block that runs, where units leave behind it, ``cutting``: what is happening to its
    rows (runtime/vision_tower/block_hooks.py).
    """

    encoding: Encoding
    config: ActiveConfig
    standalone: bool = False
    per_crop: bool = False
    skips_unused_layers: bool = False
    prompt: PromptText | None = None
    run_stock_too: bool = False
    begun: tuple[int, int] = (0, 0)
    recorded_qk: dict[Any, list[Any]] = field(default_factory=dict)
    captured_layers: set[int] = field(default_factory=set)
    signals: dict[int, dict[str, list[Tensor]]] = field(default_factory=dict)
    projector_args: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    selection: SpanSelection | None = None
    cls_row: Tensor | None = None
    pending_features: EncodedFeatures | None = None
    merged_rows: Tensor | None = None
    is_chunk: bool = False
    learns: bool = False
    states: dict[int, Tensor] = field(default_factory=dict)
    unprojected_rows: Tensor | None = None
    patches: Tensor | None = None
    pixels: Tensor | None = None
    embedded: Tensor | None = None
    tower_state: Any = None
    captured_attention: list[Any] = field(default_factory=list)
    active_cut: Any = None


@dataclass
class ReceivedFeatures:
    """What one encoder call brought: feature tensors as they reached the decoder, one per span, and their decisions."""

    features: Sequence[Tensor]
    decisions: EncodedFeatures | None


@dataclass(frozen=True)
class OriginalArgs:
    """What a module was called with, before anybody who wraps its forward changed it: a device map rebuilds encoder outputs, a trainer's
    fused head takes the labels away."""

    labels: Tensor | None = None
    salient_mask: Tensor | None = None
    logits_to_keep: Any = None  # logits_to_keep
    encoder_outputs: dict[str, Any] | None = None


@dataclass
class ForwardContext:
    """One running forward of the model; ``placeholders`` and ``arrived`` are by stream (image, video)."""

    owner: Any
    config: ActiveConfig | None
    in_base_model: bool = False  # the multimodal model inside the owner runs
    logits_by_prompt_position: bool = False  # the caller counts rows by prompt slots: the output gets one row for each
    labels: Tensor | None = None
    salient_mask: Tensor | None = None
    num_draft_tokens: int = 0  # rows at the end that assisted decoding guessed: they are no part of the question
    input_ids: Tensor | None = None
    input_embeds: Tensor | None = None
    attention_mask: Any = None  # the caller's attention mask, before the family prepares others from it
    layer: int = 0  # the decoder layer that runs
    brings_images: bool = False
    placeholders: dict[str, Tensor] = field(default_factory=dict)
    received: dict[str, ReceivedFeatures] = field(default_factory=dict)
    prompt_state: Any = None
    tables: Any = None  # how the decoder's rotary tables were made: module, arguments, what came out
    projection_cache: Any = None  # by ranking, in the prefill that runs


class ThreadState(threading.local):
    """Per thread: the rules of what has begun (generate, forward, encoder calls, innermost last), the running forward and encoder calls,
    and the last run (None: nothing to report)."""

    def __init__(self) -> None:
        self.active_configs: list[ActiveConfig | None] = []
        self.forward_contexts: list[ForwardContext] = []
        self.encode_contexts: list[EncodeContext] = []
        self.generate_preparations = 0  # generate() encodes what its prompt shows
        self.generate_prompts: list[PromptText] = []  # of the calls of generate() that run
        self.original_args: OriginalArgs | None = None  # of the model that was called last, until its own forward has ended
        self.has_prompt_state = False
        self.last_prompt_state: Any = None
