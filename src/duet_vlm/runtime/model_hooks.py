"""The hooks of an attached model: calls of generate(), of the model, of its decoder and of each layer."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import Adapter, StateChange
from duet_vlm.planning.tokens import TokenMap
from duet_vlm.runtime import compat
from duet_vlm.runtime.active_config import ActiveConfig
from duet_vlm.runtime.call_tracker import CallTracker
from duet_vlm.runtime.context import ForwardContext, OriginalArgs, PromptText, ThreadState
from duet_vlm.runtime.decoder_call import begin_decoder
from duet_vlm.runtime.encode.multimodal_inputs import (
    OUTPUTS,
    collect_features,
    collect_inputs,
    restore_decisions,
    swap_in_reduced,
    without_marks,
)
from duet_vlm.runtime.prefill.align_output import align
from duet_vlm.runtime.prefill.layers import PrefillPass
from duet_vlm.runtime.prefill.projection_reuse import ProjectionCache, reuse_projection
from duet_vlm.runtime.prompt import PromptState
from duet_vlm.runtime.pruned_cache import record_evicted, trim_cache
from duet_vlm.runtime.training.compressor_module import check_learns, touch_all_params
from duet_vlm.runtime.training.distributed import add_dummy_image, needs_rank_sync
from duet_vlm.utils.hooks import Hooks

PASS = "duet_vlm_pass"  # keyword with the running pass, from the decoder to its layers, also when they are recomputed


class ModelHooks:
    """The hooks of one attached model.

    Attributes
    ----------
    tracker : CallTracker
        Running calls and the configuration of new ones.
    hooks : Hooks
        Everything that is to be undone.
    align : bool
        Outputs have one row per prompt position.
    state : ThreadState
        Running calls of each thread.
    latest_prompt_state : PromptState or None
        Of the last call of any thread.
    handle : Handle
        The user's handle, kept alive by its hooks.
    module : nn.Module or None
        The trainable module of the method.
    tokenizer : PreTrainedTokenizerBase or None
        The model's, where the words of a question are read.
    """

    def __init__(self, adapter: Adapter, tracker: CallTracker, hooks: Hooks, align: bool) -> None:
        self.adapter = adapter
        self.tracker = tracker
        self.hooks = hooks
        self.align = align
        self.state = ThreadState()
        self.latest_prompt_state: PromptState | None = None
        self.handle: Any = None
        self._encode = getattr(adapter.base, adapter.modalities[0].encode)  # the stock method
        self._wrapped_layers: set[nn.Module] = set()
        self.module: nn.Module | None = None
        self.tokenizer: Any = None

    @property
    def prompt_state(self) -> PromptState | None:
        """The prompt of this thread's last call; in a thread without calls (another one generates for it), that of the
        last call of all."""
        return self.state.last_prompt_state if self.state.has_prompt_state else self.latest_prompt_state

    # ---- calls: generate, its encoding, forwards

    @contextlib.contextmanager
    def begin(self, full: bool = False) -> Iterator[ActiveConfig | None]:
        """Begin a call with the configuration of the call around it, an outermost one with the current configuration.

        It is None, which means the full model, where the thread paused in between, and with ``full``.
        """
        configs = self.state.active_configs
        with contextlib.nullcontext(configs[-1]) if configs else self.tracker.track_call() as config:
            configs.append(None if full or self.tracker.paused_here else config)
            try:
                yield configs[-1]
            finally:
                configs.pop()

    def generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """generate() with one configuration from its first step to its last."""

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            # an assistant gets no images, only their placeholders
            with self.begin(full=compat.is_assistant_call(kwargs)) as config:
                swap_in_reduced(config, kwargs, copy_all=True)
                self.state.generate_prompts.append(_prompt_text(args, kwargs))
                try:
                    return original(*args, **kwargs)
                finally:
                    self.state.generate_prompts.pop()

        return generate

    def prepare(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The step of generate() that encodes the images and videos of the prompt."""

        @functools.wraps(original)
        def prepare(*args: Any, **kwargs: Any) -> Any:
            self.state.generate_preparations += 1
            try:
                return original(*args, **kwargs)
            finally:
                self.state.generate_preparations -= 1

        return prepare

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-hook of the model and of the multimodal model inside it, before other wrappers of their forward."""
        compat.refuse_graph(module)
        if module is self.adapter.model or self.state.original_args is None:
            self.state.original_args = OriginalArgs(
                kwargs.get("labels"), kwargs.get("logits_to_keep"), kwargs.get(OUTPUTS)
            )
        return args, kwargs

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Post-hook of the same modules."""
        if module is self.adapter.model or not self.state.forward_contexts:
            self.state.original_args = None

    def forward(self, module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of the model, or of the multimodal model inside it.

        Collects inputs that the decoder stack does not get.
        """
        signature = inspect.signature(original)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.begin() as config, self._forward_context(module, config) as context:
                restore_decisions(self.state.original_args, kwargs)
                swap_in_reduced(config, kwargs)
                arguments = signature.bind_partial(*args, **kwargs).arguments if args else kwargs
                if context.owner is module:
                    self._record_call_args(context, arguments)
                if module is self.adapter.base:
                    collect_inputs(self.adapter, context, arguments)
                output = original(*args, **kwargs)
                return self._finish_output(context, output) if module is self.adapter.base else output

        return forward

    @contextlib.contextmanager
    def _forward_context(self, module: nn.Module, config: ActiveConfig | None) -> Iterator[ForwardContext]:
        """The call that a forward belongs to: its own, or that of the model around the multimodal model."""
        contexts = self.state.forward_contexts
        if (
            contexts
            and module is self.adapter.base
            and contexts[-1].owner is self.adapter.model
            and not contexts[-1].in_base_model
        ):
            contexts[-1].in_base_model = True
            try:
                yield contexts[-1]
            finally:
                contexts[-1].in_base_model = False
            return
        contexts.append(ForwardContext(module, config))
        try:
            yield contexts[-1]
        finally:
            contexts.pop()
            self.state.original_args = None

    def _record_call_args(self, context: ForwardContext, arguments: dict[str, Any]) -> None:
        """Store the arguments of an outermost forward.

        Those of the pre-hook, or, if passed by position or without it, those seen here.
        """
        original = self.state.original_args or OriginalArgs()
        context.call.labels = arguments.get("labels") if original.labels is None else original.labels
        logits_to_keep = arguments.get("logits_to_keep") if original.logits_to_keep is None else original.logits_to_keep
        context.call.num_draft_tokens = 0
        if isinstance(logits_to_keep, int) and context.call.labels is None:
            context.call.num_draft_tokens = max(0, logits_to_keep - 1)  # assisted decoding needs their logits, too
        context.call.logits_by_prompt_position = isinstance(logits_to_keep, Tensor) and context.call.labels is None
        collect_features(context, arguments.get(OUTPUTS))

    def _finish_output(self, context: ForwardContext, output: Any) -> Any:
        """The output of the multimodal model, aligned with the prompt where the caller expects it."""
        prompt_state = context.prompt_state
        if prompt_state is not None and prompt_state.reduces and (self.align or context.call.logits_by_prompt_position):
            output = align(output, prompt_state)
        return without_marks(output) if context.received else output

    # ---- the decoder stack and its layers

    def before_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Pre-hook of the decoder stack."""
        compat.refuse_graph(module)
        if not self.state.forward_contexts or kwargs.get("inputs_embeds") is None:
            return None
        context = self.state.forward_contexts[-1]
        # here, where images would have been encoded, not in the embedding's hook, which sharding counts as part of the
        # embedding
        if context.placeholders and not context.call.brings_images and needs_rank_sync(self.adapter.model):
            kwargs["inputs_embeds"] = add_dummy_image(self.adapter, self._encode, kwargs["inputs_embeds"])
        if (
            self.module is not None
            and context.config is not None
            and torch.is_grad_enabled()
            and needs_rank_sync(self.adapter.model)
        ):
            kwargs["inputs_embeds"] = touch_all_params(kwargs["inputs_embeds"], self.module)
        if (
            self.module is not None
            and context.config is not None
            and torch.is_grad_enabled()
            and self.adapter.model.training
        ):
            check_learns(self.adapter, context.config.reducer.name)
        running_pass = begin_decoder(self.adapter, context, kwargs, self.tokenizer)
        if running_pass is not None:
            kwargs[PASS] = running_pass
            prefill = running_pass if isinstance(running_pass, PrefillPass) else None
            context.projection_cache = None if prefill is None else prefill.projection_cache
            context.token_stream = None if prefill is None else prefill.stream
            self._set_prompt_state(running_pass.prompt_state)
        elif context.placeholders and context.config is not None:
            self._set_prompt_state(None)  # a prompt without images
        return args, kwargs

    def record_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Post-hook of the decoder's rotary embedding, for scoring in half precision."""
        context = self.state.forward_contexts[-1] if self.state.forward_contexts else None
        if (
            context is not None
            and args
            and isinstance(args[0], Tensor)
            and args[0].dtype in (torch.float16, torch.bfloat16)
        ):
            example = args[0][..., :1].clone()  # only dtype and device are used; frees the hidden states
            context.rotary_calls = [*(context.rotary_calls or ()), (module, (example, *args[1:]), kwargs, output)]

    def _set_prompt_state(self, prompt_state: PromptState | None) -> None:
        """Set the prompt that reports are about."""
        self.state.has_prompt_state = True
        self.state.last_prompt_state = prompt_state
        self.latest_prompt_state = prompt_state

    def after_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Post-hook of the decoder stack."""
        running_pass = kwargs.get(PASS)
        cache = kwargs.get("past_key_values")
        if isinstance(running_pass, PrefillPass) and cache is not None and running_pass.prompt_state.reduces:
            record_evicted(cache, running_pass.prompt_state, running_pass.kinds)
            if running_pass.reducer.options.trim_kv_cache:
                trim_cache(cache, running_pass.prompt_state, running_pass.kinds)
        if running_pass is not None and running_pass.prompt_state.record.cache_bytes is None:
            # without a given cache the decoder made its own
            cache_after = getattr(output, "past_key_values", None) if cache is None else cache
            running_pass.prompt_state.record.cache_bytes = (
                None if cache_after is None else compat.cache_bytes(cache_after)
            )

    def before_layer(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Pre-hook of a decoder layer."""
        running_pass = kwargs.pop(PASS, None)
        if running_pass is None:
            return None
        if self.state.forward_contexts:
            self.state.forward_contexts[-1].layer = index
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if isinstance(running_pass, PrefillPass) and self.state.forward_contexts:
            running_pass.rotary_calls = self.state.forward_contexts[-1].rotary_calls or []
        if isinstance(running_pass, PrefillPass) and running_pass.reuses(index, layer):
            self._wrap_projections_once(layer)
            running_pass.projection_cache.recording = True
        return (running_pass.at_layer(index, layer, hidden, kwargs), *args[1:]), kwargs

    def _wrap_projections_once(self, layer: nn.Module) -> None:
        """Wrap the projections of a layer when it is first scored, not at attach.

        Compiled layers share a graph only while they are alike.
        """
        if layer not in self._wrapped_layers:
            self._wrapped_layers.add(layer)
            for module in self.adapter.modules_run_for_scores(layer):
                self.hooks.shadow(module, "forward", reuse_projection(module, self._projection_cache))

    def _projection_cache(self) -> ProjectionCache | None:
        """The projections of the running prefill."""
        return self.state.forward_contexts[-1].projection_cache if self.state.forward_contexts else None

    def current_tokens(self) -> TokenMap | None:
        """The tokens of the decoder layer that just ran; None where they are those of the prompt."""
        context = self.state.forward_contexts[-1] if self.state.forward_contexts else None
        return (
            None
            if context is None or context.prompt_state is None
            else context.prompt_state.layer_group(context.layer).tokens
        )

    def change_sleeping(self, changed: StateChange) -> None:
        """Change the states of tokens that sleep, as the decoder changes those of the others between its layers."""
        context = self.state.forward_contexts[-1] if self.state.forward_contexts else None
        if context is not None and context.token_stream is not None and context.prompt_state is not None:
            context.token_stream.change(changed, context.prompt_state.layer_groups[0])

    def record_cls(self, module: nn.Module, args: Any, output: Any) -> None:
        """Post-hook of the vision layer with the CLS row."""
        if self.state.encode_contexts:
            hidden = output[0] if isinstance(output, tuple) else output
            self.state.encode_contexts[-1].recorded.cls_row = hidden[:, :1]


def _prompt_text(args: tuple[Any, ...], kwargs: dict[str, Any]) -> PromptText:
    """The text arguments of generate()."""
    ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
    return PromptText(ids, None if ids is not None else kwargs.get("inputs_embeds"), kwargs.get("attention_mask"))
