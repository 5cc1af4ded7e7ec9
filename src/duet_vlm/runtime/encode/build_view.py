"""What an encoder reducer is shown: each thing that it names, made by the family, and nothing else."""

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
from duet_vlm.models.adapter import Adapter, Encoding, RecordedQK
from duet_vlm.ops.ragged import gather_rows, pack_right, pad_rows, upload
from duet_vlm.reducers.encoder import EncoderReducer
from duet_vlm.reducers.encoder_view import Change, Layer, LayerView, QuestionView
from duet_vlm.reducers.inputs import VISION_LAYER_INPUTS, Input
from duet_vlm.runtime import compat
from duet_vlm.runtime.context import EncodeContext, ForwardContext, PromptText, ThreadState
from duet_vlm.runtime.prefill.masks import real_rows

FRONT = {"importance": torch.finfo(torch.float32).max}  # of a CLS row that is fed in front: kept before any other
NOWHERE = -1

Rows = dict[str, list[Tensor]]  # by signal, per span


@dataclass(frozen=True)
class SignalLayers:
    """The vision layers that a method names: the attention modules of each (one for every tower), and the blocks around these."""

    attentions: tuple[tuple[nn.Module, ...], ...]
    blocks: tuple[tuple[nn.Module, ...], ...]

    def slots(self, module: nn.Module) -> list[int]:
        """Which of the named layers a module is of: the same one may be named twice."""
        return [slot for slot, modules in enumerate(zip(self.attentions, self.blocks, strict=True)) for each in modules if module in each]

    def requested(self, layers: Iterable[nn.Module]) -> bool:
        """Whether anything is taken from any of ``layers``."""
        taken = [module for modules in (*self.attentions, *self.blocks) for module in modules]
        return any(module in taken for layer in layers for module in layer.modules())


def layer_number(adapter: Adapter, layer: Layer) -> int | None:
    """The number of a vision layer; of a share of the depth the first one from there on that sees whole pictures."""
    if not isinstance(layer, float):
        return layer
    depth = adapter.vision_dims().layers
    first = max(0, int(layer * depth) - 1)
    return next((number for number in range(first, depth) if adapter.attends_globally(number)), first)


def named_layers(adapter: Adapter, reducer: Any) -> SignalLayers:
    """The layers that ``reducer`` takes signals from.

    Raises
    ------
    IndexError
        A layer that the tower does not have.
    """
    wanted = reducer.requires & VISION_LAYER_INPUTS
    if not wanted:
        return SignalLayers((), ())
    attentions = tuple(tuple(adapter.vision_attentions(layer_number(adapter, layer))) for layer in reducer.signal_layers)
    state = [module for module in adapter.tower().modules() if isinstance(module, nn.ModuleList)] if Input.STATES in wanted else []
    blocks = tuple(tuple(_block(state, attention) for attention in modules) if state else () for modules in attentions)
    return SignalLayers(attentions if wanted - {Input.STATES} else ((),) * len(blocks), blocks)


def _block(state: Iterable[nn.ModuleList], attention: nn.Module) -> nn.Module:
    """The layer that an attention module is part of: the innermost, where towers stand in a list themselves."""
    *_, block = (block for stack in state for block in stack if block is not attention and attention in block.modules())
    return block


def layer_view(adapter: Adapter, recorded: list[RecordedQK], encoding: Encoding, reducer: EncoderReducer) -> Rows:
    """What ``reducer`` names of one layer's queries and keys."""

    def signals(calls: list[RecordedQK]) -> tuple[list[Tensor], list[Tensor]]:
        return adapter.importance_and_keys(calls, encoding, reducer.scoring_rules().signal_segments)

    made: Rows = {}
    if reducer.requires & {Input.IMPORTANCE, Input.KEYS}:
        found = dict(zip(("importance", "keys"), signals(recorded), strict=True))
        made |= {name: rows for name, rows in found.items() if Input(name) in reducer.requires}
    if Input.HEAD_IMPORTANCE in reducer.requires:
        count = recorded[0].query.shape[1]
        heads = [signals([_head(one, number) for one in recorded])[0] for number in range(count)]
        made["heads"] = [torch.stack(rows, -1) for rows in zip(*heads, strict=True)]
    if Input.QUERIES in reducer.requires:
        made["queries"] = adapter.token_rows(torch.cat([one.query for one in recorded], 2).float().mean(1), encoding)
    return made


