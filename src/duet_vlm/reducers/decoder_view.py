"""What a decoder reducer may look at. A method names what it needs, the flow makes only that."""

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
    """What a decoder reducer may look at at one drop; B samples with up to V visual tokens alive. With ``multi_image="per_image"`` the rows are spans.

    ``valid`` [B, V], ``keep`` [B] how many stay; ``counts`` the same on the host: (there now, stay) of each row. ``scores`` [B, V] float32: attention
    from the text queries (None unless required), [B, V, H] with ``score_heads`` "each". With ``Input.TOKENS``: ``spans`` lists, for
    every span of the call, its number within its sample and its unreduced token count, ``grids`` its (rows, columns) or None; ``span`` [B, V] is
    each token's row of that list and ``token`` [B, V] its number within the span.

    The others are None unless the method requires them; all are without gradient. D is the decoder's width, Q the most text queries.

    - "hidden_states": ``hidden_states`` [B, V, D], the hidden states that the layer behind the drop would read.
    - "previous_hidden_states": ``previous_hidden_states`` [B, V, D], the same tokens' one layer earlier.
    - "text_hidden_states": ``text_hidden_states`` [B, Q, D], the hidden states of the text queries; ``text_valid`` [B, Q].
    - "keys": ``keys`` [B, V, w] and ``text_keys`` [B, Q, w], rotated keys of the scoring layer, its heads side by side.
    - "positions": ``positions`` [B, V] and ``text_positions`` [B, Q], their places in the prompt, counted from its first real token.
    - "visual_self_attention": ``visual_self_attention`` [B, V], attention from the visual rows themselves, as ``scores``.
    - "gradient": ``gradient`` [B, V, D] float32, of the decoder's own prediction after one more layer (``flow.probe``) by the tokens' hidden states.
    - "tags": ``tags`` [B, V] float32, what the method noted of the rows before the decoder (``Selection.tags``); 0 where it did not.

    ``normed`` is the decoder's last norm, a function of rows [..., D].
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
        """What an input that the method has declared fills.

        ``Input.TOKENS``: ``span_index``, ``token_index``; ``Input.TEXT_HIDDEN_STATES``: ``text_hidden_states``, ``text_valid``; ``Input.DECODER_KEYS``:
        ``keys``, ``text_keys``; ``Input.POSITIONS``: ``positions``, ``text_positions``; any other: its one field.

        Raises
        ------
        ValueError
            Naming the method and the input, if the method has not declared it.
        """
        return required(self, needed, FIELDS)
