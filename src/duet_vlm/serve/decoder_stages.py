"""Stages of a decoder that drops visual tokens between its layers: runs of layers that read the same rows.

Stage 0 reads all rows that entered, stage ``s`` those that the first ``s`` drops left. Numbers of rows follow from
plans, so a server knows them before anything runs; only *which* rows stay depends on the model.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from duet_vlm.planning.budget import SpanPlan
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.decoder import DecoderReducer
from duet_vlm.reducers.inputs import DECODER_INPUTS, Input

INPUTS = frozenset({
    Input.SCORES, Input.HIDDEN_STATES, Input.PREVIOUS_HIDDEN_STATES, Input.TEXT_HIDDEN_STATES, Input.DECODER_KEYS, Input.POSITIONS,
})  # fmt: skip
SERVED_OPTIONS: dict[str, tuple[object, ...]] = {
    "text_query": ("all", "last"),
    "multi_image": ("joint",),
    "trim_kv_cache": (False,),
    "reentry": ("none",),
}
SERVED_RULES: dict[str, tuple[object, ...]] = {"score_mask": ("causal",), "score_positions": ("as_is",)}
REASONS = {
    "text_query": "the engine shows the decoder token numbers, and no words of the question",
    "score_mask": "rows are ranked by the causal attention that the engine computes",
    "score_positions": "attention divided by what positions give is not made here",
    "multi_image": "a server ranks all images of a prompt together",
    "trim_kv_cache": "each layer's cache holds what it read",
    "reentry": "a server's stages hand on the rows that stay",
}


@dataclass(frozen=True)
class DecoderStages:
    """The layers of a decoder by what they read.

    Attributes
    ----------
    depth : int
        Layers of the decoder.
    starts : tuple of int
        The first layer of each stage behind stage 0, strictly increasing, from 1 to ``depth - 1``: rows leave in front
        of it.
    """

    depth: int
    starts: tuple[int, ...]

    def __post_init__(self) -> None:
        bounds = (0, *self.starts, self.depth)
        if any(a >= b for a, b in zip(bounds, bounds[1:], strict=False)):
            raise ValueError(f"starts={self.starts}: strictly increasing layers from 1 to {self.depth - 1} are needed")

    @classmethod
    def of(cls, plans: Iterable[SpanPlan], depth: int) -> DecoderStages:
        """The stages that all ``plans`` fit in: one begins wherever the count of any of them changes.

        Raises
        ------
        ValueError
            A plan that drops in front of layer 0: it has no layer that reads all rows.
        """
        starts: set[int] = set()
        for plan in plans:
            if plan.counts[0] != plan.entry:
                raise ValueError(
                    f"{plan.entry - plan.counts[0]} of {plan.entry} visual tokens leave in front of decoder layer 0, and a server ranks "
                    "them with a layer that read them all: drop before layer 1 or later"
                )
            starts |= {layer for layer in range(1, depth) if plan.counts[layer] != plan.counts[layer - 1]}
        return cls(depth, tuple(sorted(starts)))

    def __len__(self) -> int:
        return len(self.starts) + 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Layers of each stage."""
        bounds = (0, *self.starts, self.depth)
        return tuple(b - a for a, b in zip(bounds, bounds[1:], strict=False))

    def of_layer(self, layer: int) -> int:
        """The stage that ``layer`` belongs to."""
        return bisect_right(self.starts, layer)

    def counts(self, plan: SpanPlan) -> tuple[int, ...]:
        """Rows of a span that each stage reads: those that entered first.

        Raises
        ------
        ValueError
            A plan with a drop where no stage begins; the message names the layer and the size of the span.
        """
        for layer in range(1, self.depth):
            if layer not in self.starts and plan.counts[layer] != plan.counts[layer - 1]:
                raise ValueError(
                    f"an image of {plan.tokens} visual tokens would drop before decoder layer {layer}, and this server drops before "
                    f"{', '.join(map(str, self.starts)) or 'none'}: choose another budget or an image of another size"
                )
        return (plan.entry, *(plan.counts[start] for start in self.starts))


def check_decoder_method(reducer: Reducer) -> None:
    """Refuse a method whose drops inside the decoder a server cannot make.

    Raises
    ------
    ValueError
        Names the method, what it asks for, and what to do.
    """
    name = reducer.name
    if not isinstance(reducer, DecoderReducer):
        raise ValueError(f"{name}: it drops nothing inside the decoder; serve its first stage (stages='first')")
    if reducer.merges:
        raise ValueError(
            f"{name}: it merges visual tokens inside the decoder, and a server only drops them there; take duet or fastv"
        )
    if reducer.calibration() is not None:
        raise ValueError(f"{name}: it is calibrated for one model, which a server cannot check; take duet or fastv")
    if Input.TOKENS in reducer.requires:
        raise ValueError(
            f"{name}: it reads where tokens stood in their images, and the engine does not show that; take duet or fastv"
        )
    if beyond := reducer.requires & DECODER_INPUTS - INPUTS:
        needed, made = (", ".join(sorted(each.value for each in inputs)) for inputs in (beyond, INPUTS))
        raise ValueError(f"{name}: it needs {needed}, and a server makes only {made}; take duet or fastv")
    if reducer.score_layer_offset not in (0, 1):
        reason = f"it ranks {reducer.score_layer_offset} layers before a drop"
        raise ValueError(
            f"{name}: {reason}, and a server ranks with the layer behind the drop or the one before it; take duet or fastv"
        )
    if reducer.extra_stages(64):
        raise ValueError(
            f"{name}: it looks at rows in layers that drop none, and a server asks only at drops; take duet or fastv"
        )
    for holder, served in ((reducer.options, SERVED_OPTIONS), (reducer.scoring_rules(), SERVED_RULES)):
        for setting, allowed in served.items():
            if (value := getattr(holder, setting)) not in allowed:
                raise ValueError(
                    f"{name}: {setting}={value!r}: {REASONS[setting]}; set {' or '.join(map(repr, allowed))}"
                )
