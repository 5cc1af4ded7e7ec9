"""attach() and Handle: install every hook on one model instance, and undo each one."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import EllipsisType, TracebackType
from typing import Any

from torch import Tensor, nn

from duet_vlm.accounts import samples_of, selection_cost
from duet_vlm.budget import Budget, SpanPlan, check_budget
from duet_vlm.checks import check, signal_layer, with_fields
from duet_vlm.flow import compat
from duet_vlm.flow.align import align
from duet_vlm.flow.arrival import adopt, look
from duet_vlm.flow.cache import Run
from duet_vlm.flow.call import Call, Stacks
from duet_vlm.flow.decoder import PrefillPass
from duet_vlm.flow.encoder import EncoderFlow, check_finite
from duet_vlm.flow.entry import enter, whole_prompts
from duet_vlm.flow.loss import surviving_labels
from duet_vlm.flow.made import Made, reusing
from duet_vlm.flow.processor import SALIENT, SalientProcessor, accept_salient
from duet_vlm.flow.ranks import in_step, with_blank_image
from duet_vlm.flow.signals import Recorder
from duet_vlm.flow.trace import trace_of
from duet_vlm.hooks import Hooks
from duet_vlm.measure.report import Report, Sample, make_report
from duet_vlm.memory import KEY, record, remembered
from duet_vlm.methods import named as registry
from duet_vlm.models.adapter import Adapter
from duet_vlm.models.find import adapter_for, core_of
from duet_vlm.parts import plan_span
from duet_vlm.reducer import DecoderReducer, EncoderReducer, Reducer
from duet_vlm.tokens import SpanTrace, TokenMap

PASS = "duet_vlm_pass"  # keyword that carries the running pass from the decoder stack to its layers, recomputation included

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Handle:
    """What ``attach`` returns; a context manager that detaches at its end.

    Attributes
    ----------
    reducer : Reducer
        The method with its settings.
    budget : int, float or None
        As given.
    """

    def __init__(self, adapter: Adapter, reducer: Reducer, budget: Budget | None, processor: Any, align: bool) -> None:
        self.adapter, self.reducer, self.budget = adapter, reducer, budget
        self._processor, self._align = processor, align
        self._encode = getattr(adapter.base, adapter.streams[0].encode)
        self._stacks = Stacks()
        self._hooks = Hooks()
        self._made_once: set[nn.Module] = set()
        self._paused = 0
        self._run: Run | None = None
        self._detached = False
        self._plan = self._planner(reducer, budget)

    # ---- the user's verbs

    def __enter__(self) -> Handle:
        self._check_attached()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()

    def detach(self) -> None:
        """Take every hook off again; the model is then exactly what it was. Calling it twice is harmless."""
        self._hooks.undo()
        self._detached = True
        _attached.discard(self.adapter.model)

    @contextlib.contextmanager
    def paused(self) -> Iterator[Handle]:
        """Run the full model inside the ``with`` block (new prompts only; a reduced cache goes on as it is)."""
        self._check_attached()
        self._paused += 1
        try:
            yield self
        finally:
            self._paused -= 1

    def set(self, *, budget: Budget | None | EllipsisType = ..., **fields: Any) -> Handle:
        """Change the budget or the method's settings for the calls to come; what is not named stays (``budget=None`` takes a budget away).

        Raises
        ------
        ValueError, TypeError
            As ``attach``; the old settings then stay in force.
        """
        self._check_attached()
        reducer = with_fields(self.reducer, fields) if fields else self.reducer
        budget = self.budget if isinstance(budget, EllipsisType) else budget
        check_budget(budget)
        plan = self._planner(reducer, budget)
        check(self.adapter, reducer, plan, self._processor, budget)
        if signal_layer(reducer) != signal_layer(self.reducer):
            raise ValueError("signal_layer cannot change while attached: detach and attach again")
        self.reducer, self.budget, self._plan = reducer, budget, plan
        return self

    def plan(self, tokens: int) -> SpanPlan:
        """What the current settings make of a span of ``tokens`` visual tokens."""
        return self._plan(tokens)

    def report(self) -> Report:
        """Tokens, FLOPs and KV bytes of the last prompt and its decoding, predicted beside measured."""
        run = self._last_run()
        samples = samples_of(run)
        return make_report(
            method=self.reducer.name,
            settings=self.reducer.settings(),
            budget=self.budget,
            samples=samples,
            scored_layers=run.scored_layers,
            reused_layers=run.reused_layers,
            decoder=self.adapter.decoder_shape(),
            vision=self.adapter.vision_shape(),
            element_bytes=run.element_bytes,
            cache_bytes=run.cache_bytes,
            decoded=run.decoded,
            projects_all=self.projects_all,
            selection=self.selection_cost(samples)[0],
        )

    def selection_cost(self, samples: list[Sample]) -> tuple[int, int]:
        """FLOPs and bytes of signals, choice and merge before the decoder."""
        return selection_cost(self.adapter, self.reducer, samples, self.projects_all)

    @property
    def projects_all(self) -> bool:
        """Whether the projector runs on every visual token, and not only on those that enter the decoder."""
        return self.adapter.door is None or getattr(self.reducer, "reads_projected", False)

    @property
    def trace(self) -> list[list[SpanTrace]]:
        """For each sample and span of the last prompt: which tokens were kept, merged into whom, and dropped, stage by stage."""
        return trace_of(self._last_run())

    @property
    def slots(self) -> Tensor:
        """[B, T] prompt slots of the rows that reached the last layer in the last prompt, -1 for padding: aligns logits with labels."""
        tokens = self._last_run().groups[-1].tokens
        return tokens.slot.masked_fill(~tokens.valid, -1)

    # ---- inside

    def _check_attached(self) -> None:
        if self._detached:
            raise RuntimeError("this handle is detached: call attach() again")

    def _last_run(self) -> Run:
        if self._run is None:
            raise RuntimeError("nothing to report yet: run the attached model on a prompt with an image first")
        for flag, what in self._run.finite:
            check_finite(flag.cpu(), what)
        return self._run

    def _planner(self, reducer: Reducer, budget: Budget | None) -> Callable[[int], SpanPlan]:
        depth = len(self.adapter.layers)
        return lru_cache(maxsize=1024)(lambda tokens: reducer.plan(tokens, depth, budget))

    def _plan_span(self, sizes: tuple[int, ...], structure: int, each: bool) -> SpanPlan:
        keep = getattr(self.reducer, "newline", "drop") == "keep"
        return plan_span(self._plan, self.budget, sizes, structure, each, keep)

    def _active(self) -> Reducer | None:
        return None if self._paused or self._detached else self.reducer

    def _install(self) -> None:
        adapter, hooks = self.adapter, self._hooks
        encoder = EncoderFlow(self.adapter, self._stacks, self._active, self._plan_span)
        adapter.install(hooks, self._running)
        recorded: list[nn.Module] = []
        if isinstance(self.reducer, EncoderReducer) and self.reducer.signals:
            recorded = adapter.vision_attentions(self.reducer.signal_layer)
        for attention in recorded:
            hooks.on_undo(Recorder(attention, self._stacks).remove)
            hooks.add(attention.register_forward_hook, encoder.after_attention)
        unread = adapter.unread_layers()
        if not any(module in recorded for layer in unread for module in layer.modules()):
            encoder.skipping = bool(unread)
            for layer in map(_inside, unread):
                hooks.shadow(layer, "forward", encoder.instead_of(layer.forward))
        if isinstance(self.reducer, EncoderReducer) and self.reducer.cls_token:
            hooks.add(adapter.cls_module().register_forward_hook, self._record_cls)
        if adapter.door is not None:
            hooks.add(adapter.door.register_forward_pre_hook, encoder.at_door)
            hooks.add(adapter.door.register_forward_hook, encoder.after_door)
        for stream in adapter.streams:
            hooks.shadow(adapter.base, stream.encode, encoder.wrap(getattr(adapter.base, stream.encode), stream))
        if self._align:
            hooks.add(adapter.base.register_forward_hook, self._stretch)
        for module in (adapter.model, adapter.base):
            hooks.add(module.register_forward_pre_hook, self._begin, with_kwargs=True)
            hooks.add(module.register_forward_hook, self._end, always_call=True)
        hooks.add(adapter.text_model.register_forward_pre_hook, self._enter, with_kwargs=True, prepend=True)
        hooks.add(adapter.text_model.register_forward_hook, self._leave, with_kwargs=True)
        for index, layer in enumerate(adapter.layers):
            hooks.add(_inside(layer).register_forward_pre_hook, self._at_layer, index, with_kwargs=True)
        if not self._align:  # the public setter keeps the loss in this one instance attribute
            hooks.shadow(adapter.model, "_loss_function", surviving_labels(adapter.model.loss_function, self._stacks))
        if self._processor is not None:
            processor = SalientProcessor(self._processor, adapter.image_token_id)
            hooks.on_undo(processor.remove)
        if self._processor is not None or isinstance(self.reducer, DecoderReducer):
            hooks.shadow(adapter.model, "prepare_inputs_for_generation", accept_salient(adapter.model.prepare_inputs_for_generation))
        if hasattr(adapter.model, compat.PREFILL):
            hooks.shadow(adapter.model, compat.PREFILL, whole_prompts(getattr(adapter.model, compat.PREFILL), self._active))

    def _running(self) -> TokenMap | None:
        """The rows of the decoder layer that just ran, None where they are those of the prompt."""
        call = self._stacks.calls[-1] if self._stacks.calls else None
        return None if call is None or call.run is None else call.run.group(call.layer).tokens

    def _make_once(self, layer: nn.Module) -> None:
        """Where a layer first ranks, not at attach: compiled layers have to stay alike, or each needs a graph of its own."""
        if layer not in self._made_once:
            self._made_once.add(layer)
            for module in self.adapter.run_by_ranking(layer):
                self._hooks.shadow(module, "forward", reusing(module, self._made))

    def _made(self) -> Made | None:
        return self._stacks.calls[-1].made if self._stacks.calls else None

    def _record_cls(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stacks.encoders:
            hidden = output[0] if isinstance(output, tuple) else output
            self._stacks.encoders[-1].cls = hidden[:, :1]

    def _stretch(self, module: nn.Module, args: Any, output: Any) -> Any:
        run = self._stacks.calls[-1].run if self._stacks.calls else None
        return align(output, run) if run is not None and run.reduces else None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The model or the multimodal model inside it begins: collect what the decoder stack cannot see."""
        calls = self._stacks.calls
        nested = bool(calls) and calls[-1].owner is not None and module is self.adapter.base and calls[-1].owner is self.adapter.model
        if not nested:
            calls.append(Call(owner=module))
        call = calls[-1]
        if module is self.adapter.model:
            call.labels, call.salient = kwargs.get("labels"), kwargs.pop(SALIENT, None)
            kept = kwargs.get("logits_to_keep")  # assisted decoding wants the logits of its draft tokens too
            call.drafts = max(0, kept - 1) if isinstance(kept, int) and call.labels is None else 0
            outputs = kwargs.get("mm_encoder_outputs") or {}
            for stream in self.adapter.streams:
                if outputs.get(stream.name) is not None:
                    adopt(call, stream.name, outputs[stream.name])
        else:
            arguments = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments if args else kwargs
            look(self.adapter, self._active() is not None, self._plan, call, arguments)
        return args, kwargs

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stacks.calls and self._stacks.calls[-1].owner is module:
            self._stacks.calls.pop()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if not self._stacks.calls or kwargs.get("inputs_embeds") is None:
            return None
        call = self._stacks.calls[-1]
        # where images would have been encoded: not in the embedding's own hook, which sharding counts as part of the embedding
        if call.placeholders and not call.brings_images and in_step(self.adapter.model):
            kwargs["inputs_embeds"] = with_blank_image(self.adapter, self._encode, kwargs["inputs_embeds"])
        step = enter(self.adapter, self._active(), call, kwargs)
        if step is not None:
            self._run, kwargs[PASS] = step.run, step
            call.made = step.made if isinstance(step, PrefillPass) else None
        elif call.placeholders and self._active() is not None:
            self._run = None  # a prompt without images: the last call has nothing to report
        return args, kwargs

    def _leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        step, cache = kwargs.get(PASS), kwargs.get("past_key_values")
        if step is not None and step.run.cache_bytes is None and cache is not None:
            step.run.cache_bytes = compat.cache_bytes(cache)

    def _at_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        step = kwargs.pop(PASS, None)
        if step is None:
            return None
        if self._stacks.calls:
            self._stacks.calls[-1].layer = index
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if isinstance(step, PrefillPass) and step.reuses(index, layer):
            self._make_once(layer)
            step.made.recording = True
        return (step.at_layer(index, layer, hidden, kwargs), *args[1:]), kwargs


