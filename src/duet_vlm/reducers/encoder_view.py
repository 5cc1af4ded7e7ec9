"""What an encoder reducer may look at. A method names what it needs, the flow makes only that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, overload

from torch import Tensor, nn

from duet_vlm.planning.budget import SpanPlan
from duet_vlm.reducers.inputs import Input, required

Layer = int | float | None  # its number, a share of the tower's depth, or the family's own choice
Change = Callable[[Tensor], Tensor]
LAYER_FIELDS = {  # the fields that an input fills
    Input.IMPORTANCE: ("importance",),
    Input.HEAD_IMPORTANCE: ("heads",),
    Input.KEYS: ("keys",),
    Input.QUERIES: ("queries",),
    Input.STATES: ("states",),
}
FIELDS = {
    Input.IMPORTANCE: ("importance",),
    Input.KEYS: ("keys",),
    Input.FEATURES: ("features",),
    Input.PROJECTED_FEATURES: ("features",),
    Input.GRID: ("coords", "grid_size", "crop_grid"),
    Input.QUESTION: ("question",),
    Input.TEXT_SIMILARITY: ("text_similarity", "text_similarity_valid"),
    Input.PROJECTOR: ("project",),
    Input.QUESTION_STATE: ("question_state",),
}


@dataclass(frozen=True)
class LayerView:
    """What one vision layer says of B spans of up to N tokens; None what the method does not require.

    ``importance`` [B, N] is the attention of the CLS row, summed over heads, or what a token receives where the tower has none; ``heads``
    [B, N, H] the same head by head; ``keys`` and ``queries`` [B, N, d] are means over heads; ``states`` [B, N, C] are the rows that leave the
    layer. A token of several patches has their means.
    """

    importance: Tensor | None = None
    heads: Tensor | None = None
    keys: Tensor | None = None
    queries: Tensor | None = None
    states: Tensor | None = None
    method: str = ""

    def tensors(self) -> list[Tensor]:
        """What is there."""
        return [x for x in (getattr(self, each.name) for each in fields(self)) if isinstance(x, Tensor)]


@dataclass(frozen=True)
class QuestionView:
    """What the prompt asks of each span: ``rows`` [B, T, D] as the decoder gets them, of which ``valid`` [B, T] are real.

    The text behind the last picture of the span's sample (with labels, what stands there in front of the first answer); where there is none,
    all of the sample's text.
    """

    embeddings: Tensor
    valid: Tensor


@dataclass(frozen=True)
class EncoderView:
    """What an encoder reducer may look at; B spans of up to N tokens.

    ``valid`` [B, N]; ``dominant`` and ``contextual`` [B] are the planned counts, ``plans`` the same on the host. ``features`` [B, N, C] are the
    rows that are being reduced, without gradient: tower features in front of a point-wise projector, merged rows of a grid merger, projected
    rows for methods that require those, None for those that require neither. ``parts`` [B, N] is the
    number of the crop, tile or frame that each row shows, -1 for padding and structure rows; with ``stream`` "video" parts are steps of
    time, all with equally many rows in the same order. ``most`` bounds their number and their rows where the host knows them (None: look).

    ``layers`` are the vision layers that the method names (``signal_layers``), in its order; ``importance`` and ``keys`` are those of the first.
    All else is None unless required. "grid": ``place`` [B, N, 2], row and column of each token within its part, counted in what
    the part had as a whole (-1 where it shows no picture), ``sides`` [B, 2] rows and columns of a part, and ``tiles`` [B, 2] rows and columns of
    the crops that follow the overview (0: the picture was not cut). "question": the ``question``. "similar": cosine of each token and each piece of
    the question in the space of the text tower that the user passed, ``similar`` [B, N, c], of which ``pieces`` [B, c] are real.
    "projector": ``project(change)`` runs the projector in float32 on what ``change`` makes of its input [..., C], and returns its rows
    [B, N, D]. "decoded": ``decoded`` [B, D], what the decoder makes of the question when it reads nothing else: the last word's hidden state
    behind the last norm, without gradient (zeros where there is no text).

    ``module``: of a compressor, the module that makes its rows; ``features`` then carry a gradient where they have one.
    """

    valid: Tensor
    dominant: Tensor
    contextual: Tensor
    plans: tuple[SpanPlan, ...]
    importance: Tensor | None = None
    keys: Tensor | None = None
    features: Tensor | None = None
    parts: Tensor | None = None
    modality: str = "image"
    layers: tuple[LayerView, ...] = ()
    coords: Tensor | None = None
    grid_size: Tensor | None = None
    crop_grid: Tensor | None = None
    question: QuestionView | None = None
    text_similarity: Tensor | None = None
    text_similarity_valid: Tensor | None = None
    project: Callable[[Change], Tensor] | None = None
    question_state: Tensor | None = None
    module: nn.Module | None = None
    max_parts: tuple[int, int] | None = None
    method: str = ""

    @overload
    def require(self, needed: Literal[Input.QUESTION]) -> QuestionView: ...
    @overload
    def require(self, needed: Literal[Input.PROJECTOR]) -> Callable[[Change], Tensor]: ...
    @overload
    def require(self, needed: Literal[Input.GRID]) -> tuple[Tensor, Tensor, Tensor]: ...
    @overload
    def require(self, needed: Literal[Input.TEXT_SIMILARITY]) -> tuple[Tensor, Tensor]: ...
    @overload
    def require(self, needed: Input, layer: int | None = None) -> Tensor: ...
    def require(self, needed: Input, layer: int | None = None) -> Any:
        """What an input that the method has declared fills, of the view or of one of its ``layers``.

        ``Input.GRID``: ``coords``, ``grid_size``, ``crop_grid``; ``Input.TEXT_SIMILARITY``: ``text_similarity``, ``text_similarity_valid``; any other:
        its one field.

        Raises
        ------
        ValueError
            Naming the method and the input, if the method has not declared it.
        """
        if layer is None:
            return required(self, needed, FIELDS)
        return required(replace(self.layers[layer], method=self.method), needed, LAYER_FIELDS)

    def require_parts(self) -> Tensor:
        """``parts``, which every view of a prompt has; a ValueError for one made without."""
        if self.parts is None:
            raise ValueError(f"{self.method or 'this method'}: EncoderView.parts is not there: give the crop or frame of each token")
        return self.parts

    def require_module(self) -> nn.Module:
        """``module``, which every view of a compressor has; a ValueError for one made without."""
        if self.module is None:
            raise ValueError(f"{self.method or 'this method'}: EncoderView.module is not there: give the module that makes the rows")
        return self.module

    def select_rows(self, rows: Change, spans: Change = lambda x: x) -> EncoderView:
        """The view of other rows: ``rows`` picks from tensors [B, N, ...], ``spans`` from those that have one entry for each span [B, ...]."""

        def some(x: Tensor | None, pick: Change = rows) -> Tensor | None:
            return None if x is None else pick(x)

        layers = tuple(LayerView(some(layer.importance), some(layer.heads), some(layer.keys), some(layer.queries), some(layer.states)) for layer in self.layers)
        importance, keys = (layers[0].importance, layers[0].keys) if layers else (some(self.importance), some(self.keys))
        asked, project = self.question, self.project
        return replace(
            self, valid=rows(self.valid), importance=importance, keys=keys, features=some(self.features), parts=some(self.parts), layers=layers,
            coords=some(self.coords), text_similarity=some(self.text_similarity), grid_size=some(self.grid_size, spans), crop_grid=some(self.crop_grid, spans),
            text_similarity_valid=some(self.text_similarity_valid, spans), question_state=some(self.question_state, spans),
            question=None if asked is None else QuestionView(spans(asked.embeddings), spans(asked.valid)),
            project=None if project is None else lambda change: rows(project(change)),
        )  # fmt: skip

    def finite_inputs(self) -> list[Tensor]:
        """What it holds of each token [B, N] or [B, N, c]: numbers that have to be finite."""
        first = () if self.layers else (self.importance, self.keys)
        of_layers = [x for layer in self.layers for x in layer.tensors()]
        return [*of_layers, *(x for x in (*first, self.features, self.text_similarity) if x is not None)]
