"""What each hook on an attached model does when a call passes it."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.flow import compat
from duet_vlm.flow.align import align
from duet_vlm.flow.arrival import OUTPUTS, adopt, look, restore, take_up, without_marks
from duet_vlm.flow.cache import Run, cut, note_missing
from duet_vlm.flow.call import Call, Note, Prompt, Stacks
from duet_vlm.flow.decoder import PrefillPass
from duet_vlm.flow.entry import enter
from duet_vlm.flow.gate import Gate
from duet_vlm.flow.made import Made, reusing
from duet_vlm.flow.own import check_learns, touched
from duet_vlm.flow.processor import SALIENT
from duet_vlm.flow.ranks import in_step, with_blank_image
from duet_vlm.flow.rules import Rules
from duet_vlm.hooks import Hooks
from duet_vlm.models.adapter import Adapter
from duet_vlm.tokens import TokenMap

PASS = "duet_vlm_pass"  # keyword that carries the running pass from the decoder stack to its layers, recomputation included


class Traffic:
    """The calls of one attached model. ``align``: outputs have one row per prompt slot."""

    def __init__(self, adapter: Adapter, gate: Gate, hooks: Hooks, align: bool) -> None:
        self.adapter, self.gate, self.hooks, self.align = adapter, gate, hooks, align
        self.stacks = Stacks()
        self.latest: Run | None = None  # of any thread
        self.owner: Any = None  # the handle, which so lives as long as its hooks
        self._encode = getattr(adapter.base, adapter.streams[0].encode)  # as the stock model has it
        self._made_once: set[nn.Module] = set()
        self.module: nn.Module | None = None  # of a method that has one

    @property
    def run(self) -> Run | None:
        """What this thread's last call left; of a thread that made none (it had another one generate), what the last call of all left."""
        return self.stacks.last if self.stacks.has_run else self.latest

    # ---- calls: generate, its encoding, forwards

    @contextlib.contextmanager
    def begun(self, full: bool = False) -> Iterator[Rules | None]:
        """Whatever begins runs by the rules of the call around it, unless that thread paused in between; an outermost one by those of now.
        ``full``: by none."""
        begun = self.stacks.begun
        with contextlib.nullcontext(begun[-1]) if begun else self.gate.call() as rules:
            begun.append(None if full or self.gate.paused_here else rules)
            try:
                yield begun[-1]
            finally:
                begun.pop()

    def generate(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """generate() from its first step to its last under the same rules."""

        @functools.wraps(plain)
        def generate(*args: Any, **kwargs: Any) -> Any:
            with self.begun(full=compat.drafts(kwargs)) as rules:  # an assistant is given no pictures, only their placeholders
                take_up(rules, kwargs, whole=True)
                self.stacks.prompts.append(_prompt(args, kwargs))
                try:
                    return plain(*args, **kwargs)
                finally:
                    self.stacks.prompts.pop()

        return generate

    def prepare(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """The step of generate() that encodes what the prompt shows."""

        @functools.wraps(plain)
        def prepare(*args: Any, **kwargs: Any) -> Any:
            self.stacks.preparing += 1
            try:
                return plain(*args, **kwargs)
            finally:
                self.stacks.preparing -= 1

        return prepare

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-hook of the model and of the multimodal model inside it, in front of whatever wraps their forward."""
        compat.refuse_graph(module)
        salient = kwargs.pop(SALIENT, None)
        if module is self.adapter.model or self.stacks.note is None:
            self.stacks.note = Note(kwargs.get("labels"), salient, kwargs.get("logits_to_keep"), kwargs.get(OUTPUTS))
        return args, kwargs

    def answered(self, module: nn.Module, args: Any, output: Any) -> None:
        """Post-hook of the same modules."""
        if module is self.adapter.model or not self.stacks.calls:
            self.stacks.note = None

    def forward(self, module: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of the model, or of the multimodal model inside it: collects what the decoder stack cannot see."""
        named = inspect.signature(plain)

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.begun() as rules, self._call(module, rules) as call:
                restore(self.stacks.note, kwargs)
                take_up(rules, kwargs)
                arguments = named.bind_partial(*args, **kwargs).arguments if args else kwargs
                if call.owner is module:
                    self._heed(call, arguments)
                if module is self.adapter.base:
                    look(self.adapter, call, arguments)
                output = plain(*args, **kwargs)
                return self._outwards(call, output) if module is self.adapter.base else output

        return forward

    @contextlib.contextmanager
    def _call(self, module: nn.Module, rules: Rules | None) -> Iterator[Call]:
        """The call that a forward belongs to: its own, or that of the model around the multimodal model."""
        calls = self.stacks.calls
        if calls and module is self.adapter.base and calls[-1].owner is self.adapter.model and not calls[-1].inside:
            calls[-1].inside = True
            try:
                yield calls[-1]
            finally:
                calls[-1].inside = False
            return
        calls.append(Call(module, rules))
        try:
            yield calls[-1]
        finally:
            calls.pop()
            self.stacks.note = None

    def _heed(self, call: Call, arguments: dict[str, Any]) -> None:
        """What an outermost forward was called with: as noted where it was called, or, given by position or without a call, as it came here."""
        note = self.stacks.note or Note()
        call.labels, call.salient = arguments.get("labels") if note.labels is None else note.labels, note.salient
        kept = arguments.get("logits_to_keep") if note.kept is None else note.kept
        call.drafts = max(0, kept - 1) if isinstance(kept, int) and call.labels is None else 0  # assisted decoding wants their logits too
        call.by_slot = isinstance(kept, Tensor) and call.labels is None
        adopt(call, arguments.get(OUTPUTS))

    def _outwards(self, call: Call, output: Any) -> Any:
        """The output of the multimodal model as its caller counts rows."""
        run = call.run
        if run is not None and run.reduces and (self.align or call.by_slot):
            output = align(output, run)
        return without_marks(output) if call.arrived else output

    # ---- the decoder stack and its layers

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Pre-hook of the decoder stack."""
        compat.refuse_graph(module)
        if not self.stacks.calls or kwargs.get("inputs_embeds") is None:
            return None
        call = self.stacks.calls[-1]
        # where images would have been encoded: not in the embedding's own hook, which sharding counts as part of the embedding
        if call.placeholders and not call.brings_images and in_step(self.adapter.model):
            kwargs["inputs_embeds"] = with_blank_image(self.adapter, self._encode, kwargs["inputs_embeds"])
        if self.module is not None and call.rules is not None and torch.is_grad_enabled() and in_step(self.adapter.model):
            kwargs["inputs_embeds"] = touched(kwargs["inputs_embeds"], self.module)
        if self.module is not None and call.rules is not None and torch.is_grad_enabled() and self.adapter.model.training:
            check_learns(self.adapter, call.rules.reducer.name)
        step = enter(self.adapter, call, kwargs)
        if step is not None:
            kwargs[PASS] = step
            call.made = step.made if isinstance(step, PrefillPass) else None
            self._ran(step.run)
        elif call.placeholders and call.rules is not None:
            self._ran(None)  # a prompt without images
        return args, kwargs

    def tabled(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Post-hook of what makes the decoder's rotary tables, for those who rank in half precision."""
        call = self.stacks.calls[-1] if self.stacks.calls else None
        if call is not None and args and isinstance(args[0], Tensor) and args[0].dtype in (torch.float16, torch.bfloat16):
            kind = args[0][..., :1].clone()  # of the rows only the kind of numbers counts, and nothing else of them is to live on
            call.tables = [*(call.tables or ()), (module, (kind, *args[1:]), kwargs, output)]

    def _ran(self, run: Run | None) -> None:
        self.stacks.has_run, self.stacks.last, self.latest = True, run, run

    def leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Post-hook of the decoder stack."""
        step, cache = kwargs.get(PASS), kwargs.get("past_key_values")
        if isinstance(step, PrefillPass) and cache is not None and step.run.reduces:
            note_missing(cache, step.run, step.kinds)
            if getattr(step.reducer, "cache", "full") == "cut":
                cut(cache, step.run, step.kinds)
        if step is not None and step.run.cache_bytes is None:
            filled = getattr(output, "past_key_values", None) if cache is None else cache  # of a prompt left whole the decoder made its own
            step.run.cache_bytes = None if filled is None else compat.cache_bytes(filled)

    def at_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Pre-hook of a decoder layer."""
        step = kwargs.pop(PASS, None)
        if step is None:
            return None
        if self.stacks.calls:
            self.stacks.calls[-1].layer = index
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if isinstance(step, PrefillPass) and self.stacks.calls:
            step.tables = self.stacks.calls[-1].tables or []
        if isinstance(step, PrefillPass) and step.reuses(index, layer):
            self._make_once(layer)
            step.made.recording = True
        return (step.at_layer(index, layer, hidden, kwargs), *args[1:]), kwargs

    def _make_once(self, layer: nn.Module) -> None:
        """Where a layer first ranks, not at attach: compiled layers have to stay alike, or each needs a graph of its own."""
        if layer not in self._made_once:
            self._made_once.add(layer)
            for module in self.adapter.run_by_ranking(layer):
                self.hooks.shadow(module, "forward", reusing(module, self._made))

    def _made(self) -> Made | None:
        return self.stacks.calls[-1].made if self.stacks.calls else None

    def running(self) -> TokenMap | None:
        """The rows of the decoder layer that just ran, None where they are those of the prompt."""
        call = self.stacks.calls[-1] if self.stacks.calls else None
        return None if call is None or call.run is None else call.run.group(call.layer).tokens

    def record_cls(self, module: nn.Module, args: Any, output: Any) -> None:
        """Post-hook of the vision layer with the CLS row."""
        if self.stacks.encoders:
            hidden = output[0] if isinstance(output, tuple) else output
            self.stacks.encoders[-1].cls = hidden[:, :1]


def _prompt(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prompt:
    """The text that generate() was given."""
    ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
    return Prompt(ids, None if ids is not None else kwargs.get("inputs_embeds"), kwargs.get("attention_mask"))
