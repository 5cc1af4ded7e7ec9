"""A decoder of Llama's layout that drops rows between its layers, made out of vLLM's own after it was built."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger

from duet_vlm.ops.ragged import upload
from duet_vlm.reducers.inputs import Input
from duet_vlm.serve.kv_groups import describe
from duet_vlm.serve.served_method import ServedMethod
from duet_vlm.serve.stage_choice import DropTables, rows_that_go_on
from duet_vlm.serve.staged_step import StagedStep
from duet_vlm_vllm.stages.attention import StageAttention
from duet_vlm_vllm.stages.engine_checks import check_engine, check_ranks
from duet_vlm_vllm.stages.ranking import PROJECTION, layer_signals
from duet_vlm_vllm.stages.running_step import RunningStep

logger = init_logger(f"vllm.{__name__}")  # loggers of other names are not shown by vLLM


def put_in_front(mixin: type, thing: Any) -> None:
    """``mixin`` before the class of this one object."""
    thing.__class__ = type(mixin.__name__ + type(thing).__name__, (mixin, type(thing)), {})


def stage_decoder(decoder: nn.Module, served: ServedMethod, vllm_config: VllmConfig) -> RunningStep | None:
    """Let ``decoder`` drop rows as ``served`` says; before weights are loaded and caches are made. None, and nothing is
    done, for a first stage alone; else what the runner tells the step to.

    Raises
    ------
    ValueError
        A decoder of another layout, or an engine that would give wrong answers; the message says what to change.
    """
    if served.decoder_reducer is None:
        return None
    for layer in decoder.layers:
        if lacking := [name for name in PROJECTION if not hasattr(getattr(layer, "self_attn", None), name)]:
            raise ValueError(
                f"{type(decoder).__name__}: its layers have no {', '.join(lacking)}, and rows are ranked by these; use stages='first'"
            )
    check_engine(vllm_config, [layer.self_attn.attn for layer in decoder.layers])
    check_ranks(served.decoder_reducer, vllm_config.parallel_config.tensor_parallel_size)
    running = RunningStep(served.stages)
    logger.info("%s: %s", served.decoder_reducer.name, describe(served.stages))
    known = vllm_config.compilation_config.static_forward_context
    for number, layer in enumerate(decoder.layers):
        if stage := running.stages.of_layer(number):
            del known[layer.self_attn.attn.layer_name]  # the layer in its place takes the name
            layer.self_attn.attn = StageAttention(layer.self_attn.attn, stage, running, vllm_config)
    decoder.running, decoder.served = running, served
    put_in_front(StagedDecoder, decoder)
    return running


class StagedDecoder:
    """In front of a decoder's class."""

    running: RunningStep
    served: ServedMethod

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        step = self.running.step
        compact = self.served.decoder_reducer.options.positions == "compact"
        if (
            get_forward_context().attn_metadata is None
            or step is None
            or not step.visual
            or not (compact or step.dropping.any())
        ):
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        return StagedPass(self, step, compact)(hidden, positions, kwargs.get("deepstack_input_embeds"))


class StagedPass:
    """One step through the layers."""

    def __init__(self, decoder: Any, step: StagedStep, compact: bool) -> None:
        self.decoder, self.step, self.compact = decoder, step, compact
        self.stages, self.reducer = decoder.running.stages, decoder.served.decoder_reducer
        self.signals: dict[int, dict[str, Tensor]] = {}  # by stage
        self.drops = self.stages.starts if step.dropping.any() else ()
        self.scores_early = self.reducer.score_layer_offset == 1
        looks = self.scores_early or Input.PREVIOUS_HIDDEN_STATES in self.reducer.requires
        self.looked_at = {start - 1 for start in self.drops if looks}
        self.tables: dict[int, DropTables | None] = {}

    def __call__(self, hidden: Tensor, positions: Tensor, deepstack: Any = None) -> Tensor:
        """[T, D] of the batch as it came -> [T, D] behind the last norm; zeros for rows that left, which nobody reads.
        ``deepstack`` (Qwen3-VL): by number of the layer, what is added behind it to the batch as it came [T, D]."""
        residual, rows = None, torch.arange(len(hidden), device=hidden.device)
        for number, layer in enumerate(self.decoder.layers):
            stage = self.stages.of_layer(number)
            if number in self.drops:
                whole = hidden if residual is None else hidden + residual
                stay = self._decide(stage, number, whole, positions, rows)
                hidden, residual, positions, rows = whole[stay], None, positions[..., stay], rows[stay]
            if self.compact and number in self.stages.starts:
                positions = upload(torch.from_numpy(self.step.rows(stage)), positions.device).to(positions.dtype)
            if number in self.looked_at:
                self._look(stage + 1, number, hidden if residual is None else hidden + residual, positions, rows)
            hidden, residual = layer(positions, hidden, residual)
            if deepstack is not None and (added := f"deepstack_input_embeds_{number}") in deepstack.tensors:
                hidden = hidden + deepstack[added][rows]
        hidden, _ = self.decoder.norm(hidden, residual)
        return hidden.new_zeros(int(self.step.num_rows[0].sum()), hidden.shape[1]).index_copy(0, rows, hidden)

    def _look(self, stage: int, number: int, whole: Tensor, positions: Tensor, rows: Tensor) -> None:
        """Take from the layer in front of a drop, before it runs, what the method asks for: its inputs and its
        attention."""
        tables = self._tables(stage, rows)
        if tables is None:
            return
        made = self.signals.setdefault(stage, {})
        if Input.PREVIOUS_HIDDEN_STATES in self.reducer.requires:
            made["previous_hidden_states"] = whole[tables.rows]
        if self.scores_early:
            made |= self._scores(stage, number, whole, positions, tables)

    def _decide(self, stage: int, number: int, whole: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """The rows that go on into ``stage``, of ``whole`` [T, D] in front of its first layer."""
        tables = self._tables(stage, rows)
        if tables is None:
            return torch.arange(len(rows), device=rows.device)
        made = self.signals.pop(stage, {})
        if not self.scores_early:
            made |= self._scores(stage, number, whole, positions, tables)
        if self.reducer.requires & {Input.HIDDEN_STATES, Input.TEXT_HIDDEN_STATES}:
            made["hidden_states"] = whole[tables.rows]
        total = len(rows), int(self.step.num_rows[stage].sum())
        return rows_that_go_on(self.reducer, tables, made, total, self.decoder.norm)

    def _scores(
        self, stage: int, number: int, whole: Tensor, positions: Tensor, tables: DropTables
    ) -> dict[str, Tensor]:
        if not any(after for _, after in tables.counts):
            return {}
        drop = self.step.drop(stage, self.reducer.options.text_query)
        assert drop is not None  # there are tables of it
        return layer_signals(
            self.reducer, self.decoder.layers[number], whole, positions, tables, self.step, drop.requests
        )

    def _tables(self, stage: int, rows: Tensor) -> DropTables | None:
        if stage not in self.tables:
            self.tables[stage] = DropTables.of(self.step, stage, self.reducer.options.text_query, rows)
        return self.tables[stage]
