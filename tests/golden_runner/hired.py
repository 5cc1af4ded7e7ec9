"""HiRED: budgets and choice through the tower's own signals, and what the language model is given.

The preset hands out what the released shares leave of a token; how many tokens each crop has before that, and which, is
what was recorded. The released packing, which exchanges rows and columns of the grid of crops and then cuts off what
the true shape does not have, is repeated here for the sake of the recorded rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from duet_vlm import EncoderView, SpanPlan, attach
from duet_vlm.evaluation.speed.prompts import encode
from duet_vlm.methods.encoder.hired import HiRED, kept_of_one
from duet_vlm.ops.groups import top_of_groups
from duet_vlm.reducers.encoder_view import LayerView
from golden_runner.case import STATE, Case, equal, near
from golden_runner.models import llava, renamed
from golden_runner.spy import spying
from golden_runner.v2v import tolerances, tower_features

PLACES = {
    "vision_tower.vision_model.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}


def check(case: Case) -> None:
    config = case.config
    weights = {
        name: rows for name, rows in case.weights().items() if "position_ids" not in name and name != "image_newline"
    }
    model = llava(
        renamed(weights, PLACES), image_token=config["image_token"], vision=config["vision"], text=config["text"]
    )
    pixels = case.given("pixel_values")
    seen: list[EncoderView] = []
    with attach(model, spying(HiRED.official(0.2), seen)):
        encode(model, {"pixel_values": pixels})
    (view,) = seen
    late, early = (layer.importance for layer in view.layers)
    hidden, (state, score) = tower_features(model, pixels), tolerances(model, pixels)
    score = score | {"relative": max(1e-4, score["relative"])}
    for run, settings in case.runs.items():
        if "error" in settings:
            with case.official_error(run):
                assert sum(len(kept) for kept in budgets(case, settings, late, early)) >= 0
            continue
        case.close(run, "hidden_states", hidden, state)
        for name, found in (("cls_attention_layer22", late), ("cls_attention_layer0", early)):
            if case.has(run, name):
                case.close(run, name, found, score)
        projected = model.model.multi_modal_projector(hidden[:, 1:])
        if case.has(run, "kept"):
            kept = kept_of_one(late[0], settings["token_budget_rate"], settings.get("spatial_budget") or 0.0)
            case.same(run, "kept", kept)
            case.fact(run, "kept_count", len(kept))
            if not settings.get("spatial_budget"):
                assert torch.equal(chosen_by_preset(settings, late, early, [1])[0], kept)
            spans = [projected[0, kept]]
        else:
            every = settings["token_budget_rate"] >= 1  # then nothing is ranked, neither there nor here
            masks = torch.ones_like(late).long() if every else torch.cat(budgets(case, settings, late, early, run))
            case.fact(run, "kept_per_crop", [rows.sum(1).tolist() for (rows,) in by_image(case, masks)])
            case.same(run, "masks", masks)
            case.close(run, "projected", projected, STATE)
            spans = [
                pack(case, rows, mask, number) for number, (rows, mask) in enumerate(by_image(case, projected, masks))
            ]
            case.close(run, "packed", torch.cat(spans), STATE)
            case.same(run, "packed_lens", [len(rows) for rows in spans])
            case.fact(run, "packed_lens", [len(rows) for rows in spans])
        compare_prompt(case, run, model, spans)


def crops_of(case: Case) -> list[int]:
    """Crops of each image, the overview included."""
    if case.config["pinpoints"] is None:
        return [1] * len(case.given("pixel_values"))
    return [1 + math.prod(grid(case, number)) for number in range(len(case.given("image_sizes")))]


def grid(case: Case, number: int) -> tuple[int, int]:
    """Rows and columns of an image's crops."""
    side = case.config["vision"]["image_size"]
    high, wide = select_best_resolution(case.given("image_sizes")[number].tolist(), case.config["pinpoints"])
    return high // side, wide // side


def by_image(case: Case, *rows: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(x.split(crops_of(case)) for x in rows), strict=True))


