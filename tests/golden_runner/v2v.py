"""V2V on a CLIP tower: DUET-VLM and the original VisionZip."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from duet_vlm import EncoderView, SpanPlan, attach
from duet_vlm.evaluation.speed.prompts import encode
from duet_vlm.methods.encoder.visionzip import VisionZip
from duet_vlm.methods.two_stage.duet import Duet
from duet_vlm.ops.merge import merged_rows
from duet_vlm.ops.select import ranking
from duet_vlm.planning.tokens import Selection
from golden_runner.case import SCORE, STATE, Case
from golden_runner.models import llava, renamed
from golden_runner.spy import spying


def check(case: Case) -> None:
    model = llava(renamed(case.weights(), {"vision_model.": "model.vision_tower."}), image_token=7, vision=case.config)
    pixels = case.given("pixel_values")
    view = signals(model, pixels)
    features = tower_features(model, pixels)
    state, score = tolerances(model, pixels)
    for run, settings in case.runs.items():
        if "error" in settings:
            with case.official_error(run):
                rows = through_hooks(model, preset(settings), pixels)
                # VisionZip without contextual rows divides by zero in the released code; here the dominant rows are the
                # result
                expected = settings["dominant"] if settings["contextual"] == 0 else -1
                assert rows.shape[1] == expected, f"{run}: {tuple(rows.shape)} rows instead of an error"
            continue
        reducer = preset(settings)
        plan = counts(reducer, settings, features.shape[1])
        number = torch.full((len(features),), 1)
        view = replace(
            view, dominant=number * plan.dominant, contextual=number * plan.contextual, plans=(plan,) * len(features)
        )
        selection = reducer.select_tokens(view)
        rows = merged_rows(features, selection)
        case.close(run, "hidden_states_save", rows, state)
        case.close(run, "dominant_tokens", rows[:, : plan.dominant], state)
        case.close(run, "contextual_tokens", rows[:, plan.dominant :], state)
        case.fact(run, "tokens_out", rows.shape[1])
        compare_choice(case, run, view, selection, plan.dominant, score)
        # with the CLS row, more rows than placeholders cannot enter the decoder: refused by attach()
        if plan.entry <= plan.tokens:
            case.close(run, "hidden_states_save", through_hooks(model, reducer, pixels), state)


def preset(settings: dict[str, Any]) -> Duet | VisionZip:
    if "cluster_width" in settings:
        return Duet.official_llava(settings["dominant"], settings["contextual"], settings["cluster_width"], schedule=())
    return VisionZip.official(settings["dominant"], settings["contextual"])


def counts(reducer: Duet | VisionZip, settings: dict[str, Any], rows: int) -> SpanPlan:
    """The plan of the method; where it refuses because CLS and all patches are one row more than the placeholders, the
    same counts."""
    try:
        return reducer.plan(rows - 1, 1, None)
    except ValueError:
        left = rows - settings["dominant"]
        assert 0 < left <= settings["contextual"], f"a plan for {settings} was refused"
        contextual = min(left, 1 if settings.get("cluster_width") == 0 else settings["contextual"])
        return SpanPlan(rows - 1, settings["dominant"], contextual, (settings["dominant"] + contextual,))


def tower_features(model: Any, pixels: Tensor) -> Tensor:
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]


def tolerances(model: Any, pixels: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """For features and for scores of the tower. Deep random towers amplify float32 rounding beyond the usual tolerance
    (the recording itself is off by more); there it is what float32 costs against float64, measured on the stock tower
    without the recording."""
    if len(model.model.vision_tower.encoder.layers) <= 8:
        return STATE, SCORE
    exact = copy.deepcopy(model).double()
    features, scores = tower_features(model, pixels), signals(model, pixels).importance[:, 1:]
    lost = (features - tower_features(exact, pixels.double())).abs().max()
    blurred = (scores - signals(exact, pixels.double()).importance[:, 1:]).abs().max() / scores.max()
    return STATE | {"absolute": max(STATE["absolute"], float(lost))}, SCORE | {
        "relative": max(SCORE["relative"], float(blurred))
    }


def signals(model: Any, pixels: Tensor) -> EncoderView:
    """Importance and keys as the library's own recorder sees them."""
    seen: list[EncoderView] = []
    with attach(model, spying(Duet.official_llava(1, 1, 1, schedule=()), seen)):
        encode(model, {"pixel_values": pixels})
    return seen[0]


def through_hooks(model: Any, reducer: Duet | VisionZip, pixels: Tensor) -> Tensor:
    """The rows that reach the projector of an attached model."""
    rows: list[Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: rows.append(args[0]))
    try:
        with attach(model, reducer):
            encode(model, {"pixel_values": pixels})
    finally:
        hook.remove()
    return rows[0]


def compare_choice(
    case: Case, run: str, view: EncoderView, selection: Selection, dominant: int, score: dict[str, float]
) -> None:
    batch, width = view.valid.shape
    kept = torch.zeros(batch, width, dtype=torch.long).scatter_(1, selection.index[:, :dominant], 1)
    anchors = selection.index[:, dominant:]
    case.close(run, "cls_attention_sum", view.importance[:, 1:], score)
    case.same(run, "kept_mask", kept)
    case.same(run, "all_indices", ranking(view.importance, view.valid)[:, :dominant])
    case.same(run, "target_positions", anchors)
    case.same(run, "target_indices_filtered", ((1 - kept).cumsum(1) - 1).gather(1, anchors))
    joins = selection.target_row >= 0
    case.same(run, "merge_positions", torch.stack([m[j] for m, j in zip(selection.source_tokens, joins, strict=True)]))
    if case.has(run, "assignment"):
        case.same(
            run, "assignment", torch.stack([i[j] - dominant for i, j in zip(selection.target_row, joins, strict=True)])
        )