def _inside(layer: nn.Module) -> nn.Module:
    """A layer inside torch's checkpointing wrapper, where FSDP gathers its weights and where hidden states are captured."""
    return getattr(layer, "_checkpoint_wrapped_module", layer)


def attach(
    model: nn.Module,
    method: str | Reducer | None = None,
    *,
    budget: Budget | None = None,
    processor: Any = None,
    positions: str | None = None,
    align: bool = False,
    **fields: Any,
) -> Handle:
    """Make ``model`` spend fewer visual tokens, until the handle is detached.

    Parameters
    ----------
    model : nn.Module
        A loaded image-text-to-text model of transformers (PEFT models too).
    method : str or Reducer, optional
        Name of a method (``duet_vlm.methods()``) or an instance with its settings. Left out: what the checkpoint was trained with, if
        its config remembers it (``remember``), else "duet"; a budget or settings named here go before remembered ones.
    budget : int or float, optional
        Mean visual tokens per decoder layer and image (int), or that as a fraction of the image's tokens (float in (0, 1]).
    processor : optional
        The model's processor; needed for ``text_query="salient"``, whose words it marks.
    positions : str, optional
        "keep" (default) or "compact".
    align : bool
        Give the decoder's output one row per prompt slot again, a dropped slot repeating the survivor before it: for trainers and metrics
        that line logits up with labels themselves (TRL, label smoothing, ``compute_metrics``). The loss is the same; the head then works
        on every row. Without it logits have the surviving rows only, and ``Handle.slots`` says which.
    **fields
        Settings of the method; they override those of an instance.

    Returns
    -------
    Handle
        Use it as a context manager, or call ``detach()``.

    Raises
    ------
    ValueError
        Unknown method, setting or budget out of range, model attached already.
    BudgetError
        A budget below the method's floor on this model.
    TypeError
        Unsupported model, or settings that this family cannot have.
    """
    check_budget(budget)
    core = core_of(model)
    fields |= {} if positions is None else {"positions": positions}
    if method is None:
        known = remembered(core) or {"method": "duet", "budget": None, "settings": {}}
        method, fields = known["method"], known["settings"] | fields
        budget = known["budget"] if budget is None else budget
    if isinstance(method, str):
        reducer = with_fields(registry.get(method), fields)
    elif isinstance(method, Reducer):
        reducer = with_fields(method, fields)
    else:
        raise TypeError(f"method must be a name or a Reducer instance, got {method!r}")
    if core in _attached:
        raise ValueError("a reducer is attached to this model already: detach() its handle first, or change it with handle.set(...)")
    handle = Handle(adapter_for(model), reducer, budget, processor, align)
    check(handle.adapter, reducer, handle.plan, processor, budget)
    try:
        handle._install()
    except BaseException:
        handle.detach()
        raise
    _attached.add(core)
    return handle


def remember(handle: Handle) -> None:
    """Write the handle's reduction into the model's config, so that the checkpoint keeps it and ``attach(model)`` takes it up again.

    It stays there when the handle is detached; ``del model.config.duet_vlm`` takes it out.
    """
    setattr(handle.adapter.model.config, KEY, record(handle.reducer, handle.budget))
