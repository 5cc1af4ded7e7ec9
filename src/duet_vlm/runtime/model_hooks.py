"""What each hook on an attached model does when a call passes it."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import Adapter
from duet_vlm.planning.tokens import TokenMap
from duet_vlm.runtime import compat
from duet_vlm.runtime.active_config import ActiveConfig
from duet_vlm.runtime.call_tracker import CallTracker
from duet_vlm.runtime.context import ForwardContext, OriginalArgs, PromptText, ThreadState
from duet_vlm.runtime.decode.cache import PromptState, note_evicted, trim_cache
from duet_vlm.runtime.encode.multimodal_inputs import OUTPUTS, collect_features, collect_inputs, restore_decisions, swap_in_reduced, without_marks
from duet_vlm.runtime.prefill.align_output import align
from duet_vlm.runtime.prefill.entry import begin_decoder
from duet_vlm.runtime.prefill.layers import PrefillPass
from duet_vlm.runtime.prefill.projection_reuse import ProjectionCache, reuse_projection
from duet_vlm.runtime.salient_processor import SALIENT
from duet_vlm.runtime.training.compressor_module import check_learns, touch_all_params
from duet_vlm.runtime.training.distributed import add_dummy_image, needs_rank_sync
from duet_vlm.utils.hooks import Hooks

PASS = "duet_vlm_pass"  # keyword that carries the running pass from the decoder stack to its layers, recomputation included


class ModelHooks:
    """The calls of one attached model. ``align``: outputs have one row per prompt slot."""

    def __init__(self, adapter: Adapter, gate: CallTracker, hooks: Hooks, align: bool) -> None:
        self.adapter, self.tracker, self.hooks, self.align = adapter, gate, hooks, align
        self.state = ThreadState()
        self.latest_prompt_state: PromptState | None = None  # of any thread
        self.handle: Any = None  # the handle, which so lives as long as its hooks
        self._encode = getattr(adapter.base, adapter.modalities[0].encode)  # as the stock model has it
        self._wrapped_layers: set[nn.Module] = set()
        self.module: nn.Module | None = None  # of a method that has one

    @property
    def prompt_state(self) -> PromptState | None:
        """What this thread's last call left; of a thread that made none (it had another one generate), what the last call of all left."""
        return self.state.last_prompt_state if self.state.has_prompt_state else self.latest_prompt_state

    # ---- calls: generate, its encoding, forwards

    @contextlib.contextmanager
    def begin(self, full: bool = False) -> Iterator[ActiveConfig | None]:
        """Whatever begins runs by the rules of the call around it, unless that thread paused in between; an outermost one by those of now.
        ``full``: by none."""
        begun = self.state.active_configs
        with contextlib.nullcontext(begun[-1]) if begun else self.tracker.track_call() as rules:
            begun.append(None if full or self.tracker.paused_here else rules)
            try:
                yield begun[-1]
            finally:
                begun.pop()

    def generate(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """generate() from its first step to its last under the same rules."""

        @functools.wraps(plain)
        def generate(*args: Any, **kwargs: Any) -> Any:
            with self.begin(full=compat.is_assistant_call(kwargs)) as rules:  # an assistant is given no pictures, only their placeholders
                swap_in_reduced(rules, kwargs, whole=True)
                self.state.generate_prompts.append(_prompt(args, kwargs))
                try:
                    return plain(*args, **kwargs)
                finally:
                    self.state.generate_prompts.pop()

        return generate

    def prepare(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """The step of generate() that encodes what the prompt shows."""

        @functools.wraps(plain)
        def prepare(*args: Any, **kwargs: Any) -> Any:
            self.state.generate_preparations += 1
            try:
                return plain(*args, **kwargs)
            finally:
                self.state.generate_preparations -= 1

        return prepare

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-hook of the model and of the multimodal model inside it, in front of whatever wraps their forward."""
        compat.refuse_graph(module)
        salient = kwargs.pop(SALIENT, None)
        if module is self.adapter.model or self.state.original_args is None:
            self.state.original_args = OriginalArgs(kwargs.get("labels"), salient, kwargs.get("logits_to_keep"), kwargs.get(OUTPUTS))
        return args, kwargs

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Post-hook of the same modules."""
        if module is self.adapter.model or not self.state.forward_contexts:
            self.state.original_args = None

    def forward(self, module: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of the model, or of the multimodal model inside it: collects what the decoder stack cannot see."""
        named = inspect.signature(plain)

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.begin() as rules, self._call(module, rules) as call:
                restore_decisions(self.state.original_args, kwargs)
                swap_in_reduced(rules, kwargs)
                arguments = named.bind_partial(*args, **kwargs).arguments if args else kwargs
                if call.owner is module:
                    self._record_call_args(call, arguments)
                if module is self.adapter.base:
                    collect_inputs(self.adapter, call, arguments)
                output = plain(*args, **kwargs)
                return self._finish_output(call, output) if module is self.adapter.base else output

        return forward

    @contextlib.contextmanager
    def _call(self, module: nn.Module, rules: ActiveConfig | None) -> Iterator[ForwardContext]:
        """The call that a forward belongs to: its own, or that of the model around the multimodal model."""
        calls = self.state.forward_contexts
        if calls and module is self.adapter.base and calls[-1].owner is self.adapter.model and not calls[-1].in_base_model:
            calls[-1].in_base_model = True
            try:
                yield calls[-1]
            finally:
                calls[-1].in_base_model = False
            return
        calls.append(ForwardContext(module, rules))
        try:
            yield calls[-1]
        finally:
            calls.pop()
            self.state.original_args = None

    def _record_call_args(self, call: ForwardContext, arguments: dict[str, Any]) -> None:
        """What an outermost forward was called with: as noted where it was called, or, given by position or without a call, as it came here."""
        note = self.state.original_args or OriginalArgs()
        call.labels, call.salient_mask = arguments.get("labels") if note.labels is None else note.labels, note.salient_mask
        kept = arguments.get("logits_to_keep") if note.logits_to_keep is None else note.logits_to_keep
        call.num_draft_tokens = max(0, kept - 1) if isinstance(kept, int) and call.labels is None else 0  # assisted decoding wants their logits too
        call.logits_by_prompt_position = isinstance(kept, Tensor) and call.labels is None
        collect_features(call, arguments.get(OUTPUTS))

    def _finish_output(self, call: ForwardContext, output: Any) -> Any:
        """The output of the multimodal model as its caller counts rows."""
        run = call.prompt_state
        if run is not None and run.reduces and (self.align or call.logits_by_prompt_position):
            output = align(output, run)
        return without_marks(output) if call.received else output

    # ---- the decoder stack and its layers

    def before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Pre-hook of the decoder stack."""
        compat.refuse_graph(module)
        if not self.state.forward_contexts or kwargs.get("inputs_embeds") is None:
            return None
        call = self.state.forward_contexts[-1]
        # where images would have been encoded: not in the embedding's own hook, which sharding counts as part of the embedding
        if call.placeholders and not call.brings_images and needs_rank_sync(self.adapter.model):
            kwargs["inputs_embeds"] = add_dummy_image(self.adapter, self._encode, kwargs["inputs_embeds"])
        if self.module is not None and call.config is not None and torch.is_grad_enabled() and needs_rank_sync(self.adapter.model):
            kwargs["inputs_embeds"] = touch_all_params(kwargs["inputs_embeds"], self.module)
        if self.module is not None and call.config is not None and torch.is_grad_enabled() and self.adapter.model.training:
            check_learns(self.adapter, call.config.reducer.name)
        step = begin_decoder(self.adapter, call, kwargs)
        if step is not None:
            kwargs[PASS] = step
            call.projection_cache = step.projection_cache if isinstance(step, PrefillPass) else None
            self._set_prompt_state(step.prompt_state)
        elif call.placeholders and call.config is not None:
            self._set_prompt_state(None)  # a prompt without images
        return args, kwargs

    def tabled(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Post-hook of what makes the decoder's rotary tables, for those who rank in half precision."""
        call = self.state.forward_contexts[-1] if self.state.forward_contexts else None
        if call is not None and args and isinstance(args[0], Tensor) and args[0].dtype in (torch.float16, torch.bfloat16):
            kind = args[0][..., :1].clone()  # of the rows only the kind of numbers counts, and nothing else of them is to live on
            call.tables = [*(call.tables or ()), (module, (kind, *args[1:]), kwargs, output)]

    def _set_prompt_state(self, run: PromptState | None) -> None:
        self.state.has_prompt_state, self.state.last_prompt_state, self.latest_prompt_state = True, run, run

    def after_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Post-hook of the decoder stack."""
        step, cache = kwargs.get(PASS), kwargs.get("past_key_values")
        if isinstance(step, PrefillPass) and cache is not None and step.prompt_state.reduces:
            note_evicted(cache, step.prompt_state, step.kinds)
            if step.reducer.trim_kv_cache:
                trim_cache(cache, step.prompt_state, step.kinds)
        if step is not None and step.prompt_state.cache_bytes is None:
            filled = getattr(output, "past_key_values", None) if cache is None else cache  # of a prompt left whole the decoder made its own
            step.prompt_state.cache_bytes = None if filled is None else compat.cache_bytes(filled)

    def before_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Pre-hook of a decoder layer."""
        step = kwargs.pop(PASS, None)
        if step is None:
            return None
        if self.state.forward_contexts:
            self.state.forward_contexts[-1].layer = index
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if isinstance(step, PrefillPass) and self.state.forward_contexts:
            step.tables = self.state.forward_contexts[-1].tables or []
        if isinstance(step, PrefillPass) and step.reuses(index, layer):
            self._wrap_projections_once(layer)
            step.projection_cache.recording = True
        return (step.at_layer(index, layer, hidden, kwargs), *args[1:]), kwargs

    def _wrap_projections_once(self, layer: nn.Module) -> None:
        """Where a layer first ranks, not at attach: compiled layers have to stay alike, or each needs a graph of its own."""
        if layer not in self._wrapped_layers:
            self._wrapped_layers.add(layer)
            for module in self.adapter.modules_run_for_scores(layer):
                self.hooks.shadow(module, "forward", reuse_projection(module, self._projection_cache))

    def _projection_cache(self) -> ProjectionCache | None:
        return self.state.forward_contexts[-1].projection_cache if self.state.forward_contexts else None

    def current_tokens(self) -> TokenMap | None:
        """The rows of the decoder layer that just ran, None where they are those of the prompt."""
        call = self.state.forward_contexts[-1] if self.state.forward_contexts else None
        return None if call is None or call.prompt_state is None else call.prompt_state.layer_group(call.layer).tokens

    def record_cls(self, module: nn.Module, args: Any, output: Any) -> None:
        """Post-hook of the vision layer with the CLS row."""
        if self.state.encode_contexts:
            hidden = output[0] if isinstance(output, tuple) else output
            self.state.encode_contexts[-1].cls_row = hidden[:, :1]


def _prompt(args: tuple[Any, ...], kwargs: dict[str, Any]) -> PromptText:
    """The text that generate() was given."""
    ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
    return PromptText(ids, None if ids is not None else kwargs.get("inputs_embeds"), kwargs.get("attention_mask"))
