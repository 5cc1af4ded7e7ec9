"""Reroute: tokens that leave may come back, and the same schedules by deletion, on whole models through ``generate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from duet_vlm import DecoderView, Reducer, TokenOptions, attach
from duet_vlm.methods.baselines.none import NoReduction
from duet_vlm.methods.decoder.pyramiddrop import PyramidDrop
from duet_vlm.ops.select import top
from golden_runner.case import COARSE, Case, near
from golden_runner.models import generate, load
from golden_runner.spy import Watch, spying

SETTINGS = {"method", "action", "drop_layers", "keep_ratios", "monotonic", "scoring_layer", "keep_ratio"}
FACTS = {
    "kv_len_after_prefill", "kv_len_after_decode", "rows_leaving_each_layer", "stages", "visual_rows_computed_in_each_layer", "token_margin",
}  # fmt: skip


@dataclass(frozen=True)
class Monotonic(PyramidDrop):
    """Chooses among those that it chose before, by scores in which all take part."""

    name = "monotonic"

    def prune_tokens(self, view: DecoderView) -> Tensor:
        scores, before = view.scores, BEFORE[-1] if BEFORE else view.valid
        assert scores is not None
        BEFORE.append(top(scores.masked_fill(~before, -1.0), view.valid, view.num_keep))
        return BEFORE[-1]


BEFORE: list[Tensor] = []


def check(case: Case) -> None:
    config = AutoConfig.for_model(**case.config)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    # names of the tower changed since version 5.4 of transformers
    moved = {name.replace("vision_tower.vision_model.", "vision_tower."): t for name, t in case.weights().items()}
    load(model, moved)
    inputs = {
        name.removeprefix("in/"): tensor
        for name, tensor in case.tensors.items()
        if name.startswith("in/") and name not in ("in/inputs_embeds", "in/cos", "in/sin")
    }
    for run, settings in case.runs.items():
        assert settings.keys() <= SETTINGS | FACTS
        Run(case, run, settings, model, inputs)


def method(settings: dict[str, Any]) -> Reducer:
    """Deletion is the same schedule without re-entry; one decision is a schedule of one stage."""
    if settings["method"] == "none":
        return NoReduction()
    if settings["method"] == "fastv":
        schedule = ((settings["scoring_layer"], settings["keep_ratio"]),)
    else:
        schedule = tuple(zip(settings["drop_layers"], settings["keep_ratios"], strict=True))
    reducer = PyramidDrop.official_reroute(schedule)
    if settings["action"] == "physical_delete":
        return PyramidDrop.official_reroute(schedule, options=TokenOptions(reentry="none"))
    if settings.get("monotonic"):
        BEFORE.clear()
        return Monotonic(schedule=reducer.schedule, rounding=reducer.rounding, options=reducer.options)
    return reducer


class Run:
    """One recorded run: its prefill, its stages, and the tokens that it writes."""

    def __init__(self, case: Case, run: str, settings: dict[str, Any], model: Any, inputs: dict[str, Tensor]) -> None:
        self.case, self.run = case, run
        text_model, views, tokens = model.model.language_model, [], case.out(run, "decode/tokens")
        reducer = method(settings)
        watched = reducer if isinstance(reducer, NoReduction) else spying(reducer, views)
        with attach(model, watched) as handle, Watch(text_model) as watch:
            written = generate(model, inputs, tokens.shape[1])
            self.state, (hidden, _, output) = handle._prompt_state, watch.calls[0]
        case.same(run, "decode/tokens", written.sequences[:, inputs["input_ids"].shape[1] :])
        logits = torch.cat(written.logits)
        case.close(run, "decode/logits", logits)
        case.close(run, "logits_last", logits[:1])
        held = [layer.keys.shape[-2] for layer in written.past_key_values.layers]
        case.fact(run, "kv_len_after_decode", held)
        case.fact(run, "kv_len_after_prefill", [rows - tokens.shape[1] + 1 for rows in held])
        near("embeddings", hidden[0], case.given("inputs_embeds"))
        stream = hidden[0].clone()
        for layer, rows in output.items():
            stream[:, self.rows(layer)] = rows
            recorded = case.out(run, f"layer{layer}/out")
            case.close(run, f"layer{layer}/out", stream if recorded.shape == stream.shape else rows)
        last = text_model.norm(stream)
        recorded = case.out(run, "last_hidden_state")
        case.close(run, "last_hidden_state", last if recorded.shape == last.shape else last[:, self.rows(layer)])
        self.stages(views)

    def rows(self, layer: int) -> Tensor:
        return self.state.layer_group(layer).tokens.prompt_index[0]

    def images(self, layer: int) -> Tensor:
        """The visual tokens that ``layer`` reads, counted in the image."""
        tokens = self.state.layer_group(layer).tokens
        return tokens.prompt_index[0][tokens.visual[0]] - self.case.meta["image_start"]

    def stages(self, views: list[DecoderView]) -> None:
        case, run = self.case, self.run
        for number, view in enumerate(views):
            stage = case.runs[run]["stages"][number]
            kept, before = self.images(stage["layer"]), torch.arange(case.meta["image_tokens"])
            if case.runs[run]["action"] == "physical_delete":
                before = self.images(stage["layer"] - 1)
            case.same(run, f"stage{number}/kept_original", kept[None])
            case.same(run, f"stage{number}/kept", torch.searchsorted(before, kept)[None])
            scores = case.out(run, f"stage{number}/scores")
            open_to = scores.isfinite()
            assert view.scores is not None and view.scores.shape == scores.shape
            near(f"{run}/stage{number}/scores", view.scores[open_to], scores[open_to], COARSE)
            case.compared.add(f"out/{run}/stage{number}/scores")
