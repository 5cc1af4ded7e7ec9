"""The view of a method inside the decoder; only inputs that it requires are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, overload

from torch import Tensor

from duet_vlm.reducers.inputs import Input, required

FIELDS = {  # the fields that an input fills
    Input.SCORES: ("scores",),
    Input.TOKENS: ("span_index", "token_index"),
    Input.HIDDEN_STATES: ("hidden_states",),
    Input.PREVIOUS_HIDDEN_STATES: ("previous_hidden_states",),
    Input.TEXT_HIDDEN_STATES: ("text_hidden_states", "text_valid"),
    Input.DECODER_KEYS: ("keys", "text_keys"),
    Input.POSITIONS: ("positions", "text_positions"),
    Input.VISUAL_SELF_ATTENTION: ("visual_self_attention",),
    Input.GRADIENT: ("gradient",),
    Input.TAGS: ("tags",),
}
Pair = Literal[Input.TOKENS, Input.TEXT_HIDDEN_STATES, Input.DECODER_KEYS, Input.POSITIONS]


def _unchanged(rows: Tensor) -> Tensor:
    return rows


@dataclass(frozen=True)
class DecoderView:
    """Inputs of a method at one drop inside the decoder, for B samples of up to V visual tokens that are left, or
    with re-entry of those that entered.

    With ``multi_image="per_image"`` the rows are spans instead of samples. What the method does not list in
    ``requires`` is None; nothing carries a gradient. D is the width of the decoder, Q the largest number of text
    queries.

    Attributes
    ----------
    valid : Tensor
        [B, V] bool, False for padding.
    num_keep : Tensor
        [B] long, tokens to keep of each row.
    host_counts : tuple of (int, int)
        The same on the host: tokens that are there, tokens to keep.
    spans : tuple of (int, int)
        For every span of the call: its number in its sample, and its unreduced number of tokens.
    grids : tuple of (int, int) or None
        Rows and columns of each of ``spans``, where the family has them.
    span_index, token_index : Tensor or None
        [B, V] long, entry of ``spans`` that each token belongs to, and its number there. Need ``Input.TOKENS``.
    scores : Tensor or None
        [B, V] float32 attention from the text queries; [B, V, H] where ``ScoringRules.score_heads`` is "each". Needs
        ``Input.SCORES``.
    hidden_states : Tensor or None
        [B, V, D] hidden states that the layer after the drop would read. Needs ``Input.HIDDEN_STATES``.
    previous_hidden_states : Tensor or None
        [B, V, D] those of the same tokens one layer earlier. Needs ``Input.PREVIOUS_HIDDEN_STATES``.
    text_hidden_states, text_valid : Tensor or None
        [B, Q, D] hidden states of the text queries, and [B, Q] bool. Need ``Input.TEXT_HIDDEN_STATES``.
    keys, text_keys : Tensor or None
        [B, V, w] and [B, Q, w] rotated keys of the scoring layer, heads side by side. Need ``Input.DECODER_KEYS``.
    positions, text_positions : Tensor or None
        [B, V] and [B, Q] long, places in the prompt, counted from its first token that is no padding. Need
        ``Input.POSITIONS``.
    visual_self_attention : Tensor or None
        [B, V] float32 attention from the visual tokens themselves. Needs ``Input.VISUAL_SELF_ATTENTION``.
    gradient : Tensor or None
        [B, V, D] float32 gradient of the decoder's own prediction by the tokens' hidden states. Needs
        ``Input.GRADIENT``.
    tags : Tensor or None
        [B, V] float32 numbers that the method gave its tokens before the decoder (``Selection.tags``), else 0. Needs
        ``Input.TAGS``.
    final_norm : callable
        The decoder's last norm, of rows [..., D].
    method : str
        Name of the method, for errors.
    """

    valid: Tensor
    num_keep: Tensor
    spans: tuple[tuple[int, int], ...] = ()
    span_index: Tensor | None = None
    token_index: Tensor | None = None
    scores: Tensor | None = None
    host_counts: tuple[tuple[int, int], ...] = ()
    grids: tuple[tuple[int, int] | None, ...] = ()
    hidden_states: Tensor | None = None
    previous_hidden_states: Tensor | None = None
    text_hidden_states: Tensor | None = None
    text_valid: Tensor | None = None
    keys: Tensor | None = None
    text_keys: Tensor | None = None
    positions: Tensor | None = None
    text_positions: Tensor | None = None
    visual_self_attention: Tensor | None = None
    gradient: Tensor | None = None
    tags: Tensor | None = None
    final_norm: Callable[[Tensor], Tensor] = _unchanged
    method: str = ""

    @overload
    def require(self, needed: Pair) -> tuple[Tensor, Tensor]: ...
    @overload
    def require(self, needed: Input) -> Tensor: ...
    def require(self, needed: Input) -> Any:
        """The field, or fields, of an input that the method has declared.

        ``Input.TOKENS``: ``span_index``, ``token_index``; ``Input.TEXT_HIDDEN_STATES``: ``text_hidden_states``,
        ``text_valid``; ``Input.DECODER_KEYS``: ``keys``, ``text_keys``; ``Input.POSITIONS``: ``positions``,
        ``text_positions``; any other: its one field.

        Raises
        ------
        ValueError
            Naming the method and the input, if the method has not declared it.
        """
        return required(self, needed, FIELDS)
