"""T2V on a Llama decoder: DUET-VLM and the original PyramidDrop, through the hooks of an attached model."""

from __future__ import annotations

import math
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from duet_vlm import DecoderView, Handle, attach
from duet_vlm.methods.decoder.pyramiddrop import PyramidDrop
from duet_vlm.methods.two_stage.duet import Duet
from duet_vlm.reducers.options import TokenOptions
from golden_runner.case import Case, equal, near
from golden_runner.models import TINY_CLIP, llava, renamed
from golden_runner.spy import Watch, scores_at, spying

IGNORED = -100


class Prompt:
    """Recorded embeddings as a call of a LLaVA: the visual rows come back as encoder output, their places are
    placeholders."""

    def __init__(self, case: Case, starts: list[int], tokens: list[int]) -> None:
        weights, config = case.weights(), dict(case.config)
        self.own_head = "lm_head.weight" in weights
        embed = weights["embed_tokens.weight"]
        self.image_token = len(embed)  # one id more than the recorded vocabulary
        weights["embed_tokens.weight"] = torch.cat([embed, torch.full_like(embed[:1], 3.0)])
        config["vocab_size"] = len(embed) + 1
        rules = {name: f"model.language_model.{name}" for name in ("embed_tokens.", "layers.", "norm.")}
        if self.own_head:
            head = weights["lm_head.weight"]
            weights["lm_head.weight"], rules["lm_head."] = torch.cat([head, torch.zeros_like(head[:1])]), "lm_head."
        # the flash kernels were recorded by a plain-torch stand-in, whose rounding is that of eager attention
        attention = "sdpa" if case.meta.get("attn", "sdpa") == "sdpa" else "eager"
        side = math.isqrt(max(tokens) - 1) + 1  # the tower never runs, but settings are checked against its size
        vision = TINY_CLIP | {"image_size": side * TINY_CLIP["patch_size"]}
        self.model = llava(renamed(weights, rules), self.image_token, vision=vision, text=config, attention=attention)
        self.text_model = self.model.model.language_model
        self.table = embed
        embeds = case.given("inputs_embeds").clone()
        self.visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        for row, start, count in zip(self.visual, starts, tokens, strict=True):
            if start >= 0:
                row[start : start + count] = True
        self.starts = starts
        self.counts = self.visual.sum(1).tolist()
        self.features = [row[mask] for row, mask in zip(embeds, self.visual, strict=True) if mask.any()]
        self.embeds = embeds.masked_scatter(self.visual[..., None], torch.full_like(embeds, 3.0))
        self.mask, self.positions = case.given("attention_mask"), case.given("position_ids")
        self.valid = torch.ones_like(self.visual) if self.mask is None else self.mask.bool()

    def __call__(self, **kwargs: Any) -> Any:
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=list(self.features))} if self.features else None
        return self.model(
            inputs_embeds=self.embeds.clone(),
            mm_encoder_outputs=encoded,
            attention_mask=self.mask,
            position_ids=self.positions,
            **kwargs,
        )

    def salient(self, idxs: list[Any], labels: Tensor | None) -> Tensor:
        """``idxs`` count in the prompt with the image as one token: one list for the batch, or (training) one per
        sample."""
        mask = torch.zeros_like(self.visual)
        per_sample = idxs if idxs and isinstance(idxs[0], list) else [idxs] * len(mask)
        for row, count, chosen in zip(mask, self.counts, per_sample, strict=True):
            places = [i + count - 1 for i in chosen if i >= 0]
            row[[p for p in places if p < len(row)] if labels is not None else places] = True
        return mask


def check(case: Case) -> None:
    prompt = Prompt(case, case.meta["image_token_posi"], case.meta["image_tokens"])
    for run, settings in case.runs.items():
        if "error" in settings:
            with case.official_error(run):
                _check_run(case, run, settings, prompt, recorded=False)
            continue
        _check_run(case, run, settings, prompt)


