"""LLaVA-PruMerge and PruMerge+: what the hooks show of the last layer of a CLIP tower, and the choice on the recorded
queries and keys.

The choice starts from what was recorded: neighbours differ by less than what a tower of 24 layers loses to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from duet_vlm import EncoderView, SpanPlan, attach
from duet_vlm.evaluation.speed.prompts import encode
from duet_vlm.methods.encoder.prumerge import PruMerge
from duet_vlm.methods.encoder.prumerge_plus import PruMergePlus, adaptive
from duet_vlm.ops.merge import merged_rows
from duet_vlm.ops.score import cls_attention
from duet_vlm.ops.select import outliers
from duet_vlm.planning.tokens import Selection
from golden_runner.case import COARSE, STATE, Case, near
from golden_runner.models import llava, renamed
from golden_runner.spy import spying
from golden_runner.towers import beside
from golden_runner.v2v import tolerances, tower_features


def check(case: Case) -> None:
    check_tower(case)
    hidden, query, key, attention = (
        case.tensors[f"out/tower/{name}"] for name in ("hidden_states", "query", "key", "cls_attention")
    )
    near("cls_attention", cls_attention(query[:, None], key[:, None], key.shape[2] ** -0.5), attention, COARSE)
    for run, settings in case.runs.items():
        if "error" in settings:
            with case.official_error(run):
                for number in range(len(attention)):  # ours: every image by itself, and a grid of any length
                    one = slice(number, number + 1)
                    selection, _ = selected(case, settings, attention[one], key[one])
                    assert 0 < int(selection.valid.sum()) <= attention.shape[1]
            continue
        selection, kept = selected(case, settings, attention, key)
        case.same(run, "kept", kept)
        rows, rest = joining(selection, attention)
        case.same(run, "neighbours", rows)
        case.same(run, "not_kept", rest)
        features = merged_rows(hidden[:, 1:], selection)
        case.close(run, "features", features, STATE)
        case.fact(run, "tokens_out", features.shape[1])


def selected(case: Case, settings: dict[str, Any], attention: Tensor, key: Tensor) -> tuple[Selection, Tensor]:
    """What the preset makes of CLS attention [B, N] and keys [B, 1 + N, C], and the kept tokens in its order."""
    tokens = attention.shape[1]
    if settings["plus"] and settings["adaptive"]:
        reducer: PruMerge = PruMergePlus.official()
        kept = adaptive(attention[0])[None].expand(len(attention), -1)
        view = view_of(attention, key, SpanPlan(tokens, kept.shape[1], 1, ()))
        return reducer.around(view, kept, kept, torch.ones_like(kept, dtype=torch.bool)), kept
    share = settings.get("ratio")
    if settings["adaptive"]:
        everyone = attention.flatten()[None]
        share = outliers(everyone, torch.ones_like(everyone, dtype=torch.bool)).sum().item() / everyone.numel()
        assert abs(share - settings["ratio"]) < 1e-9
    reducer = (PruMergePlus if settings["plus"] else PruMerge).official(share)
    view = view_of(attention, key, reducer.plan(tokens, 1, None))
    if isinstance(reducer, PruMergePlus):
        return reducer.select_tokens(view), reducer.released(view)[0]
    selection = reducer.select_tokens(view)
    return selection, selection.index[:, :-1]


def view_of(attention: Tensor, key: Tensor, plan: SpanPlan) -> EncoderView:
    number = torch.ones(len(attention), dtype=torch.long)
    valid = torch.ones_like(attention, dtype=torch.bool)
    return EncoderView(
        valid, number * plan.dominant, number * plan.contextual, (plan,) * len(attention), attention, key[:, 1:]
    )


def joining(selection: Selection, attention: Tensor) -> tuple[Tensor, Tensor]:
    """The neighbours of every row in ascending order, as often as they count, and the tokens of the last row."""
    assert selection.weights is not None
    last = selection.index.shape[1] - 1
    rows, rest = [], []
    for members, into, weights, scores in zip(
        selection.source_tokens, selection.target_row, selection.weights, attention, strict=True
    ):
        of_rows = []
        for row in range(last):
            here = (into == row) & (weights != 1)  # 1: the kept token itself
            often = (weights[here] / scores[members[here]]).round().long()
            of_rows.append(members[here].repeat_interleave(often).sort().values)
        rows.append(torch.stack(of_rows))
        rest.append(members[into == last].sort().values)
    return torch.stack(rows), torch.stack(rest)


def check_tower(case: Case) -> None:
    """What an attached model shows the preset, and that the rows that reach the projector are those of its choice."""
    model = llava(renamed(case.weights(), {"vision_model.": "model.vision_tower."}), image_token=7, vision=case.config)
    pixels, seen, rows, raw = case.given("pixel_values"), [], [], {}
    attention = model.model.vision_tower.encoder.layers[-1].self_attn
    hooks = [model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: rows.append(args[0]))]
    for name, part in (("query", attention.q_proj), ("key", attention.k_proj)):
        hooks.append(part.register_forward_hook(lambda module, args, output, name=name: raw.update({name: output})))
    reducer = PruMerge.official(0.125)
    with attach(model, spying(reducer, seen)):
        encode(model, {"pixel_values": pixels})
    for hook in hooks:
        hook.remove()
    state, score = tolerances(model, pixels)
    score = score | {"relative": max(1e-4, score["relative"])}
    features = tower_features(model, pixels)
    beside(case, "tower/hidden_states", features, state)
    for name, found in raw.items():
        beside(case, f"tower/{name}", found, state | {"relative": 1e-4})
    beside(case, "tower/cls_attention", seen[0].importance, score)
    near("keys", seen[0].keys, case.tensors["out/tower/key"][:, 1:], state | {"relative": 1e-4})
    near("rows", rows[0], merged_rows(features[:, 1:], reducer.select_tokens(seen[0])), STATE)
