"""Qwen2.5-VL: V2V after the merger, T2V with M-RoPE.

From the second T2V stage on the released code ranks only part of the image (see ``twin.OfficialDrop``). This library
does what is meant: there its stages are checked against a slow twin, and everything recorded is reproduced by the
released rule, on top of our V2V.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from duet_vlm import DecoderView, EncoderView, Handle, Reducer, Selection, SpanPlan, attach
from duet_vlm.evaluation.speed.prompts import encode
from duet_vlm.methods.baselines.none import NoReduction
from duet_vlm.methods.encoder.visionzip import VisionZip
from duet_vlm.methods.two_stage.duet import Duet
from duet_vlm.ops.select import ranking
from golden_runner.case import SCORE, Case, equal, near
from golden_runner.models import generate, load, renamed
from golden_runner.spy import Watch, scores_at, spying
from golden_runner.twin import OfficialDrop, best, ranking_scores

RULES = {"visual.": "model.visual.", "model.": "model.language_model.", "lm_head.": "lm_head."}
TOP_LEVEL = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings")
RATIOS = {"dominant": 0.65, "contextual": 0.05}  # the released defaults
SETTINGS = {
    "visionzip_enabled", "use_ori_visionzip", "dominant_ratio", "contextual_ratio", "dominant_tokens", "contextual_tokens", "cluster_width",
    "pdrop_enabled", "layer_list", "image_token_ratio_list",
}  # fmt: skip


def check(case: Case) -> None:
    models: dict[str, Any] = {}
    for run, settings in case.runs.items():
        attention = settings.get("attn", case.meta["default_attn"])
        if attention not in models:
            models[attention] = build(case, attention)
        unknown = set(settings["duet"]) - SETTINGS
        assert not unknown, f"{run}: unknown settings {unknown}"
        qwen = Qwen(case, run, settings, models[attention], attention)
        if "error" in settings:
            with case.official_error(run):
                qwen.survives()
        else:
            qwen.compare()


def build(case: Case, attention: str) -> Any:
    text = dict(case.config["llm_config"])
    top = {name: text.pop(name) for name in TOP_LEVEL if name in text}
    config = Qwen2_5_VLConfig(vision_config=dict(case.config["vision_config"]), text_config=text, **top)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.set_attn_implementation(attention)
    load(model, renamed(case.weights(), RULES))
    return model


def scores_in_full(
    model: Any, inputs: dict[str, Tensor], embedded: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """By decoder layer of the stock model what the rows behind the image pay to its tokens, and the rows that enter, or
    that ``embedded`` says."""
    text_model, dtype = model.model.language_model, next(model.parameters()).dtype
    tokens = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten().tolist()
    queries = list(range(tokens[-1] + 1, inputs["input_ids"].shape[1]))

    def enter(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return ((embedded.to(dtype), *args[1:]), kwargs) if embedded is not None else None

    with _Hooked(text_model.layers[0].register_forward_pre_hook(enter, with_kwargs=True)), Watch(text_model) as watch:
        model(**inputs | {"pixel_values": inputs["pixel_values"].to(dtype)})
    tables = [tuple(t[0] for t in table) for table in watch.rotary]
    rows = [hidden[0] for hidden in watch.hidden]
    return [
        ranking_scores(*found, queries, tokens) for found in zip(text_model.layers, rows, tables, strict=True)
    ], watch.hidden[0]


def score_tolerance(model: Any, inputs: dict[str, Tensor]) -> dict[str, float]:
    """For scores inside the decoder: twice what float32 sums cost the stock decoder against float64, at its worst
    layer, as recording and ours are each as far from the truth; it grows with depth, width and the sharpness of
    attention."""
    found, embedded = scores_in_full(model, inputs)
    exact, _ = scores_in_full(copy.deepcopy(model).double(), inputs, embedded)
    lost = max(float((ours - truth).abs().max() / truth.max()) for ours, truth in zip(found, exact, strict=True))
    return SCORE | {"relative": max(SCORE["relative"], 2 * lost)}


class Qwen:
    """One run of a case."""

    def __init__(self, case: Case, run: str, settings: dict[str, Any], model: Any, attention: str) -> None:
        self.case, self.run, self.settings, self.model, self.duet = case, run, settings, model, settings["duet"]
        self.text_model = model.model.language_model
        ids = case.given("input_ids")
        visual = ids == model.config.image_token_id
        self.tokens, self.start = int(visual.sum()), int(visual[0].nonzero()[0])
        self.inputs = {
            name: case.given(name) for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
        }
        self.inputs["mm_token_type_ids"] = visual.long()
        # under sdpa the released code scores with a second, unmasked attention over every patch of the call
        self.signal = {"options": {"signal_layer": -1}, "signal_segments": attention != "sdpa"}
        self.v2v = self.duet.get("visionzip_enabled", True)
        self.layers: list[int] = self.duet["layer_list"] if self.duet.get("pdrop_enabled") else []
        self.ratios: list[float] = self.duet.get("image_token_ratio_list", [])[: len(self.layers)]
        self.score = score_tolerance(model, self.inputs) if self.layers else SCORE

    # ---- settings

    def keep(self, kind: str) -> int | float:
        given = self.duet.get(f"{kind}_tokens")
        return self.duet.get(f"{kind}_ratio", RATIOS[kind]) if given is None else given

    def official_counts(self) -> tuple[int, int]:
        """Dominant and contextual rows as the released code counts them; even 0 contextual tokens make one row."""
        dominant, contextual = (
            k if isinstance(k, int) else int(k * self.tokens) for k in (self.keep("dominant"), self.keep("contextual"))
        )
        dominant = min(dominant, self.tokens - 1)
        one = self.duet.get("cluster_width", 4) == 0 and not self.duet.get("use_ori_visionzip")
        return dominant, max(1, min(1 if one else contextual, self.tokens - dominant))

    def preset(self, drops: bool = True) -> Reducer:
        schedule = tuple(zip_longest(self.layers, self.ratios)) if drops else ()
        if not self.v2v:
            return Duet.official_qwen25(None, None, schedule=schedule, **self.signal) if schedule else NoReduction()
        if not self.duet.get("use_ori_visionzip"):
            width = self.duet.get("cluster_width", 4)
            return Duet.official_qwen25(
                self.keep("dominant"), self.keep("contextual"), width, schedule=schedule, **self.signal
            )
        dominant, contextual = self.official_counts()
        zipped = VisionZip(
            dominant=dominant, contextual=contextual, merge="anchor_plus_mean", anchor_step="floor", **self.signal
        )
        if not schedule:
            return zipped
        both = type(
            "VisionZipThenDrop", (Duet,), {"select_tokens": lambda _, view: zipped.select_tokens(view), "name": "duet"}
        )
        return both.official_qwen25(dominant, contextual, schedule=schedule, **self.signal)

    # ---- running

    def survives(self) -> None:
        """The released code stops here; ours runs the settings as they are meant."""
        with attach(self.model, self.preset()) as handle, Watch(self.text_model) as watch:
            self.model(**self.inputs)
            assert torch.isfinite(watch.last).all()
            widths = [h.shape[1] for h in watch.hidden]
            assert widths == sorted(widths, reverse=True)
            if len(handle._prompt_state.spans) == 1 == len(handle._prompt_state.spans[0]):
                text = self.inputs["input_ids"].shape[1] - self.tokens
                assert widths == [text + n for n in handle.plan(self.tokens).counts]

    def signals(self) -> EncoderView:
        """What V2V would look at."""
        views: list[Any] = []
        with attach(self.model, spying(Duet.official_qwen25(1, 1, schedule=(), **self.signal), views)):
            encode(self.model, {name: self.inputs[name] for name in ("pixel_values", "image_grid_thw")})
        return views[0]

    def compare(self) -> None:
        case, run = self.case, self.run
        views: list[Any] = []
        idle = self.signals()  # for runs in which V2V is off or has nothing to choose
        several = len(self.layers) > 1
        reducer = self.preset()
        with self.images(), attach(self.model, spying(reducer, views)) as handle, Watch(self.text_model) as watch:
            logits = self.model(**self.inputs, use_cache=True).logits
            case.fact(run, "image_start", self.start)
            self.compare_vision(next((v for v in views if isinstance(v, EncoderView)), idle))
            if self.v2v:
                self.compare_entry(handle, watch)
            case.same(run, "rope_deltas", self.model.model.rope_deltas)
            self.positions("prefill_position_ids_entering_first_layer", watch, 0)
            if self.layers:
                self.compare_first_stage(handle, watch, [v for v in views if isinstance(v, DecoderView)])
            if several:
                self.compare_twin(handle, watch, views)
            else:
                case.fact(run, "seq_len_entering_each_layer", [h.shape[1] for h in watch.hidden])
                self.compare_end(logits, watch)
        if several:
            self.compare_official()

    def images(self) -> Any:
        """Compares the merged tokens that leave the tower, in raster order."""
        case, run = self.case, self.run

        def at_tower(module: Any, args: Any, output: Any) -> None:
            case.close(run, "v2v/image_embeds", output.pooler_output)

        return _Hooked(self.model.model.visual.register_forward_hook(at_tower))

    def positions(self, name: str, watch: Watch, layer: int) -> None:
        watch.rotates(layer, self.case.out(self.run, name))
        self.case.compared.add(f"out/{self.run}/{name}")

    # ---- V2V

    def compare_vision(self, view: EncoderView) -> None:
        """Scores, metric and choice of V2V, on what the library's own recorder saw."""
        case, run = self.case, self.run
        case.scores(run, "v2v/token_score", view.importance[0])
        case.close(run, "v2v/token_key_mean_over_heads", view.keys[0])
        if not self.v2v:
            return
        dominant, contextual = self.official_counts()
        plan = SpanPlan(self.tokens, dominant, contextual, (dominant + contextual,))
        one = torch.ones(1, dtype=torch.long)
        view = replace(view, dominant=one * dominant, contextual=one * contextual, plans=(plan,))
        selection: Selection = self.preset().select_tokens(view)  # type: ignore[attr-defined]
        kept = torch.zeros(self.tokens, dtype=torch.long)
        kept[selection.index[0, :dominant]] = 1
        anchors, joins = selection.index[0, dominant:], selection.target_row[0] >= 0
        order = ranking(view.importance, view.valid)[0, :dominant]
        assert set(order.tolist()) == set(kept.nonzero().flatten().tolist())
        case.same(run, "v2v/dominant_indices_score_order", order)
        case.same(run, "v2v/target_positions", anchors)
        case.same(run, "v2v/target_indices_filtered", ((1 - kept).cumsum(0) - 1)[anchors])
        case.same(run, "v2v/merge_positions", selection.source_tokens[0][joins])
        if case.has(run, "v2v/assignment"):
            case.same(run, "v2v/assignment", selection.target_row[0][joins] - dominant)

    def compare_entry(self, handle: Handle, watch: Watch) -> None:
        tokens = handle._prompt_state.layer_groups[0].tokens
        mask = torch.zeros(self.inputs["input_ids"].shape[1], dtype=torch.long)
        mask[tokens.prompt_index[0]] = 1
        self.case.same(self.run, "v2v/sequence_keep_mask", mask)
        self.case.close(self.run, "v2v/inputs_embeds_reduced", watch.calls[0][0][0])

    # ---- T2V

    def compare_first_stage(self, handle: Handle, watch: Watch, views: list[DecoderView]) -> None:
        case, run, state, layer = self.case, self.run, handle._prompt_state, self.layers[0]
        before, after = state.layer_group(layer - 1).tokens, state.layer_group(layer).tokens
        if layer in state.record.scored_layers:
            scores = views[state.record.scored_layers.index(layer)].scores[0]
        else:
            scores = scores_at(handle, layer, watch)[0][before.visual[0]]
        old, new = (t.prompt_index[0][t.visual[0]].tolist() for t in (before, after))
        case.close(run, "stage0/scores", scores, self.score)
        case.same(run, "stage0/kept_in_ranked_block", [old.index(t) for t in new])
        case.same(run, "stage0/attention_mask", after.valid)
        case.close(run, "stage0/hidden_states", watch.hidden[layer])
        self.positions("stage0/position_ids", watch, layer)

    def compare_twin(self, handle: Handle, watch: Watch, views: list[Any]) -> None:
        """Our later stages: every visual token alive is ranked by the text after the image, keeps count from the entry."""
        state = handle._prompt_state
        scored = dict(zip(state.record.scored_layers, [v for v in views if isinstance(v, DecoderView)], strict=True))
        entered = int(state.layer_groups[0].tokens.visual.sum())
        for layer, ratio in list(zip(self.layers, self.ratios, strict=True))[1:]:
            before, after = state.layer_group(layer - 1).tokens, state.layer_group(layer).tokens
            tokens = before.visual[0].nonzero().flatten().tolist()
            keep = int(entered * ratio)
            assert int(after.visual.sum()) == keep
            if layer not in scored:
                continue
            queries = list(range(tokens[-1] + 1, before.prompt_index.shape[1]))
            # positions are kept, so the table of the layer before serves
            table = tuple(t[0] for t in watch.rotary[layer - 1])
            scores = ranking_scores(self.text_model.layers[layer], watch.output[layer - 1][0], table, queries, tokens)
            near(
                f"{self.run}: our stage before layer {layer} against the slow twin",
                scored[layer].scores[0],
                scores,
                self.score,
            )
            expected = before.prompt_index[0][[tokens[i] for i in best(scores, keep)]]
            equal(
                f"{self.run}: our survivors at layer {layer} against the slow twin",
                after.prompt_index[0][after.visual[0]],
                expected,
            )

    def compare_official(self) -> None:
        """Our V2V with the released drop rule gives every recorded number."""
        case, run = self.case, self.run
        entered = sum(self.official_counts()) if self.v2v else self.tokens
        with attach(self.model, self.preset(drops=False)):
            drop = OfficialDrop(self.text_model, self.layers, self.ratios, self.start, entered)
            try:
                with Watch(self.text_model) as watch:
                    logits = self.model(**self.inputs, use_cache=True).logits
                    case.fact(run, "seq_len_entering_each_layer", [h.shape[1] for h in watch.hidden])
                    case.fact(run, "ranked_block_len", drop.blocks)
                    case.fact(run, "keep_length", drop.left)
                    for s, layer in enumerate(self.layers):
                        case.close(run, f"stage{s}/scores", drop.scores[s], self.score)
                        case.same(run, f"stage{s}/kept_in_ranked_block", drop.kept[s])
                        case.close(run, f"stage{s}/hidden_states", watch.hidden[layer])
                        case.same(run, f"stage{s}/attention_mask", torch.ones(1, watch.hidden[layer].shape[1]))
                        self.positions(f"stage{s}/position_ids", watch, layer)
                    self.compare_end(logits, watch)
            finally:
                drop.undo()

    # ---- the end

    def compare_end(self, logits: Tensor, watch: Watch) -> None:
        case, run = self.case, self.run
        case.close(run, "logits", logits)
        self.positions("prefill_position_ids_entering_last_layer", watch, len(watch.hidden) - 1)
        if not case.names(run, "generate/"):
            return
        first, steps = len(watch.calls), case.out(run, "generate/new_token_ids").shape[1]
        result = generate(self.model, self.inputs, steps)
        case.same(run, "generate/new_token_ids", result.sequences[:, self.inputs["input_ids"].shape[1] :])
        case.close(run, "generate/step_logits", torch.cat(result.logits))
        for name, layer in (("layer0", 0), ("last_layer", len(watch.hidden) - 1)):
            recorded = case.out(run, f"generate/decode_position_ids_{name}")
            assert len(recorded) == len(watch.calls) - first - 1
            for step, position in enumerate(recorded):
                watch.rotates(layer, position.view(3, 1, 1), call=first + 1 + step)
            case.compared.add(f"out/{run}/generate/decode_position_ids_{name}")
        widths = [[h.shape[1] for h in hidden] for hidden, *_ in watch.calls[first:]]
        case.fact(run, "generate_seq_len_entering_each_layer_per_step", widths)
        case.fact(run, "kv_len_after_generate", [layer.keys.shape[-2] for layer in result.past_key_values.layers])


class _Hooked:
    """A hook for the length of a ``with`` block."""

    def __init__(self, hook: Any) -> None:
        self.hook = hook

    def __enter__(self) -> None:
        pass

    def __exit__(self, *args: Any) -> None:
        self.hook.remove()