def view_of(case: Case, late: Tensor, early: Tensor, plans: list[SpanPlan]) -> EncoderView:
    """All crops of each image as one span, nothing cut off."""
    side = case.config["vision"]["image_size"] // case.config["vision"]["patch_size"]
    width, patches = max(plan.tokens for plan in plans), side**2
    batch = len(plans)
    layers = [torch.zeros(batch, width) for _ in range(2)]
    for number, parts in enumerate(by_image(case, late, early)):
        for layer, rows in zip(layers, parts, strict=True):
            layer[number, : rows.numel()] = rows.flatten()
    token = torch.arange(width).expand(batch, -1)
    valid = token < torch.tensor([[plan.tokens] for plan in plans])
    place = torch.stack([token % patches // side, token % side], 2)
    tiles = [grid(case, number) if case.config["pinpoints"] else (0, 0) for number in range(batch)]
    count = torch.tensor([plan.dominant for plan in plans])
    return EncoderView(
        valid, count, count * 0, tuple(plans), layers[0], parts=torch.where(valid, token // patches, -1), coords=place,
        layers=tuple(LayerView(rows) for rows in layers), grid_size=torch.full((batch, 2), side), crop_grid=torch.tensor(tiles),
    )  # fmt: skip


def budgets(case: Case, settings: dict[str, Any], late: Tensor, early: Tensor, run: str | None = None) -> list[Tensor]:
    """The released masks of each image's crops [crops, N], from the preset's quota; all images together give the same."""
    method = HiRED.official(settings["token_budget_rate"], settings["alpha"])
    plans = [method.plan(crops * late.shape[1], 1, None) for crops in crops_of(case)]
    view = view_of(case, late, early, plans)
    group, crops = method.crop_tokens(view)
    quota = method.quota(view, group, crops)
    kept = top_of_groups(view.importance, group, view.valid, quota, quota.sum(1))
    chosen = method.select_tokens(view)
    for number, plan in enumerate(plans):  # what the preset keeps: these, and the rest of the plan
        ours = torch.zeros_like(kept[number]).scatter(0, chosen.index[number][chosen.valid[number]], True)
        assert bool((ours | ~kept[number]).all()) and int(ours.sum()) == plan.dominant
        full = bool((quota[number, 1:] == late.shape[1]).any())  # what a full crop leaves is not given to others
        assert full or plan.dominant - int(kept[number].sum()) < crops_of(case)[number]
        if run is not None:
            count = crops_of(case)[number] - 1
            important = method.important(view, view.valid & (group == 0))[number]
            case.same(run, f"image{number}/crop_budgets", quota[number, 1 : 1 + count])
            case.same(run, f"image{number}/important_in_full_image", important.nonzero()[:, 0])
            case.fact(run, "crops_per_image", crops_of(case))
    return [mask[: plan.tokens].view(-1, late.shape[1]).long() for mask, plan in zip(kept, plans, strict=True)]


def chosen_by_preset(settings: dict[str, Any], late: Tensor, early: Tensor, crops: list[int]) -> list[Tensor]:
    """What the preset keeps of pictures that are not cut."""
    method = HiRED.official(settings["token_budget_rate"])
    plan = method.plan(late.shape[1], 1, None)
    count, side = torch.full((len(late),), plan.dominant), math.isqrt(late.shape[1])
    token = torch.arange(late.shape[1]).expand(late.shape)
    view = EncoderView(
        torch.ones_like(late).bool(), count, count * 0, (plan,) * len(late), late, parts=token * 0, layers=(LayerView(late), LayerView(early)),
        coords=torch.stack([token // side, token % side], 2), grid_size=torch.full((len(late), 2), side), crop_grid=torch.zeros(len(late), 2).long(),
    )  # fmt: skip
    return list(method.select_tokens(view).index)


def pack(case: Case, rows: Tensor, mask: Tensor, number: int) -> Tensor:
    """Overview, then the kept patches of the mosaic: [crops, N, D] -> [K, D]. The grid of crops is read as (columns,
    rows)."""
    side = math.isqrt(rows.shape[1])
    columns, lines = grid(case, number)
    marked = torch.cat([rows[1:], mask[1:, :, None].float()], 2)
    mosaic = marked.view(lines, columns, side, side, -1).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    high, wide = case.given("image_sizes")[number].tolist()
    now_high, now_wide = mosaic.shape[:2]
    if wide / high > now_wide / now_high:
        edge = (now_high - int(high * (now_wide / wide))) // 2
        mosaic = mosaic[edge : now_high - edge]
    else:
        edge = (now_wide - int(wide * (now_high / high))) // 2
        mosaic = mosaic[:, edge : now_wide - edge]
    flat = mosaic.flatten(0, 1)
    return torch.cat([rows[0][mask[0].bool()], flat[flat[:, -1] > 0.5, :-1]])


def compare_prompt(case: Case, run: str, model: Any, spans: list[Tensor]) -> None:
    """The spans in place of their placeholders, and the logits of the rows that are real."""
    ids, mask, token = case.given("input_ids"), case.given("attention_mask"), case.config["image_token"]
    samples = []
    for row, real, span in zip(ids, mask, spans, strict=True):
        row = row[real.bool()]
        at = int((row == token).nonzero()[0])
        text = model.get_input_embeddings()(row.clamp(max=model.config.text_config.vocab_size - 1))
        samples.append(torch.cat([text[:at], span, text[at + 1 :]]))
    recorded, positions, embeds, logits = (
        case.out(run, name) for name in ("attention_mask", "position_ids", "inputs_embeds", "logits")
    )
    for number, sample in enumerate(samples):
        real = recorded[number].bool()
        near(f"{run}/inputs_embeds[{number}]", embeds[number][real], sample)
        equal(f"{run}/position_ids[{number}]", positions[number][real], torch.arange(len(sample)))
        found = model.lm_head(model.model.language_model(inputs_embeds=sample[None]).last_hidden_state)[0]
        near(f"{run}/logits[{number}]", logits[number][real], found)
        equal(f"{run}/attention_mask[{number}]", recorded[number].sum(), torch.tensor(len(sample)))
    case.compared |= {f"out/{run}/{name}" for name in ("attention_mask", "position_ids", "inputs_embeds", "logits")}
