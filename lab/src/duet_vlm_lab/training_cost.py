"""Floating-point operations of one training step, from shapes alone (two per multiply-add of every matrix product, as
in ``duet_vlm.profiling.flops``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from duet_vlm.planning.budget import SpanPlan, TowerStages
from duet_vlm.profiling.flops import (
    decoder_layer_flops,
    head_flops,
    patch_flops,
    projector_flops,
    scoring_flops,
    signal_flops,
    stretches,
    tower_rows,
    vision_flops,
)
from duet_vlm.profiling.model_dims import DecoderDims, VisionDims

LLAVA_7B = (
    DecoderDims(32, 4096, 32, 32, 128, 11008, 32064),
    VisionDims(24, 1024, 4096, 2, 1, 1, 588, ((1024, 4096), (4096, 4096))),
)


@dataclass(frozen=True)
class TrainedParts:
    """Weights that an optimiser step changes. The defaults are LLaVA's second stage; with ``decoder=False`` its first.

    Attributes
    ----------
    tower, projector, decoder : bool
        Every weight of that part; the decoder with its embeddings and head.
    lora : int
        Rank of adapters on all seven linear maps of every decoder layer; 0 for none.
    checkpointing : bool
        Layers keep their inputs only and run forward once more in the backward pass (not reentrant: up to the last
        thing it needs).
    input_gradients : bool
        What the embeddings put out needs a gradient even if nothing before it is trained, so one runs through a frozen
        tower as well: ``enable_input_require_grads()``, which transformers 5 calls whenever it switches checkpointing
        on.
    """

    tower: bool = False
    projector: bool = True
    decoder: bool = True
    lora: int = 0
    checkpointing: bool = False
    input_gradients: bool = False

    def __post_init__(self) -> None:
        if self.lora < 0:
            raise ValueError(f"lora={self.lora}: a rank, at least 0 (0 for no adapters)")
        if not (self.tower or self.projector or self.decoder or self.lora):
            raise ValueError("nothing is trained: set tower, projector or decoder, or give lora a rank")

    @property
    def through_tower(self) -> bool:
        """True if a gradient runs through the tower's layers."""
        return self.tower or self.input_gradients

    @property
    def below_decoder(self) -> bool:
        """True if the input of the decoder's first layer needs a gradient; embeddings are trained with the decoder."""
        return self.through_tower or self.projector or self.decoder


@dataclass(frozen=True)
class TrainingExample:
    """One row of the batch, padding included where the model runs it.

    Attributes
    ----------
    text : int
        Rows that are not visual.
    plans : tuple of SpanPlan
        What becomes of each image.
    queries : int
        Rows that rank the visual tokens before a drop; 0 where the method does not use the text.
    signals : bool
        The method reads the tower's attention; counted as if all rows ranked, where the tower has no CLS row.
    projects_all : bool
        The projector runs on every token, not only on those that enter the decoder (``Handle.projects_all``).
    stages : tuple of (blocks, tokens)
        Where patches leave the tower, and how many tokens' are left of each image then (``Handle.leaving``).
    """

    text: int
    plans: tuple[SpanPlan, ...]
    queries: int = 0
    signals: bool = False
    projects_all: bool = False
    stages: TowerStages = ()

    def left(self, plan: SpanPlan) -> int:
        """Tokens of an image that its tower ends with."""
        return self.stages[-1][1] if self.stages else plan.tokens

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

    ``vision``: tower, signals and projector forward. ``decoder``: layers, ranking and head forward. ``backward``:
    gradients of activations and of trained weights. ``recomputed``: what checkpointing runs again in the backward pass.
    """

    vision: int
    decoder: int
    backward: int
    recomputed: int

    @property
    def total(self) -> int:
        return self.vision + self.decoder + self.backward + self.recomputed


def step_flops(
    decoder: DecoderDims,
    vision: VisionDims,
    examples: Sequence[TrainingExample],
    trained: TrainedParts,
    unread_layers: int = 0,
) -> StepFlops:
    """Forward and backward of one batch.

    A linear map costs its forward again for the gradient of its input (wherever something trained lies before it) and
    once more for the gradient of its weights (if they are trained); attention costs its two products twice (flash
    kernels, which compute the scores again, half of them more). Every row that reaches the last layer goes through the
    head, supervised or not. Ranking and signals carry no gradient. Choosing and merging are left out: well under 1 % of
    the products counted.

    Parameters
    ----------
    unread_layers : int
        Last layers of the tower whose output is not used (1 for LLaVA, which takes the last but one): run forward, no
        gradient.
    """
    depth = decoder.layers
    images = [(e, plan) for e in examples for plan in e.plans]
    if trained.lora and (decoder.experts or decoder.linear):
        raise ValueError(
            "adapters are costed on decoders of seven linear maps per layer: lora=0 for mixtures of experts and linear attention"
        )
    rows = [(r, layer) for e in examples for layer, r in enumerate(e.rows(depth))]
    head = head_flops(decoder, sum(e.rows(depth)[-1] for e in examples))
    ranking = sum(scoring_flops(decoder, r, e.queries) for e in examples for r in e.ranked(depth))
    seen = sum(
        vision_flops(vision, plan.tokens, stages=e.stages) + projector_flops(vision, _projected(e, plan))
        for e, plan in images
    )
    seen += sum(signal_flops(vision, e.left(plan)) for e, plan in images if e.signals)
    forward = sum(_layer(decoder, *r, trained.lora) for r in rows) + ranking + head

    read = replace(vision, layers=vision.layers - unread_layers)
    backward = head * (1 + trained.decoder) + sum(_layer_backward(decoder, *r, trained) for r in rows)
    backward += sum(_projector_backward(vision, _projected(e, plan), trained) for e, plan in images)
    backward += sum(_tower_backward(read, plan.tokens, e.stages, trained) for e, plan in images)
    if not trained.below_decoder:
        backward -= sum(_first_inputs(decoder, e.rows(depth)[0], trained.lora) for e in examples)
    again = 0
    if trained.checkpointing:
        again = sum(_layer_again(decoder, *r, trained.lora) for r in rows)
        again += sum(_tower_again(read, plan.tokens, e.stages) for e, plan in images) * trained.through_tower
    return StepFlops(seen, forward, backward, again)


# ---- vision


def _projected(example: TrainingExample, plan: SpanPlan) -> int:
    """Rows through the projector."""
    return example.left(plan) if example.projects_all else plan.entry


def _layers(shape: VisionDims, tokens: int, stages: TowerStages) -> tuple[int, int, int]:
    """The tower's layers over one image: their linear maps, their attention, and the product that ends a layer."""
    attended, widened = _rows(shape, tokens, stages)
    last = 2 * widened * shape.width * shape.mlp
    linear = 8 * attended * shape.width**2 + shape.mlp_matrices * last
    return linear, vision_flops(shape, tokens, stages=stages) - patch_flops(shape, tokens) - linear, last


