"""Drops in a recorded Llama decoder by counts: PIO-FVLM, and the second stage of VScan; PIO-FVLM on one with M-RoPE."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from duet_vlm import DecoderView, attach
from duet_vlm.methods.decoder.pio import Pio
from duet_vlm.reducers.inputs import Input
from duet_vlm.runtime.prefill.prediction_gradient import prediction_gradient
from golden_runner.case import Case
from golden_runner.spy import Watch, spying
from golden_runner.t2v import Prompt, compare_step_positions
from golden_runner.v2drop import QwenPrompt

GRADIENT = {"relative": 5e-4, "absolute": 0.0}


def saliency(view: DecoderView) -> Tensor:
    """The released loss is one mean over all samples of the batch."""
    assert view.gradient is not None
    return view.gradient.norm(dim=-1) / len(view.valid)


class Stages:
    """One run on a recorded batch of prompts of equal length, an image in each."""

    def __init__(self, case: Case, run: str, reducer: Pio, prompt: Prompt) -> None:
        self.case, self.run, self.prompt = case, run, prompt
        self.layers, self.views = [layer for layer, _ in reducer.schedule or ()], []
        cache = DynamicCache(config=prompt.text_model.config)
        with attach(prompt.model, spying(reducer, self.views)) as self.handle, Watch(prompt.text_model) as self.watch:
            prompt(past_key_values=cache, use_cache=True)
            self.state = self.handle._prompt_state
            case.fact(run, "seq_len_entering_each_layer", self.calls())
            case.close(run, "last_hidden_state", self.watch.last)
            if case.has(run, "logits_last"):
                case.close(run, "logits_last", self.head(self.watch.last[:, -1]))
            self.compare_stages()
            self.decode(cache)

    def calls(self) -> list[int]:
        """Rows of the first calls of layers, as many as there are layers; a probe is a call of its layer in front of
        the drop."""
        widths = [h.shape[1] for h in self.watch.hidden]
        probed = set(self.layers) if Input.GRADIENT in self.handle.reducer.requires else set()
        calls = [
            rows
            for layer, width in enumerate(widths)
            for rows in ([widths[layer - 1], width] if layer in probed else [width])
        ]
        return calls[: len(widths)]

    def head(self, rows: Tensor) -> Tensor:
        return rows @ self.case.tensors["weights/lm_head.weight"].T

    def kept(self, layer: int) -> Tensor:
        """The image tokens that ``layer`` reads, counted in the image: [B, n]."""
        tokens = self.state.layer_group(layer).tokens
        starts = torch.tensor(self.prompt.starts)[:, None]
        return tokens.prompt_index[tokens.visual].view(len(tokens.prompt_index), -1) - starts

    def compare_stages(self) -> None:
        case, run = self.case, self.run
        for layer, view in zip(self.layers, self.views, strict=True):
            name = f"stage{case.runs[run]['layer_list'].index(layer)}"
            before, after = self.kept(layer - 1), self.kept(layer)
            case.close(run, f"{name}/hidden_before", self.watch.output[layer - 1])
            case.close(run, f"{name}/hidden_after", self.watch.hidden[layer])
            case.same(run, f"{name}/kept_original", after)
            case.same(run, f"{name}/kept", (after[:, :, None] == before[:, None]).long().argmax(-1))
            if Input.GRADIENT in self.handle.reducer.requires:
                case.close(run, f"{name}/scores", saliency(view), GRADIENT)
            else:
                case.scores(run, f"{name}/scores", view.scores)
            self.watch.rotates(layer, case.out(run, f"{name}/position_ids_after"))
            case.compared.add(f"out/{run}/{name}/position_ids_after")

    def decode(self, cache: DynamicCache) -> None:
        case, run = self.case, self.run
        lengths = [layer.keys.shape[-2] for layer in cache.layers]
        case.fact(run, "kv_len_after_prefill", lengths)
        grown, seen = [], self.prompt.embeds.shape[1]
        for step in range(case.runs[run].get("decode", 0)):
            token = self.head(self.watch.last[:, -1]).argmax(-1, keepdim=True)
            case.same(run, f"decode{step}/token_id", token.view_as(case.out(run, f"decode{step}/token_id")))
            self.prompt.model(
                input_ids=token, past_key_values=cache, use_cache=True, position_ids=torch.full_like(token, seen + step)
            )
            case.close(run, f"decode{step}/last_hidden_state", self.watch.last)
            name = f"decode{step}/position_id_entering_each_layer"
            case.tensors[f"out/{run}/{name}"] = case.out(run, name).view(len(self.watch.rotary), -1)
            compare_step_positions(case, run, name, self.watch)
            grown.append([layer.keys.shape[-2] for layer in cache.layers])
        case.fact(run, "kv_len_after_each_decode_step", grown)


def recorded(case: Case) -> Prompt:
    """The recorded prompt and head, of the recorded vocabulary alone: a placeholder's row in the head would change the
    loss."""
    starts, tokens = (
        x if isinstance(x, list) else [x] * case.meta["B"]
        for x in (case.meta["image_start"], case.meta["image_tokens"])
    )
    prompt = Prompt(case, starts, tokens)
    prompt.model.lm_head.weight = nn.Parameter(case.tensors["weights/lm_head.weight"])
    return prompt


def check(case: Case) -> None:
    if "Qwen" in case.meta["produced_by"]:
        check_qwen(case)
        return
    prompt = recorded(case)
    for run, settings in case.runs.items():
        Stages(case, run, Pio.official(settings["layer_list"], settings["image_token_list"]), prompt)


def check_qwen(case: Case) -> None:
    """By the released probe; and, recorded beside it, the choice by the next layer with the same head."""
    prompt = QwenPrompt(case, within=True)
    for run, settings in case.runs.items():
        method = Pio.official_qwen(settings["layer_list"], settings["image_token_ratio_list"])
        done = Stages(case, run, method, prompt)
        prompt.model.lm_head.weight = nn.Parameter(prompt.table)
        for stage, (layer, view) in enumerate(zip(done.layers, done.views, strict=True)):
            compare_next(case, run, stage, layer, view, replace(method, probe="next"), prompt, done)


def compare_next(
    case: Case, run: str, stage: int, layer: int, view: DecoderView, method: Pio, prompt: Prompt, done: Stages
) -> None:
    """The gradient at the rows that the released choice has left."""
    adapter, width = done.handle.adapter, done.watch.output[layer - 1].shape[1]
    position = done.watch.rotary[layer - 1]
    given = {"attention_mask": None, "position_embeddings": position, "past_key_values": None}
    everyone = torch.ones(1, width, dtype=torch.bool)
    rows = done.watch.output[layer - 1]
    gradient = prediction_gradient(adapter, adapter.layers[layer], rows, everyone, given, "pio")
    visual = done.state.layer_group(layer - 1).tokens.visual[0]
    chosen = method.prune_tokens(replace(view, gradient=gradient[:, visual]))
    case.same(run, f"stage{stage}/kept_if_next_block", chosen[0].nonzero().T)
