"""D2Pruner: one early drop inside the decoder by attention without position bias, then by dissimilarity."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from duet_vlm.methods.decoder.position_prior import PositionBiasObserver, bias_of
from duet_vlm.ops.graph import closeness, independent_set, rescaled
from duet_vlm.ops.merge import unit_rows
from duet_vlm.ops.ragged import upload
from duet_vlm.planning.budget import Schedule
from duet_vlm.reducers.calibration import Calibration, read
from duet_vlm.reducers.decoder import DecoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.observer import Observer
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.scheduled import ScheduledReducer
from duet_vlm.utils.field_types import FILE

LEAST = 1e-7
LAYER = 2


@register("d2pruner")
@dataclass(frozen=True)
class D2Pruner(ScheduledReducer):
    """D2Pruner (AAAI 2026): attention corrected for position bias, and structural diversity.

    The attention of the last text token is divided by a stored prior: the mean attention that each place of the grid
    receives over many images. Most of the budget goes to the best tokens by this ratio. The rest is picked in the same
    order from tokens that are not similar to any picked one (a maximal independent set of the graph whose edges join
    tokens that are alike in hidden state and place); where these run out, by the ratio again.

    Parameters beyond ``ScheduledReducer`` (one stage, before layer 2 of any depth, keeps 2/9)
    ----------
    prior : str or None
        Path of a file that ``duet-vlm calibrate d2pruner`` made for this model. None: a uniform prior, plain attention.
    resize : bool
        Where the prior has no such grid, interpolate it from the largest stored one; False: an error.
    important : float
        Share of the kept tokens that is chosen by the ratio alone, in [0, 1].
    semantic : float
        Weight of similarity (cosine of hidden states, rescaled to [0, 1]) against closeness, in [0, 1]; the paper has 1
        for questions, 0.5 for grounding.
    alike : float
        Two tokens are joined by an edge where the weighted sum is above this, in [0, 1].

    Cost: one key projection, one query row, cosines of all pairs of visual tokens, and a step for each token that the
    graph chooses. Needs: text after the image. Usable in training (the choice carries no gradient).

    From the paper: no code was available. Chosen here: closeness is 1 / (1 + distance in the grid), 0 between images;
    cosines are rescaled between the smallest and largest of two different tokens of the prompt; tokens that are similar
    to an important token are not picked; the prior is per grid, and an unknown grid counts as one line; attention is
    the mean over heads at layer 1.
    """

    paper = "D2Pruner, AAAI 2026, arXiv 2512.19443, from the paper"
    summary = "one early drop inside the decoder by attention without position bias, then by what resembles no other"
    paper_schedule: ClassVar[Schedule] = ((LAYER, 2 / 9),)
    min_layer: ClassVar[int] = LAYER
    score_layer_offset = 1
    requires = frozenset({Input.SCORES, Input.TOKENS, Input.HIDDEN_STATES})

    default_options = TokenOptions(text_query="last")
    prior: str | None = field(default=None, metadata=FILE)
    resize: bool = False
    important: float = 0.7
    semantic: float = 1.0
    alike: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("important", "semantic", "alike"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: a number in [0, 1]")
        self.calibration()

    @classmethod
    def observer(cls) -> Observer:
        return PositionBiasObserver(layer=LAYER)

    def calibration(self) -> Calibration | None:
        return None if self.prior is None else read(self.prior, "d2pruner", "prior")

    def prune_tokens(self, view: DecoderView) -> Tensor:
        scores = view.require(Input.SCORES)
        stored, valid = self.calibration(), view.valid
        relative = scores if stored is None else scores / (bias_of(stored, view, self.resize) + LEAST)
        most = max(stay - int(stay * self.important) for _, stay in view.host_counts)
        return independent_set(relative, self._joined(view) > self.alike, valid, view.num_keep, self.important, most)

    def _joined(self, view: DecoderView) -> Tensor:
        span_index, token_index = view.require(Input.TOKENS)
        unit = unit_rows(view.require(Input.HIDDEN_STATES))
        likeness = rescaled(unit @ unit.transpose(1, 2), view.valid)
        if self.semantic == 1:
            return likeness
        sides = [size if grid is None else grid[1] for (_, size), grid in zip(view.spans, view.grids, strict=True)]
        width = upload(sides, span_index.device)[span_index].clamp(min=1)
        near = closeness(token_index // width, token_index % width) * (span_index[:, None] == span_index[..., None])
        return self.semantic * likeness + (1 - self.semantic) * near