def _head(recorded: RecordedQK, number: int) -> RecordedQK:
    """One head of a call."""
    shared = recorded.query.shape[1] // recorded.key.shape[1]
    query, key = recorded.query[:, number : number + 1], recorded.key[:, number // shared : number // shared + 1]
    return dataclasses.replace(recorded, query=query, key=key)


def layer_views(call: EncodeContext, count: int, width: int) -> tuple[tuple[LayerView, ...], Tensor]:
    """The signals of all ``count`` layers, padded to ``width`` rows, a CLS row in front being kept before any other; and whether all that was
    recorded is finite, a 0-dim bool tensor."""
    views: list[LayerView] = []
    flags: list[Tensor] = []
    for slot in range(count):
        if slot not in call.signals:
            raise RuntimeError("the vision attention was not recorded (changed after attach?): detach and attach again")
        found = {name: pad_rows(rows)[0] for name, rows in call.signals[slot].items()}
        flags += map(compat.finite, found.values())
        views.append(LayerView(**{name: _in_front(rows, width, FRONT.get(name, 1.0)) for name, rows in found.items()}))
    return tuple(views), torch.stack(flags).all()


def _in_front(rows: Tensor, width: int, value: float) -> Tensor:
    """[B, N, ...] with one more row in front where there are fewer than ``width``."""
    return rows if rows.shape[1] >= width else nn.functional.pad(rows, (*[0] * (2 * rows.ndim - 4), 1, 0), value=value)


def grid_of(adapter: Adapter, encoding: Encoding, counts: list[int], width: int, device: torch.device) -> dict[str, Tensor]:
    """``place``, ``sides`` and ``tiles`` of a view of ``width`` rows."""
    places = [nn.functional.pad(rows, (0, 0, width - max(counts), 0), value=NOWHERE) for rows in adapter.token_coords(encoding, counts)]
    sizes = [adapter.grid_sizes(encoding, counts), adapter.crop_grids(encoding, counts)]
    sides, tiles = upload(sizes, device)
    return {"coords": upload(pad_sequence(places, batch_first=True, padding_value=NOWHERE), device), "grid_size": sides, "crop_grid": tiles}


@dataclass(frozen=True)
class QuestionRows:
    """The question of each sample, and for who reads its words: the rows of each sample that ask [S, T] bool, token ids [S, T], and the sample
    of each span [B]."""

    span_to_sample: QuestionView
    rows: Tensor
    input_ids: Tensor | None
    sample: Tensor

    @property
    def question(self) -> QuestionView:
        """That of each span."""
        return QuestionView(self.span_to_sample.embeddings[self.sample], self.span_to_sample.valid[self.sample])


@dataclass(frozen=True)
class QuestionTextEncoder:
    """Who reads the words of a question: a text tower, and the tokenizer that turns the prompt's ids into text again."""

    text_tower: Any = None
    tokenizer: Any = None

    def similar(self, states: Tensor, asked: QuestionRows, family: str) -> dict[str, Tensor]:
        """``similar`` and ``pieces`` of a view, from rows of the vision tower [B, N, C]. Reads the ids on the host.

        Raises
        ------
        ValueError
            A prompt that came as embeddings: its words are not known.
        """
        if asked.input_ids is None:
            raise ValueError(f"{family}: text_tower reads the words of the prompt, and this one came as inputs_embeds: pass input_ids instead")
        ids, asks = asked.input_ids.cpu(), asked.rows.cpu()
        texts = [self.tokenizer.decode(row[there].tolist(), skip_special_tokens=True) for row, there in zip(ids, asks, strict=True)]
        rows, pieces = (x.to(states.device)[asked.sample] for x in self.text_tower.texts(texts))
        return {"text_similarity": self.text_tower.tokens(states) @ rows.transpose(1, 2), "text_similarity_valid": pieces}


def question_of(
    adapter: Adapter, prompt: PromptText | None, stream: str, counts: list[int], method: str, learns: bool = False
) -> QuestionRows:
    """What the prompt asks of each span; ``learns``: its rows carry a gradient.

    Nothing is read from the device: spans fill the placeholders of their stream in order.

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
    valid = real_rows(prompt.attention_mask, rows)
    places = {name: found.to(valid.device) for name, found in adapter.placeholders(prompt.input_ids, prompt.input_embeds).items()}
    visual = torch.stack(list(places.values())).any(0)
    asks = query_rows("all", visual, valid, prompt.labels)
    plain = valid & ~visual if prompt.labels is None else valid & ~visual & (prompt.labels.to(valid.device) == -100)
    asks = torch.where(asks.any(1, keepdim=True), asks, plain)
    ends, shown = upload(counts, valid.device).cumsum(0), places[stream].sum(1).cumsum(0)
    sample = torch.searchsorted(shown, ends).clamp(max=len(shown) - 1)
    most = asks.shape[1] - (sum(counts) if len(asks) == 1 else 0)  # a question is not padded to the length of a clip
    index, real = pack_right(asks, max(1, most))
    return QuestionRows(QuestionView(gather_rows(rows if learns else rows.detach(), index), real), asks, prompt.input_ids, sample)


def question_state(adapter: Adapter, asked: QuestionRows, state: ThreadState) -> Tensor:
    """What the decoder makes of each span's question alone [B, D]: the last row's hidden state. Reads the longest question's length on the host.

    Rows stand at the left, so that what is no question comes behind it, where a causal decoder does not look. A gradient
    goes through it where there is one around the call.
    """
    rows, valid = asked.span_to_sample.embeddings, asked.span_to_sample.valid
    length = valid.sum(1)
    most = max(1, int(length.max()))
    state.forward_contexts.append(ForwardContext(None, None))  # no part of the prompt around it: nothing is reduced
    try:
        states = adapter.text_model(inputs_embeds=rows[:, :most], use_cache=False).last_hidden_state
    finally:
        state.forward_contexts.pop()
    last = gather_rows(states, (length - 1).clamp(min=0)[:, None])[:, 0].float()
    return last.masked_fill((length == 0)[:, None], 0)[asked.sample]


def _on_the_host(given: Any) -> Any:
    """Sizes, which a projector looks at one by one each time it runs."""
    if isinstance(given, Tensor) and not given.is_floating_point():
        return given.cpu()
    return [_on_the_host(x) for x in given] if isinstance(given, list | tuple) else given


def projector_function(adapter: Adapter, call: EncodeContext) -> Callable[[Change], Tensor]:
    """The projector as a function of a change to what it was given in this call."""
    if call.projector_args is None:
        raise RuntimeError(f"{adapter.family}: the projector did not run in this encoder call; detach and attach again")
    (given, *more), kwargs = call.projector_args
    runs = in_float32(adapter.projector())
    more, kwargs = [_on_the_host(x) for x in more], {name: _on_the_host(x) for name, x in kwargs.items()}

    def project(change: Change) -> Tensor:
        made = runs(change(given.detach().float()), *more, **kwargs)
        if call.tower_state is not None and call.tower_state.pending_merges and not call.standalone:  # it was given what is left of a packed tower
            made = call.tower_state.projected(made)
        return pad_rows(adapter.unpack_to_spans(made, call.encoding))[0]

    return project


class _Plain(nn.Module):
    """A module without the hooks on it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def in_float32(module: nn.Module) -> Callable[..., Tensor]:
    """``module`` as a function whose weights are float32: steps of a hundredth are lost in half precision. One that holds weights of other
    kinds (quantised) runs as it is, in the dtype of those that are floating point."""
    weights = dict(module.named_parameters()) | dict(module.named_buffers())
    if all(weight.dtype == torch.float32 for weight in weights.values()):
        return module.forward
    if not all(weight.is_floating_point() for weight in module.parameters()):
        own = next((weight.dtype for weight in weights.values() if weight.is_floating_point()), torch.float32)
        return lambda rows, *more, **kwargs: module.forward(rows.to(own), *more, **kwargs).float()
    lifted = {f"module.{name}": weight.detach().float() for name, weight in weights.items() if weight.is_floating_point()}
    return lambda *args, **kwargs: functional_call(_Plain(module), lifted, args, kwargs)