def preset(case: Case, settings: dict[str, Any]) -> Duet | PyramidDrop:
    # one keep per stage: ratios beyond the stages are never used by the released code, missing ones are refused by the
    # schedule
    pairs = zip_longest(settings["layer_list"], settings["ratio_list"][: len(settings["layer_list"])])
    if "PyramidDrop" in case.meta["stage"]:
        return PyramidDrop.official(tuple(pairs))
    query = "salient" if settings.get("use_salient_tokens") and settings.get("idxs") else "all"
    return Duet.official_llava(None, None, schedule=tuple(pairs), options=TokenOptions(text_query=query))


def _check_run(case: Case, run: str, settings: dict[str, Any], prompt: Prompt, recorded: bool = True) -> None:
    labels = case.given("labels") if settings.get("train") else None
    reducer, views, losses = preset(case, settings), [], []
    salient = prompt.salient(settings["idxs"], labels) if reducer.options.text_query == "salient" else None
    prompt.model.loss_function = lambda labels, **kwargs: losses.append(labels) or torch.zeros(())
    cache = DynamicCache(config=prompt.text_model.config) if settings.get("use_cache") else None
    # the recorded idxs are the salient words of a prompt that is passed as embeddings
    words = mock.patch("duet_vlm.runtime.prefill.entry._salient", lambda tokenizer, context, rows: salient & rows)
    processor = None if salient is None else SimpleNamespace(tokenizer=None)
    handle = attach(prompt.model, spying(reducer, views), processor=processor)
    with handle, words, Watch(prompt.text_model) as watch:
        prompt(labels=labels, past_key_values=cache, use_cache=cache is not None)
        if not recorded:
            assert torch.isfinite(watch.last).all() and watch.last.shape[1] == max(
                handle._prompt_state.layer_groups[-1].lengths
            )
            return
        compare_prefill(case, run, handle, watch)
        compare_stages(case, run, settings["layer_list"], prompt, handle, watch, views, labels, salient)
        if labels is not None:
            tokens = handle._prompt_state.layer_groups[-1].tokens
            case.rows(run, "new_labels", losses[0], tokens.valid, equal)
            rest = case.out(run, "new_labels")[torch.arange(losses[0].shape[1]) >= tokens.valid.sum(1, keepdim=True)]
            assert (rest == IGNORED).all() and (losses[0][~tokens.valid] == IGNORED).all()
        compare_decode(case, run, prompt, watch, cache)


def compare_prefill(case: Case, run: str, handle: Handle, watch: Watch) -> None:
    state, depth = handle._prompt_state, len(watch.hidden)
    case.fact(run, "seq_len_entering_each_layer", [h.shape[1] for h in watch.hidden])
    case.rows(run, "last_hidden_state", watch.last, state.layer_groups[-1].tokens.valid)
    for name in case.names(run, "layer_input/"):
        layer = int(name.split("/")[1])
        case.rows(run, name, watch.hidden[layer], state.layer_group(layer).tokens.valid)
    if case.has(run, "prefill_position_ids_entering_last_layer"):
        compare_positions(case, run, "prefill_position_ids_entering_last_layer", handle, watch, depth - 1)


def compare_positions(case: Case, run: str, name: str, handle: Handle, watch: Watch, layer: int) -> None:
    watch.rotates(layer, case.out(run, name), handle._prompt_state.layer_group(layer).tokens.valid)
    case.compared.add(f"out/{run}/{name}")