def _rows(shape: VisionDims, tokens: int, stages: TowerStages) -> tuple[int, int]:
    """Rows of all layers together, in their attention and in their MLP."""
    attended = widened = 0
    for begin, end, here, going_on in stretches(shape, tokens, stages):
        rows = tower_rows(shape, here)
        attended += (end - begin) * rows
        widened += (end - begin - 1) * rows + tower_rows(shape, going_on)
    return attended, widened


def _tower_backward(shape: VisionDims, tokens: int, stages: TowerStages, trained: TrainedParts) -> int:
    linear, attention, _ = _layers(shape, tokens, stages)
    weights = linear + patch_flops(shape, tokens)  # pixels need no gradient
    return (linear + 2 * attention) * trained.through_tower + weights * trained.tower


def _tower_again(shape: VisionDims, tokens: int, stages: TowerStages) -> int:
    """Recomputation of a layer stops before the product that ends it: nothing needs its result."""
    linear, attention, last = _layers(shape, tokens, stages)
    return linear + attention - last


def _projector_backward(shape: VisionDims, rows: int, trained: TrainedParts) -> int:
    normed = shape.patches_per_token > 1  # grid mergers begin with a norm, whose weights are trained with them
    total = 0
    for place, (a, b) in enumerate(shape.projector):
        inputs = trained.through_tower or (trained.projector and (normed or place > 0))
        total += 2 * rows * a * b * (trained.projector + inputs)
    return total


# ---- decoder


def _adapters(shape: DecoderDims, rows: int, rank: int) -> int:
    """Both factors of the adapters on the seven linear maps of one layer."""
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    into = 5 * shape.hidden + wide + shape.mlp
    out = wide + 2 * narrow + 2 * shape.hidden + 2 * shape.mlp
    return 2 * rows * rank * (into + out)


def _layer(shape: DecoderDims, rows: int, layer: int, rank: int) -> int:
    return decoder_layer_flops(shape, rows, layer=layer) + _adapters(shape, rows, rank)


def _layer_backward(shape: DecoderDims, rows: int, layer: int, trained: TrainedParts) -> int:
    linear = decoder_layer_flops(shape, rows, 0, layer)
    attention = decoder_layer_flops(shape, rows, layer=layer) - linear
    return linear * (1 + trained.decoder) + 2 * attention + 2 * _adapters(shape, rows, trained.lora)


def _first_inputs(shape: DecoderDims, rows: int, rank: int) -> int:
    """Input gradients of query, key and value maps, which the first layer does without where nothing before it needs
    one."""
    return 2 * rows * shape.hidden * (shape.query_width + 2 * shape.narrow + 3 * rank)


def _layer_again(shape: DecoderDims, rows: int, layer: int, rank: int) -> int:
    """As ``_tower_again``; the product that ends a layer is the down map, or with adapters their second factor."""
    down = 0 if shape.has_experts(layer) else shape.mlp
    return _layer(shape, rows, layer, rank) - 2 * rows * shape.hidden * (rank if rank else down)
