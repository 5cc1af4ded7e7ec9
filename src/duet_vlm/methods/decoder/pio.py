"""PIO-FVLM: keep the visual tokens with the largest gradient of the model's own prediction, without duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from duet_vlm.ops.greedy import cosine, greedy_nms
from duet_vlm.planning.budget import Schedule
from duet_vlm.reducers.decoder import DecoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.scheduled import ScheduledReducer
from duet_vlm.reducers.scoring import ScoringRules
from duet_vlm.utils.field_types import check_choice


@register("pio")
@dataclass(frozen=True)
class Pio(ScheduledReducer):
    """PIO-FVLM, later called TRIO (arXiv 2602.04657): how much would the model's prediction change, were a visual token
    another one?

    At each stage the next layer, the last norm and the head predict from the four rows before the prompt's last one.
    The gradient of the cross entropy against the likeliest tokens is taken by the hidden states that the layer reads; a
    token's saliency is the length of its gradient. By falling saliency each token stays that resembles none before it
    (cosine below ``tau``); if these are too few, the best of the others fill up.

    Stages are before layers 1, 10 and 15 of 32, and keep 38 %, 22 % and 9 %.

    Parameters beyond ``ScheduledReducer``
    ----------
    tau : float
        Cosine from which two tokens are doubles, in [-1, 1]; 1 takes out exact doubles only.
    probe : str
        What a gradient goes through: the "next" layer, the last norm and the head; or the "last" layer once more, with
        the input embeddings in place of the head (released Qwen2.5-VL code).

    Cost: a forward and a backward through one layer per stage, the head on four rows, and cosines of all pairs of
    visual tokens. The layer's activations are held for the backward. No attention maps; parameters get no gradient.
    Inference only, and not under ``torch.inference_mode``; quantised kernels must have a backward.

    Differences from the authors' code (ocy1/TRIO): kept positions, padded batches, any image place; a stage of 0 drops
    all (released: nothing); the probe is causal under every attention implementation. ``Pio.official`` and
    ``Pio.official_qwen`` restore counts and positions, the latter also the released probe of its file.
    """

    paper = "PIO-FVLM (TRIO), arXiv 2602.04657"
    summary = "drop in stages inside the decoder: keep what the gradient of the model's own prediction is largest for, without doubles"
    paper_schedule: ClassVar[Schedule] = ((1, 218 / 576), (10, 128 / 576), (15, 54 / 576))
    requires = frozenset({Input.HIDDEN_STATES, Input.GRADIENT})

    tau: float = 0.8
    probe: str = "next"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.tau <= 1:
            raise ValueError(f"tau={self.tau}: a cosine, in [-1, 1]")
        check_choice("probe", self.probe, ("next", "last"))

    @classmethod
    def official(
        cls, layers: Sequence[int] = (1, 10, 15), counts: Sequence[int] = (218, 128, 54), **fields: Any
    ) -> Pio:
        """Return the settings of the released LLaVA code: after ``layers`` layers ``counts`` tokens are kept; compact
        positions.

        A count of 0, or one that is not below the counts before it, removes its stage.
        """
        schedule: list[tuple[int, int]] = []
        for layer, count in zip(layers, counts, strict=True):
            if count and (not schedule or count < schedule[-1][1]):
                schedule.append((layer, count))
        options = TokenOptions(positions="compact", protect_predicting_tokens=False)
        return cls.from_preset(options, fields, schedule=tuple(schedule))

    @classmethod
    def official_qwen(
        cls, layers: Sequence[int] = (1, 8, 14), ratios: Sequence[float] = (0.38, 0.59, 0.42), **fields: Any
    ) -> Pio:
        """Return the settings of the released Qwen2.5-VL code: ``ratios`` of the current tokens, truncated.

        The probe is the layer that has just run, once more, with the input embeddings as the head. The ratios are not
        published: these are those of the LLaVA stages.
        """
        schedule = tuple(zip(layers, ratios, strict=True))
        options = TokenOptions(protect_predicting_tokens=False)
        return cls.from_preset(options, fields, schedule=schedule, relative="current", rounding="int", probe="last")

    def scoring_rules(self) -> ScoringRules:
        return ScoringRules(probe=self.probe)

    def prune_tokens(self, view: DecoderView) -> Tensor:
        saliency = view.require(Input.GRADIENT).norm(dim=-1)
        most = max(stay for _, stay in view.host_counts)
        return greedy_nms(
            cosine(view.require(Input.HIDDEN_STATES), view.valid), saliency, view.valid, view.num_keep, most, self.tau
        )
