"""The contract of a method that drops, or merges, visual tokens between decoder layers."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.base import Reducer, check_choice
from duet_vlm.reducers.decoder_view import DecoderView as DecoderView
from duet_vlm.reducers.inputs import DECODER_INPUTS

TEXT_QUERIES = ("all", "last", "salient", "raters")
TRAINING_TURNS = ("first", "all")
MULTI_IMAGE = ("joint", "per_image")


@dataclass(frozen=True)
class DecoderReducer(Reducer):
    """A method that drops, or merges, visual tokens between decoder layers.

    ``Input.SCORES`` are taken ``score_layer_offset`` layers before the drop: ``score_heads`` "mean" over heads, their
    "max", the "most" of any head and query, or "each". ``score_states``: layers that have a state in place of attention
    rank by what text would read out of it (``Adapter.linear_attention_scores``); else the last attention before them
    does. ``merges``: it merges tokens.

    Attributes
    ----------
    text_query : str
        Which text rows rank the visual tokens: "all" after the last visual token, "last", "salient" words (needs the
        processor), or "raters": of all, those that the visual tokens resemble more than the average one (SparseVLM,
        arXiv 2410.04417, section 3.2).
    training_turns : str
        With labels, take the queries of the "first" turn only (later questions do not choose for earlier answers) or of
        "all".
    multi_image : str
        With several images (or clips) in a prompt, "joint": all their tokens are ranked together, so that an image that
        matters more to the text keeps more; their sum is what is planned (released code). "per_image": every image is
        ranked by itself and keeps its own share.
    trim_kv_cache : bool
        False: every layer keeps the keys and values of all that it read. True: once the prompt is read, those of visual
        tokens that did not reach the last layer are removed from the caches of earlier ones, too.
    """

    available = DECODER_INPUTS
    score_heads: ClassVar[str] = "mean"
    score_states: ClassVar[bool] = False

    text_query: str = "all"
    training_turns: str = "first"
    multi_image: str = "joint"
    trim_kv_cache: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("text_query", self.text_query, TEXT_QUERIES)
        check_choice("training_turns", self.training_turns, TRAINING_TURNS)
        check_choice("multi_image", self.multi_image, MULTI_IMAGE)

    def with_paper_schedule(self, depth: int, share: float | None = None) -> DecoderReducer:
        """This method as a composition runs it in a decoder of ``depth`` layers: where its settings leave the drops to
        a budget, with those that its paper uses; ``share``: of a span's tokens, that the budget allows, where there is
        one."""
        return self

    @abstractmethod
    def prune_tokens(self, view: DecoderView) -> Tensor | Selection:
        """Mask [B, V] of the tokens that stay; exactly ``view.num_keep`` of each row's ``view.valid``. Or, where others
        are merged into these, a ``Selection`` of as many rows: they stand where the tokens stood that ``index`` names;
        with renumbered positions, in that order."""
