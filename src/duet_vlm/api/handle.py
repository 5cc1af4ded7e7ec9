"""The handle that attach() returns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import EllipsisType, TracebackType
from typing import Any

from torch import Tensor, nn

from duet_vlm.api.report_inputs import decoder_terms, sample_counts, selection_cost
from duet_vlm.models.adapter import Adapter
from duet_vlm.planning.budget import Budget, SpanPlan, TowerStages, check_budget
from duet_vlm.planning.tokens import SpanTrace
from duet_vlm.profiling.report import Report, SampleCounts, make_report
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.compressor import Compressor, compressor_of, store, stored
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.persistence import to_record
from duet_vlm.runtime.active_config import ActiveConfig
from duet_vlm.runtime.call_tracker import CallTracker
from duet_vlm.runtime.compatibility import check, facts, hook_settings
from duet_vlm.runtime.encode.build_view import find_signal_layers
from duet_vlm.runtime.encode.video_chunks import ChunkConfig
from duet_vlm.runtime.install import install
from duet_vlm.runtime.model_hooks import ModelHooks
from duet_vlm.runtime.prompt import PromptState
from duet_vlm.runtime.pruned_cache import static_copy
from duet_vlm.runtime.trace import trace_of
from duet_vlm.runtime.training.compressor_module import check_saved, weight_facts
from duet_vlm.runtime.validation import check_finite, raise_if_invalid
from duet_vlm.runtime.vision_tower.block_hooks import blocks_to_cut
from duet_vlm.utils.field_types import flattened
from duet_vlm.utils.hooks import Hooks


class Handle:
    """Controls an attached reducer; a context manager that detaches at its end.

    A call (``generate()``, ``forward``) runs to its end by the settings that it began with, in every thread.
    ``paused()`` belongs to the thread (the context) that asked for it, ``report()``, ``trace`` and ``slots`` to the
    last call of the thread that reads them; a thread that made no call itself (a streamer generates in another one)
    reads those of the last call of all.

    Attributes
    ----------
    reducer : Reducer
        The method with its settings.
    budget : int, float or None
        As given.
    chunks : ChunkConfig
        Settings of chunked videos: ``chunk_frames`` and ``still_frames`` as given.
    """

    def __init__(
        self,
        adapter: Adapter,
        reducer: Reducer,
        budget: Budget | None,
        processor: Any,
        align: bool,
        text_tower: Any = None,
        chunks: ChunkConfig | None = None,
    ) -> None:
        self.adapter = adapter
        self.chunks = chunks or ChunkConfig()
        self._processor = processor
        self._text_tower = text_tower
        config = ActiveConfig(reducer, budget, len(adapter.layers))
        check(adapter, reducer, config.plan, processor, budget, text_tower)
        self.chunks.check(adapter, reducer)
        self._hooks = Hooks()
        self._tracker = CallTracker(config, self._hooks.undo)
        self._model_hooks = ModelHooks(adapter, self._tracker, self._hooks, align)
        self._model_hooks.handle = self
        try:
            install(self._model_hooks, reducer, processor, text_tower, facts(adapter), self.chunks)
        except BaseException:
            self._tracker.close()
            raise

    def __repr__(self) -> str:
        """The model, the method, the budget, settings that are not defaults, and whether it is attached."""
        model, known = self.adapter.model, to_record(self.reducer, self.budget)
        budget = "own settings"
        if isinstance(self.budget, int):
            budget = f"budget {self.budget} visual tokens per layer and image"
        elif self.budget is not None:
            budget = f"budget {100 * self.budget:.4g} % of the visual tokens"
        settings = [f"{name}={value!r}" for name, value in flattened(known["settings"]).items()]
        told = ", ".join([f"{known['method']} on {type(model).__name__} ({self.adapter.family})", budget, *settings])
        return f"<duet_vlm.Handle: {told}; {'detached' if self._tracker.closed else 'attached'}>"

    @property
    def reducer(self) -> Reducer:
        """The method with its settings, for calls to come."""
        return self._tracker.config.reducer

    @property
    def budget(self) -> Budget | None:
        """Tokens of a span per decoder layer (int) or a fraction of them (float); None where the settings say how many
        stay."""
        return self._tracker.config.budget

    @property
    def module(self) -> nn.Module | None:
        """The module of a method that has weights of its own (``duet_vlm.reducers.compressor``), None of others. While
        attached, it is among the model's modules, so that trainers find its parameters."""
        return self._model_hooks.module

    def save_weights(self, path: str | Path) -> Path:
        """Write the weights of the method's own module to a .safetensors file, or into a checkpoint's folder, where
        ``attach`` looks for them.

        Raises
        ------
        ValueError
            A method without weights, a file with another suffix, weights that were frozen before they learned anything,
            or a module with replaced layers.
        """
        compressor = self._compressor()
        assert self.module is not None  # as there is a compressor
        check_saved(self.adapter, compressor.name)
        return store(self.module, compressor, facts(self.adapter) | weight_facts(self.adapter, compressor), path)

    def load_weights(self, path: str | Path) -> None:
        """Put weights that ``save_weights`` wrote into the method's own module.

        Raises
        ------
        ValueError
            A method without weights, no such file, or one that was trained for another model or with other settings.
        """
        compressor = self._compressor()
        model_facts = facts(self.adapter) | weight_facts(self.adapter, compressor)
        assert self.module is not None  # as there is a compressor
        self.module.load_state_dict(stored(path, compressor.name, model_facts, compressor.shape))

    def _compressor(self) -> Compressor:
        compressor = compressor_of(self.reducer)
        if compressor is None:
            raise ValueError(f"{self.reducer.name} has no weights of its own, so there are none to save or to load")
        return compressor

    @property
    def installed(self) -> bool:
        """True while the hooks are on the model: until ``detach()``, and until the calls that ran then have ended."""
        return not self._tracker.detached

    def dropping(self, tokens: int, left: int) -> TowerStages:
        """Stages inside the tower for a picture of ``tokens``, of which ``left`` are kept: (block, kept tokens)."""
        return blocks_to_cut(self.adapter, self.reducer, tokens, left)

    def __enter__(self) -> Handle:
        self._check_attached()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Take every hook off again; the model is then exactly what it was. Calling it twice is harmless.

        Calls of other threads that run are waited for, since they go on by what they began with. Inside a running call
        of this thread (a streamer, a logits processor) the hooks go when that call ends.
        """
        self._tracker.close()

    @contextlib.contextmanager
    def paused(self) -> Iterator[Handle]:
        """Run the full model inside the ``with`` block (new prompts only; a reduced cache goes on as it is).

        The pause belongs to this thread, or asyncio task: others go on, and so does a thread started inside the block
        (run it in ``contextvars.copy_context()`` to take the pause along).
        """
        self._check_attached()
        with self._tracker.paused():
            yield self

    def set(self, *, budget: Budget | None | EllipsisType = ..., **fields: Any) -> Handle:
        """Change the budget or the method's settings for the calls to come; what is not named stays (``budget=None``
        takes a budget away).

        Raises
        ------
        ValueError, TypeError
            As ``attach``; the old settings then stay in force.
        """
        self._check_attached()
        reducer = self.reducer.with_settings(fields)
        budget = self.budget if isinstance(budget, EllipsisType) else budget
        check_budget(budget)
        config = ActiveConfig(reducer, budget, len(self.adapter.layers))
        check(self.adapter, reducer, config.plan, self._processor, budget, self._text_tower)
        self.chunks.check(self.adapter, reducer)
        if hook_settings(reducer) != hook_settings(self.reducer):
            raise ValueError(
                "signal_layer cannot change while attached, nor what else decides where the vision tower is read or what a module is made of: "
                "detach and attach again"
            )
        self._tracker.config = config
        return self

    def plan(self, tokens: int) -> SpanPlan:
        """The plan of a span of ``tokens`` visual tokens with the current settings."""
        return self._tracker.config.plan(tokens)

    def static_cache(self, cache: Any, max_new_tokens: int) -> Any:
        """The cache of a prompt in tensors that do not grow: fixed shapes, as compiled decoding wants them, sized by
        the plan layer by layer.

        Parameters
        ----------
        cache : DynamicCache
            As the prompt left it (``past_key_values`` of the model's output). It stays as it is.
        max_new_tokens : int
            Tokens that may be written behind the prompt.

        Returns
        -------
        Cache
            Of static layers. Continue with it as with the other one; of more tokens it raises a ValueError.

        Raises
        ------
        ValueError
            A decoder with sliding or linear layers, flash attention, a cache that holds no plain keys, or no new
            tokens.
        """
        self._check_attached()
        return static_copy(self.adapter, cache, max_new_tokens)

    def report(self) -> Report:
        """Tokens, FLOPs and KV bytes of the last prompt and its decoding, predicted beside measured."""
        prompt_state = self._last_prompt()
        reducer = prompt_state.config.reducer
        samples = sample_counts(prompt_state, self.adapter.vision_dims().patches_per_token)
        projects_all = self._projects_all(reducer)
        return make_report(
            method=reducer.name,
            settings=reducer.settings(),
            budget=prompt_state.config.budget,
            samples=samples,
            scored_layers=prompt_state.record.scored_layers,
            reused_layers=prompt_state.record.reused_layers,
            decoder=self.adapter.decoder_dims(),
            vision=self.adapter.vision_dims(),
            element_bytes=prompt_state.record.element_bytes,
            cache_bytes=prompt_state.record.cache_bytes,
            decoded=prompt_state.continuation.num_decoded,
            projects_all=projects_all,
            selection=selection_cost(self.adapter, reducer, samples, projects_all),
            **decoder_terms(self.adapter, reducer, samples),
        )

    def selection_flops(self, samples: list[SampleCounts]) -> int:
        """FLOPs of signals, choice and merge before the decoder."""
        return selection_cost(self.adapter, self.reducer, samples, self.projects_all)

    def reads_layers(self, layers: Iterable[nn.Module]) -> bool:
        """True if the method takes signals from any of these layers of the vision tower."""
        return find_signal_layers(self.adapter, self.reducer).requested(layers)

    @property
    def projects_all(self) -> bool:
        """True if the projector runs on every visual token, and not only on those that enter the decoder."""
        return self._projects_all(self.reducer)

    @property
    def trace(self) -> list[list[SpanTrace]]:
        """For each sample and span of the last prompt: the tokens kept, merged (with their anchors) and dropped, stage
        by stage."""
        return trace_of(self._last_prompt())

    @property
    def slots(self) -> Tensor:
        """[B, T] prompt slots of the rows that reached the last layer in the last prompt, -1 for padding.

        Aligns logits with labels.
        """
        tokens = self._last_prompt().layer_groups[-1].tokens
        return tokens.prompt_index.masked_fill(~tokens.valid, -1)

    def _projects_all(self, reducer: Reducer) -> bool:
        return self.adapter.pointwise_projector is None or Input.PROJECTED_FEATURES in reducer.requires

    def _check_attached(self) -> None:
        if self._tracker.closed:
            raise RuntimeError("this handle is detached: call attach() again")

    @property
    def _prompt_state(self) -> PromptState | None:
        return self._model_hooks.prompt_state

    def _last_prompt(self) -> PromptState:
        prompt_state = self._prompt_state
        if prompt_state is None:
            raise RuntimeError("nothing to report yet: run the attached model on a prompt with an image first")
        for flag, what in prompt_state.pending.finite:
            check_finite(flag.cpu(), what)
        for code in prompt_state.pending.invalid_code:
            raise_if_invalid(int(code), prompt_state.config.reducer)
        return prompt_state
