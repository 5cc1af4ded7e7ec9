"""The inputs that a method may declare in ``requires``; only those that it declares are made for it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any


class Input(Enum):
    """One input of a method; the value is its name in lists and errors."""

    # of the vision layers that ``signal_layers`` names
    IMPORTANCE = "importance"
    """Attention of the CLS row to each token, or the attention that it receives where there is none."""
    HEAD_IMPORTANCE = "heads"
    """``IMPORTANCE`` head by head."""
    KEYS = "keys"
    """Mean keys over heads of each token."""
    QUERIES = "queries"
    """Mean queries over heads of each token."""
    STATES = "states"
    """Output rows of the layer."""

    # before the decoder
    FEATURES = "features"
    """Features that are reduced: before a point-wise projector, after a merger of grid cells."""
    PROJECTED_FEATURES = "projected_features"
    """Features as the decoder gets them; the projector then runs on all tokens."""
    GRID = "grid"
    """Coordinates of each token in its crop, and the grids of tokens and of crops."""
    QUESTION = "question"
    """Embeddings of the question's text."""
    TEXT_SIMILARITY = "text_similarity"
    """Cosine of each token and each piece of the question in the space of a text tower."""
    PROJECTOR = "projector"
    """The projector as a function."""
    QUESTION_STATE = "question_state"
    """The decoder's last hidden state of the question alone."""

    # inside the decoder
    SCORES = "scores"
    """Attention from text queries to each visual token."""
    TOKENS = "tokens"
    """The image or clip, the number and the grid of each token."""
    HIDDEN_STATES = "hidden_states"
    """Hidden states of visual tokens before the layer."""
    PREVIOUS_HIDDEN_STATES = "previous_hidden_states"
    """Hidden states of visual tokens one layer earlier."""
    TEXT_HIDDEN_STATES = "text_hidden_states"
    """Hidden states of the text queries."""
    DECODER_KEYS = "decoder_keys"
    """Rotated keys of visual tokens and text queries in the scoring layer."""
    POSITIONS = "positions"
    """Places of visual tokens and text queries in the prompt."""
    VISUAL_SELF_ATTENTION = "visual_self_attention"
    """Attention from visual tokens to each visual token."""
    GRADIENT = "gradient"
    """Gradient of the decoder's prediction by the hidden states of visual tokens."""
    TAGS = "tags"
    """Numbers that the method gave its tokens before the decoder."""

    # inside the vision tower
    PATCH_CONTRAST = "contrast"
    """Distance of each patch from the mean of its picture, before the first block."""
    PIXELS = "pixels"
    """Pixels of each patch as the processor made them."""
    BLOCK_KEYS = "block_keys"
    """Mean keys over heads of each patch in the block that has run."""
    KEY_NORM = "key_norm"
    """Mean length of a head's keys of each patch in the block that has run."""
    BLOCK_ATTENTION = "attention"
    """CLS attention of each patch, or attention received, in the block that has run."""


VISION_LAYER_INPUTS = frozenset({Input.IMPORTANCE, Input.HEAD_IMPORTANCE, Input.KEYS, Input.QUERIES, Input.STATES})
FEATURE_INPUTS = frozenset({Input.FEATURES, Input.PROJECTED_FEATURES})
QUESTION_INPUTS = frozenset({Input.QUESTION, Input.TEXT_SIMILARITY, Input.QUESTION_STATE})
ENCODER_INPUTS = VISION_LAYER_INPUTS | FEATURE_INPUTS | QUESTION_INPUTS | {Input.GRID, Input.PROJECTOR}
TEXT_QUERY_INPUTS = frozenset({Input.SCORES, Input.TEXT_HIDDEN_STATES, Input.DECODER_KEYS, Input.POSITIONS})
ATTENTION_INPUTS = frozenset({Input.SCORES, Input.DECODER_KEYS, Input.VISUAL_SELF_ATTENTION})
DECODER_INPUTS = TEXT_QUERY_INPUTS | ATTENTION_INPUTS | {
    Input.TOKENS, Input.HIDDEN_STATES, Input.PREVIOUS_HIDDEN_STATES, Input.GRADIENT, Input.TAGS,
}  # fmt: skip
TOWER_INPUTS = frozenset({Input.PATCH_CONTRAST, Input.PIXELS, Input.BLOCK_KEYS, Input.KEY_NORM, Input.BLOCK_ATTENTION})


def required(view: Any, needed: Input, fields: Mapping[Input, tuple[str, ...]]) -> Any:
    """The field of a view that an input fills, or a tuple where it fills several; ``fields``: the names of the fields
    by input.

    Raises
    ------
    ValueError
        Naming the method and the input that it did not declare, or that this view never has.
    """
    method, kind = view.method or "this method", type(view).__name__
    if needed not in fields:
        raise ValueError(
            f"{method}: {kind} has no Input.{needed.name}: choose from {', '.join(f'Input.{known.name}' for known in fields)}"
        )
    values = tuple(getattr(view, name) for name in fields[needed])
    for name, value in zip(fields[needed], values, strict=True):
        if value is None:
            raise ValueError(f"{method}: {kind}.{name} is not there: declare Input.{needed.name} in requires")
    return values if len(values) > 1 else values[0]
