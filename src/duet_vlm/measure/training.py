"""Floating-point operations of one training step, from shapes alone (two per multiply-add of every matrix product, as in ``flops``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from duet_vlm.budget import SpanPlan
from duet_vlm.measure.flops import decoder_layer_flops, projector_flops, scoring_flops, vision_flops
from duet_vlm.measure.shapes import DecoderShape, VisionShape


@dataclass(frozen=True)
class Trained:
    """What an optimiser step changes. As it stands: LLaVA's second stage; with ``decoder=False`` its first.

    Attributes
    ----------
    tower, projector, decoder : bool
        Every weight of that part; the decoder with its embeddings and head.
    lora : int
        Rank of adapters on all seven linear maps of every decoder layer; 0 for none.
    checkpointing : bool
        Layers keep their inputs only and run forward once more in the backward pass (not reentrant: up to the last thing it needs).
    """

    tower: bool = False
    projector: bool = True
    decoder: bool = True
    lora: int = 0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.lora < 0:
            raise ValueError(f"lora={self.lora}: a rank, at least 0 (0 for no adapters)")
        if not (self.tower or self.projector or self.decoder or self.lora):
            raise ValueError("nothing is trained: set tower, projector or decoder, or give lora a rank")


@dataclass(frozen=True)
class Example:
    """One row of the batch, padding included where the model runs it.

    Attributes
    ----------
    text : int
        Rows that are not visual.
    plans : tuple of SpanPlan
        What becomes of each image.
    queries : int
        Rows that rank the visual tokens before a drop; 0 where the method does not ask the text.
    signals : bool
        The method reads the tower's attention.
    projects_all : bool
        The projector runs on every token, not only on those that enter the decoder.
    """

    text: int
    plans: tuple[SpanPlan, ...]
    queries: int = 0
    signals: bool = False
    projects_all: bool = False

    def rows(self, depth: int) -> list[int]:
        """Rows that each decoder layer reads."""
        return [self.text + sum(plan.counts[layer] for plan in self.plans) for layer in range(depth)]

    def ranked(self, depth: int) -> list[int]:
        """Rows that are there at each ranking: before every drop that leaves visual tokens to choose."""
        after = self.rows(depth)
        before = [self.text + sum(plan.entry for plan in self.plans), *after]
        return [b for b, a in zip(before, after, strict=False) if self.text < a < b] if self.queries else []


@dataclass(frozen=True)
class StepFlops:
    """One step by stage; what the optimiser does to each weight is no matrix product and is not counted.

    ``vision``: tower, signals and projector forward. ``decoder``: layers, ranking and head forward. ``backward``: gradients of activations
    and of trained weights. ``recomputed``: what checkpointing runs again in the backward pass.
    """

    vision: int
    decoder: int
    backward: int
    recomputed: int

    @property
    def total(self) -> int:
        return self.vision + self.decoder + self.backward + self.recomputed


def step_flops(
    decoder: DecoderShape, vision: VisionShape, examples: Sequence[Example], trained: Trained, unread_layers: int = 0
) -> StepFlops:
    """Forward and backward of one batch.

    A linear map costs its forward again for the gradient of its input (wherever something trained lies before it) and once more for the
    gradient of its weights (if they are trained); attention costs its two products twice (flash kernels, which compute the
    scores again, half of them more). Every row that reaches the last layer goes through the head, supervised or not. Ranking and
    signals carry no gradient. Choosing and merging are left out: well under 1 % of the products counted.

    Parameters
    ----------
    unread_layers : int
        Last layers of the tower whose output nobody reads (1 for LLaVA, which takes the last but one): run forward, no gradient.
    """
    tower = sum(vision_flops(vision, plan.tokens) + _signals(vision, plan.tokens) * e.signals for e in examples for plan in e.plans)
    projected = [_projected(vision, e, plan) for e in examples for plan in e.plans]
    rows = [e.rows(decoder.layers) for e in examples]
    forward = sum(_layer(decoder, r, trained.lora) for example in rows for r in example)
    head = sum(2 * example[-1] * decoder.hidden * decoder.vocab for example in rows)
    ranking = sum(scoring_flops(decoder, r, e.queries) for e in examples for r in e.ranked(decoder.layers))

    below = trained.tower or trained.projector or trained.decoder  # embeddings count as decoder
    backward = head * (1 + trained.decoder)
    backward += sum(_layer_backward(decoder, r, trained, below or bool(layer)) for example in rows for layer, r in enumerate(example))
    backward += sum(_projector_backward(vision, n, trained) for n in projected)
    again = sum(_layer(decoder, r, trained.lora) - _last_product(decoder, r, trained.lora) for example in rows for r in example)
    if trained.tower:
        for tokens in (plan.tokens for e in examples for plan in e.plans):
            read = replace(vision, layers=vision.layers - unread_layers)
            patches = 2 * tokens * vision.patches_per_token * vision.patch_inputs * vision.width
            layers = vision_flops(read, tokens) - patches
            backward += 2 * layers + patches  # pixels need no gradient
            again += layers - read.layers * 2 * _tower_rows(vision, tokens) * vision.width * vision.mlp
    projector = sum(projector_flops(vision, n) for n in projected)
    return StepFlops(tower + projector, forward + head + ranking, backward, again * trained.checkpointing)


def _tower_rows(shape: VisionShape, tokens: int) -> int:
    return tokens * shape.patches_per_token + shape.extra_rows


def _signals(shape: VisionShape, tokens: int) -> int:
    """Attention scores of one tower layer: of its CLS row, or without one of every row."""
    rows = _tower_rows(shape, tokens)
    return 2 * (shape.extra_rows or rows) * rows * shape.width


def _projected(shape: VisionShape, example: Example, plan: SpanPlan) -> int:
    """Rows through the projector; grid mergers run on every patch."""
    return plan.tokens if example.projects_all or shape.patches_per_token > 1 else plan.entry


def _projector_backward(shape: VisionShape, rows: int, trained: Trained) -> int:
    normed = shape.patches_per_token > 1  # grid mergers begin with a norm, whose weights are trained with them
    total = 0
    for place, (a, b) in enumerate(shape.projector):
        inputs = trained.tower or (trained.projector and (normed or place > 0))
        total += 2 * rows * a * b * (trained.projector + inputs)
    return total


def _adapters(shape: DecoderShape, rows: int, rank: int) -> int:
    """Both factors of the adapters on the seven linear maps of one layer."""
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    into = 5 * shape.hidden + wide + shape.mlp
    out = wide + 2 * narrow + 2 * shape.hidden + 2 * shape.mlp
    return 2 * rows * rank * (into + out)


def _layer(shape: DecoderShape, rows: int, rank: int) -> int:
    return decoder_layer_flops(shape, rows) + _adapters(shape, rows, rank)


def _layer_backward(shape: DecoderShape, rows: int, trained: Trained, below: bool) -> int:
    """``below``: something in front of the layer is trained, so its inputs need a gradient."""
    linear, adapters = decoder_layer_flops(shape, rows, keys=0), _adapters(shape, rows, trained.lora)
    attention = decoder_layer_flops(shape, rows) - linear
    total = 2 * attention + linear * (1 + trained.decoder) + 2 * adapters
    return total if below else total - 2 * rows * shape.hidden * ((shape.heads + 2 * shape.kv_heads) * shape.head_dim + 3 * trained.lora)


def _last_product(shape: DecoderShape, rows: int, rank: int) -> int:
    """The product that ends a layer: recomputation stops in front of it, for nothing needs its result."""
    return 2 * rows * shape.hidden * (rank if rank else shape.mlp)
