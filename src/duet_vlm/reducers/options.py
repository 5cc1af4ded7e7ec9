"""Options that methods share: policies of the runtime around a method's own choice, with a default for each method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from duet_vlm.utils.field_types import check_choice, check_names, check_type

QUERIES = 256  # rows of a picture that rank its tokens where the tower has no CLS row


class Unset(Enum):
    """The value of an option that is left to the method."""

    OWN = "the method's own"

    def __repr__(self) -> str:
        return f"<{self.value}>"


OWN: Any = Unset.OWN


@dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """Options of how visual tokens are treated, whatever the method; one that is left out is the method's own.

    A method has those of its stages: of all methods the first group, then those of methods that reduce before the
    decoder, inside the decoder, and inside the vision tower.

    Attributes
    ----------
    positions : str
        "keep": survivors keep their original position; "compact": positions are renumbered after every reduction.
    protect_predicting_tokens : bool
        A visual row whose logits predict text (the last row of a prompt that ends in an image; in training, one in
        front of a label) never leaves the sequence. It counts: one that the method had left out comes on top of its
        plan. False: it leaves like any other (released code).
    small_image_tokens : int
        Spans of fewer visual tokens than this (inside the tower: crops and frames) that a fractional budget cannot be
        met on are reduced to the method's floor instead of an error; 0: always an error.
    cls_token : bool
        Before the decoder: feed the tower's CLS row as a visual token (released code of DUET-VLM and VisionZip). It
        counts among the dominant tokens; needs ``positions="compact"`` and a tower with a CLS row.
    signal_layer : int or None
        Vision layer whose attention is read; None: the model family's choice.
    signal_queries : int or None
        In a tower without a CLS row: number of rows of each picture, spread over its grid, whose attention ranks the
        tokens. None: all of them (released code). The cost is this number times the number of tokens.
    crops : str
        "joint": all crops of an image or frames of a clip are reduced together; "per_crop": each by itself, within one
        budget, with the method's own counts per crop; "auto": what the model family's documentation states.
    newline_tokens : str
        "drop": newline rows of packed crops leave first when their image is reduced; "keep": all of them enter, within
        the budget.
    text_query : str
        Inside the decoder: which text rows rank the visual tokens: "all" after the last visual token, "last", "salient"
        words (needs the processor), or "raters": of all, those that the visual tokens resemble more than the average
        one (SparseVLM, arXiv 2410.04417, section 3.2).
    training_turns : str
        With labels, take the queries of the "first" turn only (later questions do not choose for earlier answers) or of
        "all".
    skip_unanswered : bool
        Samples without any supervised label stay whole in training.
    multi_image : str
        With several images (or clips) in a prompt, "joint": all their tokens are ranked together, so that an image that
        matters more to the text keeps more; their sum is what is planned (released code). "per_image": every image is
        ranked by itself and keeps its own share.
    trim_kv_cache : bool
        False: every layer keeps the keys and values of all that it read. True: once the prompt is read, those of visual
        tokens that did not reach the last layer are removed from the caches of earlier ones, too.
    reentry : str
        Inside the decoder: what happens to a visual token that a layer leaves out. "none": it is gone. With "stage" and
        "layer" it sleeps: no layer computes it or attends to it, its hidden state stays as it is, and every later
        decision is among all tokens that entered. "stage" decides where the method does, "layer" in front of every
        layer from the first decision on.
    proportional_attention : bool
        Inside the vision tower: count each dropped unit with the one that is most like it (cosine of patch embeddings,
        or of keys): the kept unit weighs as many rows as it stands for, in the tower's attention and in rankings by it.
        Kernels without a bias (flash attention) go without.
    pooled_context_tokens : int
        Rows that stand for the dropped units of a picture; 0: none. Before the first block these, line by line, form so
        many groups of equal size. The mean of a group goes through the tower at the place of its middle unit, with the
        weight of its members, and leaves after it. ``proportional_attention`` then plays no part.

    Raises
    ------
    ValueError, TypeError
        A value out of its range, or of another type.
    """

    positions: str = OWN
    protect_predicting_tokens: bool = OWN
    small_image_tokens: int = OWN
    cls_token: bool = OWN
    signal_layer: int | None = OWN
    signal_queries: int | None = OWN
    crops: str = OWN
    newline_tokens: str = OWN
    text_query: str = OWN
    training_turns: str = OWN
    skip_unanswered: bool = OWN
    multi_image: str = OWN
    trim_kv_cache: bool = OWN
    reentry: str = OWN
    proportional_attention: bool = OWN
    pooled_context_tokens: int = OWN

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is OWN:
                continue
            object.__setattr__(self, each.name, check_type(each.name, each.type, value))
            if each.name in CHOICES:
                check_choice(each.name, value, CHOICES[each.name])
            elif each.name in LEAST and value is not None and value < LEAST[each.name][0]:
                raise ValueError(f"{each.name}={value}: {LEAST[each.name][1]}")

    @classmethod
    def of(cls, given: TokenOptions | Mapping[str, Any] | None) -> TokenOptions:
        """Options as such, or as plain values (of JSON); None: none are given."""
        if isinstance(given, cls):
            return given
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"options={given!r}: give duet_vlm.TokenOptions(...), or a mapping of its fields")
        values = dict(given or {})
        check_names("TokenOptions", values, NAMES)
        return cls(**values)

    def given(self) -> dict[str, Any]:
        """The options that are not left to the method."""
        return {name: value for name in NAMES if (value := getattr(self, name)) is not OWN}

    def overlaid(self, other: TokenOptions) -> TokenOptions:
        """These options, with those that ``other`` gives in their place."""
        return TokenOptions(**self.given() | other.given())

    def __repr__(self) -> str:
        return f"TokenOptions({', '.join(f'{name}={value!r}' for name, value in self.given().items())})"


NAMES = tuple(each.name for each in fields(TokenOptions))
CHOICES: dict[str, tuple[str, ...]] = {
    "positions": ("keep", "compact"),
    "crops": ("auto", "joint", "per_crop"),
    "newline_tokens": ("drop", "keep"),
    "text_query": ("all", "last", "salient", "raters"),
    "training_turns": ("first", "all"),
    "multi_image": ("joint", "per_image"),
    "reentry": ("none", "stage", "layer"),
}
LEAST = {
    "small_image_tokens": (0, "a number of visual tokens, at least 0 (0 clamps nothing)"),
    "signal_queries": (1, "a number of rows, at least 1, or None for all"),
    "pooled_context_tokens": (0, "a number of rows for what leaves a picture, at least 0"),
}
