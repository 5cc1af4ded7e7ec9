"""Build the view of an encoder reducer: the inputs that it declares, computed by the model family, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence

from duet_vlm.inputs.text_queries import query_rows
from duet_vlm.models.adapter import Adapter, EncoderCall, RecordedQK
from duet_vlm.ops.ragged import gather_rows, pack_right, pad_rows, upload
from duet_vlm.reducers.encoder import EncoderReducer
from duet_vlm.reducers.encoder_view import Change, Layer, LayerView, QuestionView
from duet_vlm.reducers.inputs import VISION_LAYER_INPUTS, Input
from duet_vlm.runtime import compat
from duet_vlm.runtime.context import EncodeContext, ForwardContext, PromptText, ThreadState
from duet_vlm.runtime.masks import valid_tokens

# signals of a CLS row before the tokens: it is kept before any other
CLS_SIGNALS = {"importance": torch.finfo(torch.float32).max}
NO_POSITION = -1

Rows = dict[str, list[Tensor]]  # signal name -> one tensor per span


@dataclass(frozen=True)
class SignalLayers:
    """The vision layers that a method takes signals from.

    Attributes
    ----------
    attentions : tuple of tuple of nn.Module
        Per layer its attention modules, one for every tower.
    blocks : tuple of tuple of nn.Module
        Per layer the blocks around these.
    """

    attentions: tuple[tuple[nn.Module, ...], ...]
    blocks: tuple[tuple[nn.Module, ...], ...]

    def numbers_of(self, module: nn.Module) -> list[int]:
        """The numbers of the signal layers that a module belongs to; one layer may be named twice."""
        layers = zip(self.attentions, self.blocks, strict=True)
        return [number for number, kinds in enumerate(layers) for modules in kinds if module in modules]

    def requested(self, layers: Iterable[nn.Module]) -> bool:
        """True if any signal comes from one of ``layers``."""
        signal_modules = [module for modules in (*self.attentions, *self.blocks) for module in modules]
        return any(module in signal_modules for layer in layers for module in layer.modules())


def layer_number(adapter: Adapter, layer: Layer) -> int | None:
    """The number of a vision layer; a fraction of the depth means the first global-attention layer from there on."""
    if not isinstance(layer, float):
        return layer
    depth = adapter.vision_dims().layers
    first = max(0, int(layer * depth) - 1)
    return next((number for number in range(first, depth) if adapter.attends_globally(number)), first)


def find_signal_layers(adapter: Adapter, reducer: Any) -> SignalLayers:
    """The layers that ``reducer`` takes signals from.

    Raises
    ------
    IndexError
        A layer that the tower does not have.
    """
    signals = reducer.requires & VISION_LAYER_INPUTS
    if not signals:
        return SignalLayers((), ())
    attentions = tuple(
        tuple(adapter.vision_attentions(layer_number(adapter, layer))) for layer in reducer.signal_layers
    )
    block_lists = (
        [module for module in adapter.tower().modules() if isinstance(module, nn.ModuleList)]
        if Input.STATES in signals
        else []
    )
    blocks = tuple(
        tuple(_block_of(block_lists, attention) for attention in modules) if block_lists else ()
        for modules in attentions
    )
    return SignalLayers(attentions if signals - {Input.STATES} else ((),) * len(blocks), blocks)


def _block_of(block_lists: Iterable[nn.ModuleList], attention: nn.Module) -> nn.Module:
    """The layer that contains an attention module: the innermost one, where towers are in a list themselves."""
    blocks = [
        block for stack in block_lists for block in stack if block is not attention and attention in block.modules()
    ]
    return blocks[-1]


def layer_view(adapter: Adapter, recorded: list[RecordedQK], encoding: EncoderCall, reducer: EncoderReducer) -> Rows:
    """The signals that ``reducer`` declares, from one layer's queries and keys."""

    def importance_and_keys(calls: list[RecordedQK]) -> tuple[list[Tensor], list[Tensor]]:
        return adapter.importance_and_keys(calls, encoding, reducer.scoring_rules().signal_segments)

    views: Rows = {}
    if reducer.requires & {Input.IMPORTANCE, Input.KEYS}:
        importance, keys = importance_and_keys(recorded)
        computed = {"importance": importance, "keys": keys}
        views |= {name: rows for name, rows in computed.items() if Input(name) in reducer.requires}
    if Input.HEAD_IMPORTANCE in reducer.requires:
        num_heads = recorded[0].query.shape[1]
        heads = [importance_and_keys([_head(call, head) for call in recorded])[0] for head in range(num_heads)]
        views["heads"] = [torch.stack(rows, -1) for rows in zip(*heads, strict=True)]
    if Input.QUERIES in reducer.requires:
        views["queries"] = adapter.token_rows(torch.cat([call.query for call in recorded], 2).float().mean(1), encoding)
    return views


