"""SCOPE and DivPrune: the choice on given features, SCOPE through a CLIP tower, DivPrune in the input of the language
model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from duet_vlm import EncoderReducer, EncoderView, attach
from duet_vlm.evaluation.speed.prompts import encode
from duet_vlm.methods.encoder.divprune import DivPrune
from duet_vlm.methods.encoder.scope import Scope
from golden_runner.case import Case
from golden_runner.models import llava, renamed
from golden_runner.spy import spying
from golden_runner.v2v import tolerances, tower_features


def check_scope(case: Case) -> None:
    if case.meta["level"] == "vision tower":
        check_tower(case)
        return
    features, importance = case.given("features"), case.given("cls_attention_sum")
    for run, settings in case.runs.items():
        compare(case, run, scope(settings), features, importance)


def check_divprune(case: Case) -> None:
    features = case.given("features")[None]
    for run, settings in case.runs.items():
        method = DivPrune.official(settings["ratio"])
        assert method.plan(features.shape[1], 1, None).entry == settings["n"]
        kept = compare(case, run, method, features, None)[0]
        if case.has(run, "inputs_embeds"):
            before, whole = case.config["prefix"], case.given("inputs_embeds")
            rest = whole[:, before + features.shape[1] :]
            case.close(
                run,
                "inputs_embeds",
                torch.cat([whole[:, :before], features[:, kept], rest], 1),
                {"relative": 0.0, "absolute": 0.0},
            )


def scope(settings: dict[str, Any]) -> Scope:
    return Scope(
        keep=settings["n"], alpha=settings["alpha"], combined="add" if settings.get("combined") == "add" else "multiply"
    )


def compare(case: Case, run: str, method: EncoderReducer, features: Tensor, importance: Tensor | None) -> Tensor:
    """Who is kept, and in which order they were chosen: what one more adds."""
    n = case.runs[run]["n"]
    kept = chosen(method, features, importance, [n] * len(features))
    shape = case.out(run, "kept").shape
    case.same(run, "kept", kept.nonzero()[:, 1].view(shape))
    if case.has(run, "order"):
        orders = []
        for row in range(len(features)):
            rows = features[row].expand(n, -1, -1)
            sets = chosen(
                method, rows, None if importance is None else importance[row].expand(n, -1), list(range(1, n + 1))
            ).int()
            orders.append(torch.diff(sets, dim=0, prepend=torch.zeros_like(sets[:1])).argmax(1))
        case.same(run, "order", torch.stack(orders).view(shape))
    return kept.nonzero()[:, 1].view(len(features), -1)


def chosen(method: EncoderReducer, features: Tensor, importance: Tensor | None, counts: list[int]) -> Tensor:
    """Mask [B, N] of what the method takes where row b may keep ``counts[b]``."""
    tokens = features.shape[1]
    plans = tuple(type(method)(keep=count).plan(tokens, 1, None) for count in counts)
    valid = torch.ones(features.shape[:2], dtype=torch.bool)
    count = torch.tensor(counts)
    selection = method.select_tokens(EncoderView(valid, count, count * 0, plans, importance, None, features))
    return torch.zeros_like(valid).scatter_reduce(1, selection.index, selection.valid, "amax")


def check_tower(case: Case) -> None:
    model = llava(
        renamed(case.weights(), {"vision_model.": "model.vision_tower.", "": "model.vision_tower."}),
        image_token=7,
        vision=case.config,
    )
    for run, settings in case.runs.items():
        pixels = case.tensors[f"in/{run}/pixel_values"]
        seen: list[EncoderView] = []
        rows: list[Tensor] = []
        hook = model.model.multi_modal_projector.register_forward_hook(
            lambda module, args, output, rows=rows: rows.append(args[0])
        )
        with attach(model, spying(scope(settings), seen)):
            encode(model, {"pixel_values": pixels})
        hook.remove()
        state, score = tolerances(model, pixels)
        case.close(run, "hidden", tower_features(model, pixels)[:, 1:], state)
        case.close(run, "cls_attention_sum", seen[0].importance, score)
        case.close(run, "rows", rows[0], state)
        compare(case, run, scope(settings), seen[0].features, seen[0].importance)
