"""VScan: both scans of a CLIP tower and what is merged, through the hooks; the two functions for Qwen2.5-VL; the drop
inside a Llama decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from duet_vlm import EncoderView, SpanPlan, attach
from duet_vlm.evaluation.speed.prompts import encode
from duet_vlm.methods.two_stage.vscan import VScan
from duet_vlm.ops.merge import merged_rows
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.encoder_view import LayerView
from golden_runner.case import STATE, Case
from golden_runner.models import TINY_LLAMA, llava, renamed
from golden_runner.spy import Watch, spying
from golden_runner.t2v import Prompt, compare_decode, compare_positions, compare_prefill
from golden_runner.towers import PLACES, PROJECTOR, beside
from golden_runner.v2v import tolerances, tower_features


def check_clip(case: Case) -> None:
    config = case.config
    text = TINY_LLAMA | {"hidden_size": config["projected"], "num_attention_heads": 1}
    model = llava(renamed(case.weights(), PLACES | PROJECTOR), image_token=7, vision=config["vision"], text=text)
    pixels, heads = case.given("pixel_values"), config["vision"]["num_attention_heads"]
    hidden, (state, score) = tower_features(model, pixels)[:, 1:], tolerances(model, pixels)
    projected = model.model.multi_modal_projector(hidden)
    beside(case, "hidden", hidden, state)
    beside(case, "projected", projected, STATE)
    for run, settings in case.runs.items():
        if "error" in settings:
            with case.official_error(run):
                assert VScan.official(settings["n"], ()).plan(hidden.shape[1], 1, None).entry == settings["n"]
            continue
        method = VScan.official(settings["n"], ())
        plan = method.plan(hidden.shape[1], 1, None)
        if not plan.reduces_entry:  # all tokens: nothing is chosen, there as here
            case.same(run, "kept", torch.arange(plan.tokens).expand(len(hidden), -1))
            case.close(run, "rows", projected, STATE)
            continue
        seen: list[EncoderView] = []
        with attach(model, spying(method, seen)):
            encode(model, {"pixel_values": pixels})
        (view,) = seen
        for name, layer in (("deep", view.layers[0]), ("shallow", view.layers[1])):
            beside(
                case,
                f"cls_attention_{name}",
                layer.importance / heads,
                score | {"relative": max(1e-4, score["relative"])},
            )
        compare(case, run, method.select_tokens(view), view.features)
        case.fact(run, "kept", plan.entry)


def compare(case: Case, run: str, selection: Selection, features: Tensor) -> None:
    shape = case.out(run, "kept").shape
    case.same(run, "kept", selection.index.view(shape))
    case.close(run, "rows", merged_rows(features, selection).view(case.out(run, "rows").shape), STATE)
    if case.has(run, "merged"):
        joins = selection.target_row >= 0
        case.same(run, "merged", selection.source_tokens[joins].view(case.out(run, "merged").shape))
        case.same(run, "merged_into", selection.target_row[joins].view(case.out(run, "merged").shape))


def check_qwen(case: Case) -> None:
    rows, columns = case.config["token_h"], case.config["token_w"]
    local, deep, features = (case.given(name)[None] for name in ("local_scores", "global_scores", "embeds"))
    token = torch.arange(rows * columns)[None]
    for run, settings in case.runs.items():
        method = VScan.official_qwen25(settings["n"], (), window=case.config.get("window", 4))
        plan = method.plan(rows * columns, 1, None)
        view = view_of(
            plan, deep, local, features, torch.stack([token // columns, token % columns], 2), (rows, columns)
        )
        if "error" in settings:
            with case.official_error(run):
                assert method.select_tokens(view).index.shape[1] == settings["n"]
            continue
        selection = method.select_tokens(view)
        chosen = method.locals_of(view)[0].nonzero()[:, 0]
        case.same(run, "local", chosen[local[0, chosen].argsort(descending=True, stable=True)])
        compare(case, run, selection, features)


def view_of(
    plan: SpanPlan, deep: Tensor, shallow: Tensor, features: Tensor, place: Tensor, sides: tuple[int, int]
) -> EncoderView:
    count = torch.tensor([plan.dominant])
    return EncoderView(
        torch.ones_like(deep).bool(), count, count * 0, (plan,), deep, features=features, parts=torch.zeros_like(deep).long(), coords=place,
        layers=(LayerView(deep), LayerView(shallow)), grid_size=torch.tensor([sides]), crop_grid=torch.zeros(1, 2).long(),
    )  # fmt: skip


def check_decoder(case: Case) -> None:
    head = case.tensors.pop("weights/lm_head.weight", None)
    batch = case.meta["B"]
    for name, rows in case.tensors.items():  # one number for each sample, and for each layer
        if name.endswith(("/token_id", "/position_id_entering_each_layer")):
            case.tensors[name] = rows.view(-1, batch) if rows.ndim == 1 and "position" in name else rows.view(batch, -1)
    prompt = Prompt(case, [case.meta["image_start"]] * batch, [case.meta["image_tokens"]] * batch)
    prompt.table = prompt.table if head is None else head
    for run, settings in case.runs.items():
        method = VScan.official(
            None, tuple(zip(settings["layer_list"], settings["image_token_list"], strict=True)), shallow=0
        )
        if "error" in settings:
            with case.official_error(run):
                run_decoder(case, run, settings, prompt, method, recorded=False)
            continue
        run_decoder(case, run, settings, prompt, method)


def run_decoder(
    case: Case, run: str, settings: dict[str, Any], prompt: Prompt, method: VScan, recorded: bool = True
) -> None:
    views: list[Any] = []
    cache = DynamicCache(config=prompt.text_model.config) if settings.get("decode") else None
    with attach(prompt.model, spying(method, views)) as handle, Watch(prompt.text_model) as watch:
        prompt(past_key_values=cache, use_cache=cache is not None)
        if not recorded:
            assert torch.isfinite(watch.last).all()
            return
        compare_prefill(case, run, handle, watch)
        case.close(run, "logits_last", watch.last[:, -1] @ prompt.table.T, STATE)
        state, start = handle._prompt_state, prompt.starts[0]
        for number, (layer, view) in enumerate(zip(settings["layer_list"], views, strict=True)):
            before, after, name = state.layer_group(layer - 1), state.layer_group(layer), f"stage{number}"
            case.close(run, f"{name}/hidden_before", watch.output[layer - 1], STATE)
            case.close(run, f"{name}/hidden_after", watch.hidden[layer], STATE)
            old, new = (
                torch.stack([s[v] for s, v in zip(g.tokens.prompt_index, g.tokens.visual, strict=True)]) - start
                for g in (before, after)
            )
            case.same(run, f"{name}/kept_original", new)
            case.same(
                run, f"{name}/kept", torch.stack([torch.searchsorted(a, b) for a, b in zip(old, new, strict=True)])
            )
            case.close(run, f"{name}/scores", view.scores, {"relative": 1e-4, "absolute": 0.0})
            compare_positions(case, run, f"{name}/position_ids_after", handle, watch, layer)
        compare_decode(case, run, prompt, watch, cache)
