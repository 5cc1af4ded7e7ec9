"""The view of a method before the decoder; only inputs that it requires are made."""

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
    """Signals of one vision layer for B spans of up to N tokens; a token of several patches has their means.

    Attributes
    ----------
    importance : Tensor or None
        [B, N] attention of the CLS row, summed over heads; in a tower without one, attention that a token receives.
        Needs ``Input.IMPORTANCE``.
    heads : Tensor or None
        [B, N, H] the same head by head. Needs ``Input.HEAD_IMPORTANCE``.
    keys, queries : Tensor or None
        [B, N, d] means over heads. Need ``Input.KEYS``, ``Input.QUERIES``.
    states : Tensor or None
        [B, N, C] output rows of the layer. Needs ``Input.STATES``.
    method : str
        Name of the method, for errors.
    """

    importance: Tensor | None = None
    heads: Tensor | None = None
    keys: Tensor | None = None
    queries: Tensor | None = None
    states: Tensor | None = None
    method: str = ""

    def tensors(self) -> list[Tensor]:
        """The signals that were made."""
        return [x for x in (getattr(self, each.name) for each in fields(self)) if isinstance(x, Tensor)]


@dataclass(frozen=True)
class QuestionView:
    """The question that belongs to each span, as the decoder gets it.

    It is the text after the last image of the span's sample (with labels, up to the first answer); where there is none,
    all of the sample's text.

    Attributes
    ----------
    embeddings : Tensor
        [B, T, D].
    valid : Tensor
        [B, T] bool, False for padding.
    """

    embeddings: Tensor
    valid: Tensor


@dataclass(frozen=True)
class EncoderView:
    """Inputs of a method before the decoder, for B spans of up to N tokens.

    What the method does not list in ``requires`` is None. ``require`` gives an input, or an error that names what to
    declare.

    Attributes
    ----------
    valid : Tensor
        [B, N] bool, False for padding.
    dominant, contextual : Tensor
        [B] long, planned rows of each span: kept, and made by merging.
    plans : tuple of SpanPlan
        The plan of each span, on the host.
    importance, keys : Tensor or None
        Those of the first of ``layers``: [B, N], [B, N, d].
    features : Tensor or None
        [B, N, C] rows that are reduced, without gradient: tower features before a point-wise projector, merged rows of
        a grid merger. With ``Input.PROJECTED_FEATURES`` rows as the decoder gets them. Of a compressor they carry a
        gradient.
    parts : Tensor or None
        [B, N] long, crop, tile or frame of each token; -1 for padding and separator rows. In a video all have equally
        many rows, in one order.
    modality : str
        "image" or "video".
    layers : tuple of LayerView
        The vision layers that ``signal_layers`` names, in that order.
    coords : Tensor or None
        [B, N, 2] long, row and column of each token in its crop; -1 for padding and separator rows. Needs
        ``Input.GRID``.
    grid_size : Tensor or None
        [B, 2] long, rows and columns of a crop. Needs ``Input.GRID``.
    crop_grid : Tensor or None
        [B, 2] long, rows and columns of the crops that follow the overview; 0 where the image was not cut. Needs
        ``Input.GRID``.
    question : QuestionView or None
        Needs ``Input.QUESTION``.
    text_similarity : Tensor or None
        [B, N, c] cosine of each token and each piece of the question in the space of a text tower. Needs
        ``Input.TEXT_SIMILARITY``.
    text_similarity_valid : Tensor or None
        [B, c] bool, False for padding among the pieces.
    project : callable or None
        ``project(change)`` runs the projector in float32 on ``change`` of its input [..., C] and returns [B, N, D].
        Needs ``Input.PROJECTOR``.
    question_state : Tensor or None
        [B, D] last hidden state, after the last norm, of a decoder that reads the question alone; without gradient,
        zeros where there is no text. Needs ``Input.QUESTION_STATE``.
    module : nn.Module or None
        The module that makes the rows of a compressor.
    max_parts : tuple of int or None
        Largest number of crops or frames, and of rows in one, where the host knows them.
    method : str
        Name of the method, for errors.
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
        """The field, or fields, of an input that the method has declared, of the view or of one of its ``layers``.

        ``Input.GRID``: ``coords``, ``grid_size``, ``crop_grid``; ``Input.TEXT_SIMILARITY``: ``text_similarity``,
        ``text_similarity_valid``; any other: its one field.

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
            raise ValueError(
                f"{self.method or 'this method'}: EncoderView.parts is not there: give the crop or frame of each token"
            )
        return self.parts

    def require_module(self) -> nn.Module:
        """``module``, which every view of a compressor has; a ValueError for one made without."""
        if self.module is None:
            raise ValueError(
                f"{self.method or 'this method'}: EncoderView.module is not there: give the module that makes the rows"
            )
        return self.module

    def select_rows(self, rows: Change, spans: Change = lambda x: x) -> EncoderView:
        """The view of other rows: ``rows`` picks from tensors [B, N, ...], ``spans`` from those that have one entry for
        each span [B, ...]."""

        def some(x: Tensor | None, pick: Change = rows) -> Tensor | None:
            return None if x is None else pick(x)

        layers = tuple(
            LayerView(
                some(layer.importance), some(layer.heads), some(layer.keys), some(layer.queries), some(layer.states)
            )
            for layer in self.layers
        )
        importance, keys = (
            (layers[0].importance, layers[0].keys) if layers else (some(self.importance), some(self.keys))
        )
        question, project = self.question, self.project
        return replace(
            self, valid=rows(self.valid), importance=importance, keys=keys, features=some(self.features), parts=some(self.parts), layers=layers,
            coords=some(self.coords), text_similarity=some(self.text_similarity), grid_size=some(self.grid_size, spans), crop_grid=some(self.crop_grid, spans),
            text_similarity_valid=some(self.text_similarity_valid, spans), question_state=some(self.question_state, spans),
            question=None if question is None else QuestionView(spans(question.embeddings), spans(question.valid)),
            project=None if project is None else lambda change: rows(project(change)),
        )  # fmt: skip

    def finite_inputs(self) -> list[Tensor]:
        """Tensors of the view with numbers for each token, [B, N] or [B, N, c], which have to be finite."""
        first = () if self.layers else (self.importance, self.keys)
        of_layers = [x for layer in self.layers for x in layer.tensors()]
        return [*of_layers, *(x for x in (*first, self.features, self.text_similarity) if x is not None)]
