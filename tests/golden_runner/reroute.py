"""Reroute: PyramidDrop and FastV whose tokens sleep until the next decision, in whole LLaVA and Qwen2.5-VL models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from duet_vlm import DecoderView, Reducer, attach
from duet_vlm.methods.baselines.none import NoReduction
from duet_vlm.methods.decoder.pyramiddrop import PyramidDrop
from duet_vlm.ops.select import top
from duet_vlm.reducers.inputs import Input
from golden_runner.case import COARSE, Case, near
from golden_runner.models import generate, load
from golden_runner.spy import Watch, spying

INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")


def narrowing() -> type[PyramidDrop]:
    """PyramidDrop of which tokens that slept at the decision before do not come back; for one prompt."""
    awake: list[Tensor] = []

    class Narrowing(PyramidDrop):
        requires = frozenset({Input.SCORES, Input.TOKENS})

        def prune_tokens(self, view: DecoderView) -> Tensor:
            _, token = view.require(Input.TOKENS)
            may = view.valid if not awake else view.valid & torch.isin(token, awake[-1])
            kept = top(view.require(Input.SCORES), may, view.num_keep)
            awake.append(token[kept])
            return kept

    return Narrowing


def check(case: Case) -> None:
    model = _build(case)
    inputs = {name: tensor for name in INPUTS if (tensor := case.given(name)) is not None}
    for run, settings in case.runs.items():
        _check_run(case, run, settings, model, inputs)


def _build(case: Case) -> Any:
    weights = {
        name.replace("model.vision_tower.vision_model.", "model.vision_tower."): tensor
        for name, tensor in case.weights().items()
    }
    if case.config["model_type"] == "llava":
        model: Any = LlavaForConditionalGeneration(LlavaConfig(**case.config))
    else:
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**case.config))
    model.eval().set_attn_implementation("sdpa")
    load(model, weights)
    return model


def _reducer(settings: dict[str, Any]) -> Reducer:
    """The method of a run; the FastV of this code ranks in the layer that drops, as PyramidDrop does."""
    if settings["method"] == "none":
        return NoReduction()
    fastv = settings["method"] == "fastv"
    layers = [settings["scoring_layer"]] if fastv else settings["drop_layers"]
    schedule = tuple(zip(layers, [settings["keep_ratio"]] if fastv else settings["keep_ratios"], strict=True))
    removed = settings["action"] == "physical_delete"
    cls = narrowing() if settings.get("monotonic") and not removed else PyramidDrop
    return cls.official_reroute(schedule, **({"options": {"reentry": "none"}} if removed else {}))


def _check_run(case: Case, run: str, settings: dict[str, Any], model: Any, inputs: dict[str, Tensor]) -> None:
    views: list[DecoderView] = []
    text_model, reducer = model.model.language_model, _reducer(settings)
    seen = spying(reducer, views) if isinstance(reducer, PyramidDrop) else reducer
    with attach(model, seen) as handle, Watch(text_model) as watch:
        written = generate(model, inputs, case.out(run, "decode/tokens").shape[1])
        prompt = handle._prompt_state
    logits = torch.cat(written.logits)
    case.same(run, "decode/tokens", written.sequences[:, inputs["input_ids"].shape[1] :])
    case.close(run, "decode/logits", logits)
    case.close(run, "logits_last", logits[:1])
    new, held = len(logits) - 1, [layer.keys.shape[-2] for layer in written.past_key_values.layers]
    case.fact(run, "kv_len_after_decode", held)
    case.fact(run, "kv_len_after_prefill", [rows - new for rows in held])
    in_full = settings.get("action") == "compact_route"  # recorded streams have sleeping rows in them
    stream = watch.calls[0][0][0].clone()
    near(f"{run}: inputs_embeds", stream, case.given("inputs_embeds"))
    computed = []
    for layer in range(len(text_model.layers)):
        tokens, after = prompt.layer_group(layer).tokens, watch.calls[0][2][layer]
        computed.append(int(tokens.visual.sum()))
        stream[:, tokens.prompt_index[0]] = after
        case.close(run, f"layer{layer}/out", stream if in_full else after)
    if settings.get("visual_rows_computed_in_each_layer"):
        case.fact(run, "visual_rows_computed_in_each_layer", computed)
    case.close(run, "last_hidden_state", text_model.norm(stream if in_full else after))
    _check_stages(case, run, settings, prompt, views)


def _check_stages(case: Case, run: str, settings: dict[str, Any], prompt: Any, views: list[DecoderView]) -> None:
    stages = settings.get("stages", [])
    assert len(views) == len(stages), f"{run}: {len(views)} decisions, recorded {len(stages)}"
    slots, before = prompt.prompt.visual[0].nonzero().flatten().tolist(), None
    for number, (stage, view) in enumerate(zip(stages, views, strict=True)):
        awake = prompt.layer_group(stage["layer"]).tokens
        kept = [slots.index(slot) for slot in awake.prompt_index[0][awake.visual[0]].tolist()]
        judged = before if before is not None and settings["action"] == "physical_delete" else list(range(len(slots)))
        assert view.valid.shape[1] == stage["n_in"] == len(judged)
        case.same(run, f"stage{number}/kept_original", [kept])
        case.same(run, f"stage{number}/kept", [[judged.index(token) for token in kept]])
        assert len(set(kept) - set(kept if before is None else before)) == stage["came_back"]
        recorded = case.out(run, f"stage{number}/scores")
        may = recorded > float("-inf")
        near(f"{run}/stage{number}/scores", view.scores[may], recorded[may], COARSE)
        case.compared.add(f"out/{run}/stage{number}/scores")
        before = kept
