"""Methods that drop inside a recorded Llama decoder, hidden states in and out: what DART, V2Drop and others share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from duet_vlm import DecoderReducer, Handle, attach
from golden_runner.case import Case
from golden_runner.spy import Watch, spying
from golden_runner.t2v import Prompt, compare_step_positions

DEEP = {"relative": 1e-5, "absolute": 1e-4}  # of rows deep in the decoder, which no norm has scaled


class Inside:
    """One run of a method on a recorded prompt with one image."""

    def __init__(self, case: Case, run: str, reducer: DecoderReducer, prompt: Prompt) -> None:
        self.case, self.run, self.prompt = case, run, prompt
        self.settings, self.views = case.runs[run], []
        self.cache = DynamicCache(config=prompt.text_model.config)
        with attach(prompt.model, spying(reducer, self.views)) as self.handle, Watch(prompt.text_model) as self.watch:
            prompt(past_key_values=self.cache, use_cache=True)
            self.last, self.state = self.watch.last, self.handle._prompt_state
            self.lengths = [layer.keys.shape[-2] for layer in self.cache.layers]
            self.widths = [h.shape[1] for h in self.watch.hidden]
            self.compare()

    def compare(self) -> None:
        """What is recorded of the run; a subclass says more."""
        case, run = self.case, self.run
        case.fact(run, "seq_len_entering_each_layer", self.widths)
        case.fact(run, "kv_len_after_prefill", self.lengths)
        if case.has(run, "last_hidden_state"):
            case.close(run, "last_hidden_state", self.last)
        if case.has(run, "logits_last"):
            case.close(run, "logits_last", self.head(self.last[:, -1]))
        if case.has(run, "position_ids_entering_last_layer"):
            self.rotates(len(self.widths) - 1, "position_ids_entering_last_layer")
        self.decode()

    def head(self, rows: Tensor) -> Tensor:
        """Logits of the recorded vocabulary: by the recorded head, or by the embeddings."""
        if self.prompt.own_head:
            return self.prompt.model.lm_head(rows)[:, : len(self.prompt.table)]
        return rows @ self.prompt.table.T

    def kept(self, layer: int) -> list[int]:
        """The image tokens that ``layer`` reads, counted in the image."""
        tokens = self.state.layer_group(layer).tokens
        return [int(slot) - self.prompt.starts[0] for slot in tokens.prompt_index[0][tokens.visual[0]]]

    def rotates(self, layer: int, name: str) -> None:
        positions = self.case.out(self.run, name)
        self.watch.rotates(layer, positions if positions.ndim > 1 else positions[None])
        self.case.compared.add(f"out/{self.run}/{name}")

    def decode(self) -> None:
        """Greedy steps, as recorded."""
        case, run = self.case, self.run
        steps = sorted({int(name.split("/")[0].removeprefix("decode")) for name in case.names(run, "decode")})
        grown, seen = [self.lengths], self.prompt.embeds.shape[1]
        for t in steps:
            token = self.head(self.watch.last[:, -1]).argmax(-1, keepdim=True)
            assert token.flatten().tolist() == case.out(run, f"decode{t}/token_id").flatten().tolist()
            case.compared.add(f"out/{run}/decode{t}/token_id")
            self.prompt.model(
                input_ids=token,
                past_key_values=self.cache,
                use_cache=True,
                position_ids=torch.full_like(token, seen + t),
            )
            case.close(run, f"decode{t}/last_hidden_state", self.watch.last)
            name = f"decode{t}/position_id_entering_each_layer"
            if case.has(run, name):
                positions = case.out(run, name)
                case.tensors[f"out/{run}/{name}"] = positions if positions.ndim > 1 else positions[:, None]
                compare_step_positions(case, run, name, self.watch)
            if case.has(run, f"decode{t}/rotary_position"):
                for layer in range(len(self.watch.rotary)):
                    self.watch.rotates(layer, case.out(run, f"decode{t}/rotary_position").reshape(1, 1))
                case.compared.add(f"out/{run}/decode{t}/rotary_position")
            grown.append([layer.keys.shape[-2] for layer in self.cache.layers])
        case.fact(run, "kv_lengths_prefill_then_decode", grown)
        case.fact(run, "kv_len_after_each_decode_step", grown[1:])


def runs(case: Case, kind: type[Inside], reducer: Any) -> None:
    """Every run of a case; ``reducer`` makes the method from a run's settings. One that stops in the released code goes
    on here."""
    prompt = Prompt(case, [case.meta["image_start"]], [case.meta["image_tokens"]])
    for run, settings in case.runs.items():
        if "error" in settings:
            with case.official_error(run):
                with attach(prompt.model, reducer(case, settings)) as handle:
                    prompt()
                _finite(handle)
            continue
        kind(case, run, reducer(case, settings), prompt)


def _finite(handle: Handle) -> None:
    assert handle._prompt_state is None or all(bool(flag) for flag, _ in handle._prompt_state.pending.finite)
