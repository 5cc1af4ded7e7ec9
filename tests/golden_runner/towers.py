"""FasterVLM and VisPruner: who is kept of a CLIP tower, through the hooks, and of a SigLIP tower, by its recorded rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from duet_vlm import EncoderReducer, EncoderView, SpanPlan, attach
from duet_vlm.evaluation.speed.prompts import encode
from duet_vlm.methods.encoder.fastervlm import FasterVLM
from duet_vlm.methods.encoder.vispruner import VisPruner
from duet_vlm.ops.score import column_attention
from golden_runner.case import COARSE, STATE, Case, near
from golden_runner.models import TINY_LLAMA, llava, load, renamed
from golden_runner.spy import spying
from golden_runner.v2v import tower_features

PLACES = {"vision.vision_model.": "model.vision_tower.", "vision.": "model.vision_tower."}
PROJECTOR = {
    "mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "mm_projector.2.": "model.multi_modal_projector.linear_2.",
}


def check_clip(case: Case) -> None:
    text = TINY_LLAMA | {"hidden_size": case.config["projected"], "num_attention_heads": 1}
    model = llava(renamed(case.weights(), PLACES | PROJECTOR), image_token=7, vision=case.config["vision"], text=text)
    pixels = case.given("pixel_values")
    for run, settings in case.runs.items():
        if "error" in settings:
            with case.official_error(run):
                assert through_hooks(model, preset(case, settings), pixels)[1].shape[1] == settings["n"]
            continue
        view, rows = through_hooks(model, preset(case, settings), pixels)
        case.same(run, "kept", preset(case, settings).select_tokens(view).index)
        case.close(run, "rows", rows, STATE)
        beside(case, "hidden", tower_features(model, pixels)[:, 1:], STATE)
        beside(case, "cls_attention_mean", view.importance / case.config["vision"]["num_attention_heads"], COARSE)


def check_siglip(case: Case) -> None:
    """LLaVA takes no SigLIP tower here, so what the method is shown is put together by hand: the last layer's
    attention, the features below."""
    settings = case.config["vision"]
    tower = SiglipVisionModel(SiglipVisionConfig(**settings)).eval()
    load(
        tower,
        renamed(
            {k: v for k, v in case.weights().items() if k.startswith("vision.")},
            {"vision.vision_model.": "", "vision.": ""},
        ),
    )
    projector = nn.Sequential(
        nn.Linear(settings["hidden_size"], case.config["projected"]),
        nn.GELU(),
        nn.Linear(*[case.config["projected"]] * 2),
    )
    load(projector, renamed({k: v for k, v in case.weights().items() if k.startswith("mm_")}, {"mm_projector.": ""}))
    hidden, received = tower_signals(tower, case.given("pixel_values"))
    beside(case, "hidden", hidden, STATE)
    beside(case, "attention_received_mean", received / hidden.shape[1], COARSE)
    for run, given in case.runs.items():
        if "error" in given:
            case.errors.add(run)  # as on CLIP, where what ours does instead is looked at
            continue
        plan = SpanPlan(hidden.shape[1], given["n"], 0, (given["n"],))
        number = torch.full((len(hidden),), 1)
        valid = torch.ones(hidden.shape[:2], dtype=torch.bool)
        view = EncoderView(valid, number * given["n"], number * 0, (plan,) * len(hidden), received, None, hidden)
        kept = preset(case, given).select_tokens(view).index
        case.same(run, "kept", kept)
        case.close(run, "rows", projector(hidden.gather(1, kept[..., None].expand(-1, -1, hidden.shape[2]))), STATE)


def preset(case: Case, settings: dict[str, Any]) -> EncoderReducer:
    if case.meta["method"] == "FasterVLM":
        return FasterVLM.official(settings["n"])
    return VisPruner.official(settings["n"], settings["important_ratio"])


def through_hooks(model: Any, reducer: EncoderReducer, pixels: Tensor) -> tuple[EncoderView, Tensor]:
    """What the method of an attached model is shown, and the rows that leave the projector."""
    seen: list[EncoderView] = []
    rows: list[Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: rows.append(output))
    try:
        with attach(model, spying(reducer, seen)):
            encode(model, {"pixel_values": pixels})
    finally:
        hook.remove()
    return seen[0], rows[0]


def tower_signals(tower: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows before the last layer, and the attention that each receives in it, summed over queries and averaged over
    heads."""
    caught: list[Tensor] = []
    last = tower.encoder.layers[-1].self_attn
    hook = last.register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
    hook.remove()
    query, key = (p(caught[0]).unflatten(-1, (last.num_heads, -1)).transpose(1, 2) for p in (last.q_proj, last.k_proj))
    return hidden, column_attention(query, key, last.scale)


def beside(case: Case, name: str, ours: Tensor, tolerance: dict[str, float]) -> None:
    """A tensor that all runs share."""
    near(name, ours, case.tensors[f"out/{name}"], tolerance)
    case.compared.add(f"out/{name}")