def compare_stages(
    case: Case,
    run: str,
    layers: list[int],
    prompt: Prompt,
    handle: Handle,
    watch: Watch,
    views: list[DecoderView],
    labels: Tensor | None,
    salient: Tensor | None,
) -> None:
    state = handle._prompt_state
    scored = dict(zip(state.record.scored_layers, views, strict=True))
    told = [{stage.layer: list(stage.kept) for stage in spans[0].stages} if spans else {} for spans in handle.trace]
    for s, layer in enumerate(layers):
        before, after = state.layer_group(layer - 1), state.layer_group(layer)
        name = f"stage{s}"
        if case.has(run, f"{name}/position_ids"):
            compare_positions(case, run, f"{name}/position_ids", handle, watch, layer)
        if case.has(run, f"{name}/attention_mask"):
            case.rows(run, f"{name}/attention_mask", after.tokens.valid, after.tokens.valid, equal)
            assert case.out(run, f"{name}/attention_mask").sum(1).tolist() == list(after.lengths)
        if case.has(run, f"{name}/hidden_states"):
            case.rows(run, f"{name}/hidden_states", watch.hidden[layer], after.tokens.valid)
        for b in range(len(state.spans)):
            sample = f"{name}/sample{b}"
            if not case.names(run, f"{sample}/"):
                assert before.lengths[b] == after.lengths[b], (
                    f"{run}: sample {b} is not ranked in the recording, but here it lost tokens"
                )
                continue
            old, new = (
                [int(t) - prompt.starts[b] for t in g.tokens.prompt_index[b][g.tokens.visual[b]]]
                for g in (before, after)
            )
            case.same(run, f"{sample}/kept_original_image_index", new)
            case.same(run, f"{sample}/kept_in_current_image_block", [old.index(t) for t in new])
            assert told[b].get(layer, new) == new, f"{run}: handle.trace tells other survivors of {sample}"
            if layer in scored:
                scores = scored[layer].scores[b][scored[layer].valid[b]]
            else:
                scores = scores_at(handle, layer, watch, labels, salient)[b][before.tokens.visual[b]]
            padding = before.width - before.lengths[b]
            if padding and labels is None and handle.reducer.options.text_query == "all":
                compare_shifted(case, run, f"{sample}/scores", scores, state.record.num_queries[b], padding)
            else:
                case.scores(run, f"{sample}/scores", scores)


def compare_shifted(case: Case, run: str, name: str, scores: Tensor, queries: int, padding: int) -> None:
    """In padded batches the released code counts padding rows as queries; they add one constant to every image token of
    the sample."""
    shift = case.out(run, name) * (queries + padding) / queries - scores
    flat = shift.mean().expand_as(shift)
    near(f"{run}/{name} less the share of {padding} padding rows", shift, flat, {"relative": 0.0, "absolute": 1e-6})
    case.compared.add(f"out/{run}/{name}")


def compare_decode(case: Case, run: str, prompt: Prompt, watch: Watch, cache: DynamicCache | None) -> None:
    steps = sorted({int(name.split("/")[0].removeprefix("decode")) for name in case.names(run, "decode")})
    if cache is None:
        return
    lengths = [layer.keys.shape[-2] for layer in cache.layers]
    case.fact(run, "kv_len_after_prefill", lengths)
    seen, grown = prompt.embeds.shape[1], []
    mask = prompt.mask
    for t in steps:
        token = (watch.last[:, -1:] @ prompt.table.T).argmax(-1)
        case.same(run, f"decode{t}/token_id", token)
        mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        position = torch.full_like(token, seen + t)  # generate() goes on at the full length, whatever the layers hold
        prompt.model(input_ids=token, past_key_values=cache, use_cache=True, attention_mask=mask, position_ids=position)
        case.close(run, f"decode{t}/last_hidden_state", watch.last)
        compare_step_positions(case, run, f"decode{t}/position_id_entering_each_layer", watch)
        grown.append([layer.keys.shape[-2] for layer in cache.layers])
    case.fact(run, "kv_len_after_each_decode_step", grown)


def compare_step_positions(case: Case, run: str, name: str, watch: Watch, twice: int | None = None) -> None:
    """``twice``: a layer that the released code calls two times, so the recording has two entries for it."""
    recorded = case.out(run, name)  # [layer calls, batch]
    layers = list(range(len(watch.rotary)))
    layers = layers if twice is None else layers[: twice + 1] + layers[twice:]
    assert len(recorded) == len(layers), f"{run}/{name}: {len(recorded)} layer calls recorded, expected {len(layers)}"
    for layer, position in zip(layers, recorded, strict=True):
        watch.rotates(layer, position[:, None])
    case.compared.add(f"out/{run}/{name}")