def _head(recorded: RecordedQK, head: int) -> RecordedQK:
    """Query and key of one head."""
    heads_per_key = recorded.query.shape[1] // recorded.key.shape[1]
    query, key = recorded.query[:, head : head + 1], recorded.key[:, head // heads_per_key : head // heads_per_key + 1]
    return dataclasses.replace(recorded, query=query, key=key)


def layer_views(context: EncodeContext, count: int, width: int) -> tuple[tuple[LayerView, ...], Tensor]:
    """The signals of all ``count`` layers, padded to ``width`` rows.

    A CLS row before the tokens gets signals by which it is kept first.

    Returns
    -------
    views, finite : tuple of LayerView, Tensor
        0-dim bool: everything that was recorded is finite.
    """
    views: list[LayerView] = []
    flags: list[Tensor] = []
    for number in range(count):
        if number not in context.recorded.signals:
            raise RuntimeError("the vision attention was not recorded (changed after attach?): detach and attach again")
        padded = {name: pad_rows(rows)[0] for name, rows in context.recorded.signals[number].items()}
        flags += map(compat.finite, padded.values())
        views.append(
            LayerView(**{name: _add_cls_row(rows, width, CLS_SIGNALS.get(name, 1.0)) for name, rows in padded.items()})
        )
    return tuple(views), torch.stack(flags).all()


def _add_cls_row(rows: Tensor, width: int, value: float) -> Tensor:
    """[B, N, ...] with one more row before the first where there are fewer than ``width``."""
    return rows if rows.shape[1] >= width else nn.functional.pad(rows, (*[0] * (2 * rows.ndim - 4), 1, 0), value=value)


def grid_of(
    adapter: Adapter, encoding: EncoderCall, counts: list[int], width: int, device: torch.device
) -> dict[str, Tensor]:
    """``coords``, ``grid_size`` and ``crop_grid`` of a view of ``width`` rows."""
    coords = [
        nn.functional.pad(rows, (0, 0, width - max(counts), 0), value=NO_POSITION)
        for rows in adapter.token_coords(encoding, counts)
    ]
    sizes = [adapter.grid_sizes(encoding, counts), adapter.crop_grids(encoding, counts)]
    grid_size, crop_grid = upload(sizes, device)
    return {
        "coords": upload(pad_sequence(coords, batch_first=True, padding_value=NO_POSITION), device),
        "grid_size": grid_size,
        "crop_grid": crop_grid,
    }


@dataclass(frozen=True)
class QuestionRows:
    """The question of each sample.

    Attributes
    ----------
    span_to_sample : QuestionView
        Question embeddings of the samples.
    rows : Tensor
        [S, T] bool, query tokens of each sample.
    input_ids : Tensor or None
        [S, T] token ids.
    sample : Tensor
        [B] the sample of each span.
    """

    span_to_sample: QuestionView
    rows: Tensor
    input_ids: Tensor | None
    sample: Tensor

    @property
    def question(self) -> QuestionView:
        """Question embeddings of each span."""
        return QuestionView(self.span_to_sample.embeddings[self.sample], self.span_to_sample.valid[self.sample])


@dataclass(frozen=True)
class QuestionTextEncoder:
    """Encodes the text of a question with a text tower; the tokenizer turns the prompt's ids into text again."""

    text_tower: Any = None
    tokenizer: Any = None

    def text_similarity(self, states: Tensor, question: QuestionRows, family: str) -> dict[str, Tensor]:
        """``text_similarity`` and ``text_similarity_valid`` of a view, from rows of the vision tower [B, N, C]. Copies
        the ids to the host.

        Raises
        ------
        ValueError
            A prompt that was passed as embeddings: its text is not known.
        """
        if question.input_ids is None:
            raise ValueError(
                f"{family}: text_tower reads the words of the prompt, and this one came as inputs_embeds: pass input_ids instead"
            )
        ids, is_query = question.input_ids.cpu(), question.rows.cpu()
        texts = [
            self.tokenizer.decode(row[selected].tolist(), skip_special_tokens=True)
            for row, selected in zip(ids, is_query, strict=True)
        ]
        rows, valid = (x.to(states.device)[question.sample] for x in self.text_tower.texts(texts))
        return {
            "text_similarity": self.text_tower.tokens(states) @ rows.transpose(1, 2),
            "text_similarity_valid": valid,
        }


def find_question(
    adapter: Adapter, prompt: PromptText | None, modality: str, counts: list[int], method: str, needs_grad: bool = False
) -> QuestionRows:
    """The question about each span; ``needs_grad``: its embeddings carry a gradient.

    Nothing is copied from the device: spans fill the placeholders of their modality in order.

    Raises
    ------
    ValueError
        The encoder was called without a prompt.
    """
    if prompt is None or (prompt.input_ids is None and prompt.input_embeds is None):
        raise ValueError(
            f"{adapter.family}: {method} chooses by the question, and an encoder that is called by itself has none: pass pixels and text to the "
            "model or to generate(), use handle.paused() for this call, or take a method that reads no question (duet, scope)"
        )
    rows = prompt.input_embeds
    if rows is None:
        rows = adapter.base.get_input_embeddings()(prompt.input_ids)
    valid = valid_tokens(prompt.attention_mask, rows)
    placeholders = {
        name: positions.to(valid.device)
        for name, positions in adapter.placeholders(prompt.input_ids, prompt.input_embeds).items()
    }
    visual = torch.stack(list(placeholders.values())).any(0)
    is_query = query_rows("all", visual, valid, prompt.labels)
    any_text = valid & ~visual if prompt.labels is None else valid & ~visual & (prompt.labels.to(valid.device) == -100)
    is_query = torch.where(is_query.any(1, keepdim=True), is_query, any_text)
    span_ends, placeholder_ends = upload(counts, valid.device).cumsum(0), placeholders[modality].sum(1).cumsum(0)
    sample = torch.searchsorted(placeholder_ends, span_ends).clamp(max=len(placeholder_ends) - 1)
    # a question is not padded to the length of a clip
    max_length = is_query.shape[1] - (sum(counts) if len(is_query) == 1 else 0)
    index, index_valid = pack_right(is_query, max(1, max_length))
    return QuestionRows(
        QuestionView(gather_rows(rows if needs_grad else rows.detach(), index), index_valid),
        is_query,
        prompt.input_ids,
        sample,
    )


def question_state(adapter: Adapter, question: QuestionRows, state: ThreadState) -> Tensor:
    """The decoder's last hidden state of each span's question alone [B, D]. Copies the longest question's length to the
    host.

    The question is padded on the right, which a causal decoder does not attend to. A gradient flows through it where
    the call has one.
    """
    rows, valid = question.span_to_sample.embeddings, question.span_to_sample.valid
    length = valid.sum(1)
    max_length = max(1, int(length.max()))
    state.forward_contexts.append(ForwardContext(None, None))  # separate from the running prompt: nothing is reduced
    try:
        states = adapter.text_model(inputs_embeds=rows[:, :max_length], use_cache=False).last_hidden_state
    finally:
        state.forward_contexts.pop()
    last = gather_rows(states, (length - 1).clamp(min=0)[:, None])[:, 0].float()
    return last.masked_fill((length == 0)[:, None], 0)[question.sample]


def _sizes_on_host(given: Any) -> Any:
    """``given`` with its integer tensors on the host: a projector looks at such sizes one by one each time it runs."""
    if isinstance(given, Tensor) and not given.is_floating_point():
        return given.cpu()
    return [_sizes_on_host(x) for x in given] if isinstance(given, list | tuple) else given


def projector_function(adapter: Adapter, context: EncodeContext) -> Callable[[Change], Tensor]:
    """The projector as a function of a change to its input in this call."""
    if context.recorded.projector_args is None:
        raise RuntimeError(f"{adapter.family}: the projector did not run in this encoder call; detach and attach again")
    (features, *args), kwargs = context.recorded.projector_args
    projector = in_float32(adapter.projector())
    args, kwargs = [_sizes_on_host(x) for x in args], {name: _sizes_on_host(x) for name, x in kwargs.items()}

    def project(change: Change) -> Tensor:
        projected = projector(change(features.detach().float()), *args, **kwargs)
        if (
            context.tower_work.state is not None
            and context.tower_work.state.pending_merges
            and not context.call.standalone
        ):
            # its input holds only the kept rows of a packed tower
            projected = context.tower_work.state.projected(projected)
        return pad_rows(adapter.unpack_to_spans(projected, context.encoding))[0]

    return project


class _WithoutHooks(nn.Module):
    """A module called without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def in_float32(module: nn.Module) -> Callable[..., Tensor]:
    """``module`` as a function with float32 weights: small steps are lost in half precision.

    A module with weights of other kinds (quantised) runs unchanged, in the dtype of its floating-point weights.
    """
    weights = dict(module.named_parameters()) | dict(module.named_buffers())
    if all(weight.dtype == torch.float32 for weight in weights.values()):
        return module.forward
    if not all(weight.is_floating_point() for weight in module.parameters()):
        dtype = next((weight.dtype for weight in weights.values() if weight.is_floating_point()), torch.float32)
        return lambda rows, *args, **kwargs: module.forward(rows.to(dtype), *args, **kwargs).float()
    float_weights = {
        f"module.{name}": weight.detach().float() for name, weight in weights.items() if weight.is_floating_point()
    }
    return lambda *args, **kwargs: functional_call(_WithoutHooks(module), float_weights, args, kwargs)
