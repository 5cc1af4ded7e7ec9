"""CDPruner: relevance and choice through a whole prompt of an attached model, with CLIP's text tower beside it; and on
given features."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from duet_vlm import EncoderView, SpanPlan, attach
from duet_vlm.inputs.clip_text import ClipTextEncoder
from duet_vlm.methods.encoder.cdpruner import CDPruner
from duet_vlm.ops.greedy import cosine, greedy_dpp_map
from duet_vlm.ops.merge import unit_rows
from golden_runner.case import STATE, Case, near
from golden_runner.models import TINY_LLAMA, llava, load, renamed
from golden_runner.spy import spying
from golden_runner.towers import PLACES, PROJECTOR

RELEVANCE = {"relative": 1e-4, "absolute": 1e-6}
IMAGE = 7


def check(case: Case) -> None:
    (check_function if case.meta["level"] == "function" else check_clip)(case)


def check_clip(case: Case) -> None:
    config, weights = case.config, case.weights()
    clip = clip_of(config, weights)
    vision = {name: rows for name, rows in weights.items() if name.startswith(("vision.", "mm_projector."))}
    text = TINY_LLAMA | {"hidden_size": config["projected"], "num_attention_heads": 1}
    model = llava(renamed(vision, PLACES | PROJECTOR), image_token=IMAGE, vision=config["vision"], text=text)
    for run, settings in case.runs.items():
        ids = case.tensors[f"in/{run}/token_ids"][0].tolist()
        tower = ClipTextEncoder(clip, lambda text, ids=ids: {"input_ids": ids})
        seen = shown(model, CDPruner.official(settings["n"]), tower, case.tensors[f"in/{run}/pixel_values"])
        states = seen.layers[0].states
        case.close(run, "hidden", states, STATE)
        case.close(run, "projected", seen.features, STATE)
        case.close(run, "image_embeds", clip.visual_projection(clip.vision_model.post_layernorm(states)), STATE)
        pieces, real = tower.pieces([ids])
        near("text_embeds", pieces[real], unit_rows(case.out(run, "text_embeds")))
        case.compared.add(f"out/{run}/text_embeds")
        case.fact(run, "chunks", int(real.sum()))
        compare(case, run, CDPruner.official(settings["n"]), seen)


def clip_of(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """The CLIP model that the recorded parts are of."""
    text = {name: value for name, value in config["text"].items() if name != "text_positions"}
    text |= {
        "max_position_embeddings": config["text"]["text_positions"],
        "hidden_act": config["text"].get("hidden_act", "quick_gelu"),
    }
    size = config["text"]["projection_dim"]
    clip = CLIPModel(
        CLIPConfig(text_config=text, vision_config=config["vision"] | {"projection_dim": size}, projection_dim=size)
    ).eval()
    clip.text_model.config._attn_implementation = clip.vision_model.config._attn_implementation = "eager"
    rules = {
        "vision.vision_model.": "vision_model.",
        "text.text_model.": "text_model.",
        "text.": "",
        "visual_projection.": "visual_projection.",
    }
    load(clip, renamed({name: rows for name, rows in weights.items() if not name.startswith("mm_projector.")}, rules))
    return clip


class Processor:
    """Its tokenizer reads any ids as the same words; the recorded ids of the question come from the text tower's."""

    tokenizer = SimpleNamespace(decode=lambda ids, **options: "asked")


def shown(model: Any, method: CDPruner, tower: ClipTextEncoder, pixels: Tensor) -> EncoderView:
    """What the method of an attached model is shown of a prompt with as many samples as there are pictures."""
    seen: list[EncoderView] = []
    tokens = (pixels.shape[-1] // model.config.vision_config.patch_size) ** 2
    ids = torch.tensor([[1, *[IMAGE] * tokens, 2, 3]]).expand(len(pixels), -1)
    with attach(model, spying(method, seen), text_tower=tower, processor=Processor()):
        model(input_ids=ids, pixel_values=pixels)
    return seen[0]


def check_function(case: Case) -> None:
    projected, images, texts = (case.given(name) for name in ("projected", "image_embeds", "text_embeds"))
    batch, tokens = projected.shape[:2]
    similar = unit_rows(images) @ unit_rows(texts).T
    for run, settings in case.runs.items():
        method = CDPruner.official(settings["n"])
        plan = method.plan(tokens, 1, None)
        count = torch.full((batch,), plan.dominant)
        view = EncoderView(
            torch.ones(batch, tokens, dtype=torch.bool), count, count * 0, (plan,) * batch, features=projected, text_similarity=similar,
            text_similarity_valid=torch.ones(batch, len(texts), dtype=torch.bool),
        )  # fmt: skip
        if "error" in settings:
            with case.official_error(run):
                assert method.select_tokens(view).index.shape[1] == settings["n"]
            continue
        compare(case, run, method, view)


def compare(case: Case, run: str, method: CDPruner, view: EncoderView) -> None:
    weight = method.score(view)
    case.close(run, "relevance", weight, RELEVANCE)
    case.same(run, "kept", method.select_tokens(view).index)
    kernel = weight[:, :, None] * cosine(view.features, view.valid) * weight[:, None]
    n = case.runs[run]["n"]
    orders = []
    for one in kernel:  # what one more adds
        every = torch.ones(n, len(one), dtype=torch.bool)
        sets = greedy_dpp_map(one.expand(n, -1, -1), every, torch.arange(1, n + 1), n).int()
        orders.append(torch.diff(sets, dim=0, prepend=torch.zeros_like(sets[:1])).argmax(1))
    case.same(run, "order", torch.stack(orders))
    assert isinstance(view.plans[0], SpanPlan) and view.plans[0].entry == n
