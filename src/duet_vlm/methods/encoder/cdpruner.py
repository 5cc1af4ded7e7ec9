"""CDPruner: keep vision tokens that are relevant to the question and unlike each other, before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from duet_vlm.ops.greedy import conditional_kernel, cosine, greedy_dpp_map
from duet_vlm.ops.saliency import OFFSET, min_max_scaled, relevance
from duet_vlm.planning.budget import Keep
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.score import ScoreReducer
from duet_vlm.utils.field_types import check_choice


@register("cdpruner")
@dataclass(frozen=True)
class CDPruner(ScoreReducer):
    """CDPruner (NeurIPS 2025, arXiv 2506.10967): a determinantal point process over projected tokens, conditional on
    the question.

    A token's relevance r is its similarity to the question, scaled to [0, 1] over its image. The kernel is r_i cos(i,
    j) r_j, and tokens are picked greedily by the largest determinant: relevant tokens that are unlike each other.
    Nothing is merged.

    Parameters
    ----------
    keep : int or float, optional
        Tokens kept per span: a count, or a fraction. A budget of n keeps n.
    relevance : str
        "decoder": mean cosine of the projected token and the question's token embeddings, for any model. "contrastive":
        negated mean cosine of the token in CLIP's shared space and the segments of the question (CLIP patches are least
        similar to the words for their content; the authors' rule for LLaVA): name its ``clip``, or pass ``text_tower=``
        to ``attach``; and pass ``processor=``.
    scale : str
        Relevance is scaled over each "image", or over the whole "call" (released code: a result depends on the other
        images).
    clip : str, optional
        Folder or hub id of the CLIP model that the vision tower comes from, for "contrastive". LLaVA-1.5:
        "openai/clip-vit-large-patch14-336".

    Cost: the projector runs on every token, an N x N table of cosines, and per kept token one pass over the rows chosen
    so far; 4 N^2 bytes. "contrastive": the text tower, and two small projections of each token. Needs: the question, so
    the whole model must be called. Usable in training (the choice carries no gradient).

    Differences from the authors' code (Theia-4869/CDPruner): relevance by the decoder's embeddings by default, scaled
    image by image; more tokens than feature dimensions work (the released code keeps fewer); kept positions, any batch,
    ties by index. The question is the text after the last image, template included; theirs is the bare question.
    """

    paper = "CDPruner, NeurIPS 2025, arXiv 2506.10967"
    summary = "keep projected vision tokens that are relevant to the question and unlike each other, before the decoder"

    relevance: str = "decoder"
    scale: str = "image"
    clip: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("relevance", self.relevance, ("decoder", "contrastive"))
        check_choice("scale", self.scale, ("image", "call"))
        if self.clip is not None and self.relevance != "contrastive":
            raise ValueError(f"clip={self.clip!r} is read where relevance='contrastive', not {self.relevance!r}")

    @classmethod
    def official(cls, keep: Keep = 64, **fields: Any) -> CDPruner:
        """Return the settings of the released LLaVA code: relevance in CLIP's space, scaled over the call, compact
        positions; ``keep`` patches of each crop.
        """
        options = TokenOptions(positions="compact", crops="per_crop", protect_predicting_tokens=False)
        return cls.from_preset(options, fields, keep=keep, relevance="contrastive", scale="call")

    @property
    def requires(self) -> frozenset[Input]:  # type: ignore[override]
        question = {Input.STATES, Input.TEXT_SIMILARITY} if self.relevance == "contrastive" else {Input.QUESTION}
        return frozenset({Input.PROJECTED_FEATURES} | question)

    @property
    def clip_model(self) -> str | None:
        return self.clip

    def choose(self, scores: Tensor, view: EncoderView) -> Tensor:
        kernel = conditional_kernel(cosine(view.require(Input.FEATURES), view.valid), scores)
        return greedy_dpp_map(kernel, view.valid, view.dominant, max(plan.dominant for plan in view.plans))

    def score(self, view: EncoderView) -> Tensor:
        """Relevance of each token in (0, 1], 0 for padding: [B, N]."""
        return min_max_scaled(self.likeness(view), view.valid, OFFSET, self.scale == "call")

    def likeness(self, view: EncoderView) -> Tensor:
        """Similarity of each token to the question, unscaled: [B, N]."""
        if self.relevance == "contrastive":
            similarity, valid = view.require(Input.TEXT_SIMILARITY)
            is_word = valid.float()[:, None]
            return -(similarity * is_word).sum(2) / is_word.sum(2).clamp(min=1)
        question = view.require(Input.QUESTION)
        return relevance(view.require(Input.FEATURES), question.embeddings, question.valid)
