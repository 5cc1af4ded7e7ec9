"""ToMe: the matching on given tensors, and in every block of a small vision transformer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from duet_vlm import EncoderView, SpanPlan
from duet_vlm.methods.encoder.tome import ToMe
from duet_vlm.methods.vision_tower.tome_tower import ToMeTower
from duet_vlm.models.adapter import EncoderCall
from duet_vlm.models.lookup import adapter_for
from duet_vlm.ops.merge import matched, merged_rows
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.runtime.active_config import ActiveConfig
from duet_vlm.runtime.context import EncodeContext, ThreadState, TowerWork
from duet_vlm.runtime.encode.attention_intercept import SizeBias
from duet_vlm.runtime.vision_tower.batched import BatchedTowerState
from duet_vlm.runtime.vision_tower.block_hooks import BlockHooks
from duet_vlm.runtime.vision_tower.patch_groups import stages_of
from duet_vlm.runtime.vision_tower.tower_hooks import TowerHooks
from golden_runner.case import STATE, Case


def check_matching(case: Case) -> None:
    metric, x = case.given("metric"), case.given("x")
    for run, settings in case.runs.items():
        protected = settings["class_token"] + settings["distill_token"]
        size = case.given("size") if settings["use_size"] else torch.ones(*x.shape[:2], 1)
        source, target, stays, selection = matching(metric, settings["r"], protected)
        case.fact(run, "r_used", source.shape[1])
        for name, ours in (("merged_source", source), ("merged_target", target), ("unmerged", stays)):
            case.same(run, name, ours)
        joined = membership(selection, metric.shape[1])
        case.same(run, "source", joined)
        merged, sizes = averaged(selection, x, size)
        case.close(run, "x", merged, STATE)
        case.close(run, "size", sizes, STATE)
        case.close(run, "x_sum", summed(selection, x), STATE)
        if settings["distill_token"]:  # the released way back forgets the order that this token makes
            case.compared.add(f"out/{run}/unmerged_back")
        else:
            case.close(run, "unmerged_back", joined.float().transpose(1, 2) @ case.out(run, "x"), STATE)
        if not protected and not settings["use_size"]:
            check_method(case, run, metric, x, metric.shape[1] - source.shape[1])


def check_method(case: Case, run: str, metric: Tensor, x: Tensor, rows: int) -> None:
    """One round of the method is the matching."""
    reducer = ToMe.official(rows)
    plan = reducer.plan(metric.shape[1], 1, None)
    number = torch.ones(len(metric), dtype=torch.long)
    view = EncoderView(
        torch.ones(metric.shape[:2], dtype=torch.bool), number * rows, number * 0, (plan,) * len(metric), None, metric
    )
    assert isinstance(plan, SpanPlan) and plan.entry == rows
    case.close(run, "x", merged_rows(x, reducer.select_tokens(view)), STATE)


def matching(metric: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor, Tensor, Selection]:
    """Who is merged into whom, who looked and stays, and all of it as rows in the order of the released code."""
    batch, tokens = metric.shape[:2]
    source, target = matched(metric, torch.ones(batch, tokens, dtype=torch.bool), protected)
    r = min(r, (tokens - protected) // 2)
    stays = source[:, r:].sort(1).values if protected else source[:, r:]
    odd = torch.arange(1, tokens, 2).expand(batch, -1)
    index = torch.cat([stays, odd], 1)
    if protected == 2:
        index = torch.cat([stays[:, :1], odd[:, :1], stays[:, 1:], odd[:, 1:]], 1)
    everyone = torch.arange(tokens).expand(batch, -1)
    place = everyone.scatter(1, source[:, :r], target[:, :r])
    row = torch.zeros_like(everyone).scatter(1, index, torch.arange(index.shape[1]).expand_as(index))
    return (
        source[:, :r],
        target[:, :r],
        stays,
        Selection(index, torch.ones_like(index, dtype=torch.bool), everyone, row.gather(1, place)),
    )


def weighted(selection: Selection, x: Tensor, weights: Tensor) -> Tensor:
    return merged_rows(
        x, Selection(selection.index, selection.valid, selection.source_tokens, selection.target_row, weights=weights)
    )


def summed(selection: Selection, x: Tensor) -> Tensor:
    return weighted(selection, x, torch.ones(selection.source_tokens.shape))


def averaged(selection: Selection, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    sizes = summed(selection, size)
    share = size[..., 0] / sizes[..., 0].gather(1, selection.target_row)
    return weighted(selection, x, share), sizes


def membership(selection: Selection, tokens: int) -> Tensor:
    return F.one_hot(selection.target_row, selection.index.shape[1]).transpose(1, 2)[:, :, :tokens]


def schedule(settings: dict[str, Any], layers: int) -> list[int]:
    """How many leave in each block."""
    r = settings["r"]
    if settings["r_tuple"]:
        low = int(r[0] * (1 - r[1]))
        step = (2 * r[0] - 2 * low) / (layers - 1)
        return [int(low + step * layer) for layer in range(layers)]
    return [*r, *[0] * (layers - len(r))] if isinstance(r, list) else [r] * layers


def check_tower(case: Case) -> None:
    config, weights = case.config, case.weights()
    for run, settings in case.runs.items():
        x = case.given("x")
        size, counts = torch.ones(*x.shape[:2], 1), []
        source = torch.eye(x.shape[1], dtype=torch.long).expand(len(x), -1, -1)
        leaving = schedule(settings, config["layers"])
        case.fact(run, "schedule", leaving)
        for layer, r in enumerate(leaving):
            block = {
                name.removeprefix(f"blocks.{layer}."): w
                for name, w in weights.items()
                if name.startswith(f"blocks.{layer}.")
            }
            added, metric = attention(block, x, size if settings["prop_attn"] else None, config["heads"])
            x = x + added
            if r > 0:
                case.close(run, f"layer{layer}/metric", metric, STATE)
                moved, onto, stays, selection = matching(metric, r, int(config["class_token"]))
                for name, ours in (("merged_source", moved), ("merged_target", onto), ("unmerged", stays)):
                    case.same(run, f"layer{layer}/{name}", ours)
                source = membership(selection, x.shape[1]) @ source
                x, size = averaged(selection, x, size)
            hidden = F.layer_norm(x, x.shape[-1:], block["norm2.weight"], block["norm2.bias"], 1e-6)
            hidden = F.gelu(F.linear(hidden, block["mlp.fc1.weight"], block["mlp.fc1.bias"]))
            x = x + F.linear(hidden, block["mlp.fc2.weight"], block["mlp.fc2.bias"])
            case.close(run, f"layer{layer}/x", x, STATE)
            counts.append(x.shape[1])
        case.fact(run, "tokens_after_each_layer", counts)
        case.close(
            run, "features", F.layer_norm(x, x.shape[-1:], weights["norm.weight"], weights["norm.bias"], 1e-6), STATE
        )
        case.close(run, "size", size, STATE)
        case.same(run, "source", source)
        # no more than a block can
        leaving = [before - after for before, after in zip([case.given("x").shape[1], *counts], counts, strict=False)]
        check_flow(case, run, leaving, size)


def check_flow(case: Case, run: str, leaving: list[int], size: Tensor) -> None:
    """The method inside a stock CLIP tower with these weights: rows, their order and sizes, through the very hooks that
    ``attach`` installs."""
    config, given = case.config, case.given("x")
    extra, count = int(config["class_token"]), given.shape[1] - int(config["class_token"])
    side = round(count**0.5)
    if side * side != count or not extra:
        return  # no picture that a CLIP tower could take
    model = clip_with(case, side)
    reducer = ToMeTower(
        keep=count - sum(leaving),
        shares=tuple(leaving),
        order="released",
        options=TokenOptions(protect_predicting_tokens=False, proportional_attention=case.runs[run]["prop_attn"]),
    )
    adapter, stacks = adapter_for(model), ThreadState()
    blocks = dataclasses.replace(adapter.blocks_to_reduce()[0], output_block=config["layers"])
    flow = TowerHooks(adapter, stacks)
    stages = stages_of(reducer, [count], [count - sum(leaving)], config["layers"], [count])
    every = torch.ones(len(given), count, dtype=torch.bool)
    tower = BatchedTowerState(
        stages={after: counts * len(given) for after, counts in stages.items()}, grids=((side, side),) * len(given), num_cls=extra,
        uses_size_bias=reducer.options.proportional_attention, invalid_code=torch.tensor(0), pooled_count=(0,) * len(given), units=torch.arange(count).expand(len(given), -1), valid=every,
        is_output=every, content=every, size=every.float(), cells=torch.arange(count)[:, None], total=given.shape[1],
    )  # fmt: skip
    stacks.encode_contexts.append(
        EncodeContext(EncoderCall("image"), ActiveConfig(reducer, None, 1), tower_work=TowerWork(state=tower))
    )
    inside = BlockHooks(flow)
    hidden = given
    for number, block in enumerate(blocks.block_modules):
        SizeBias(block.attention, stacks, number)
        block.norm.register_forward_pre_hook(functools.partial(inside.before_mlp, number))
        block.mlp.register_forward_hook(functools.partial(inside.after_mlp, number))
        block.block.register_forward_hook(functools.partial(inside.after_block, number))
        hidden = block.block(hidden, None)
    weights = case.weights()
    case.close(
        run,
        "features",
        F.layer_norm(hidden, hidden.shape[-1:], weights["norm.weight"], weights["norm.bias"], 1e-6),
        STATE,
    )
    torch.testing.assert_close(tower.size, size[:, extra:, 0])


def clip_with(case: Case, side: int) -> LlavaForConditionalGeneration:
    """A LLaVA whose tower has the recorded weights."""
    config, weights = case.config, case.weights()
    vision = CLIPVisionConfig(
        hidden_size=config["dim"], intermediate_size=config["mlp"], num_hidden_layers=config["layers"], num_attention_heads=config["heads"],
        image_size=side, patch_size=1, hidden_act="gelu", layer_norm_eps=1e-6,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=9,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=8)
    ).eval()
    for number, layer in enumerate(model.model.vision_tower.encoder.layers):
        own = {
            name.removeprefix(f"blocks.{number}."): value
            for name, value in weights.items()
            if name.startswith(f"blocks.{number}.")
        }
        state = {}
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", own[f"attn.qkv.{kind}"].chunk(3), strict=True):
                state[f"self_attn.{name}_proj.{kind}"] = part
            for ours, theirs in NAMES.items():
                state[f"{ours}.{kind}"] = own[f"{theirs}.{kind}"]
        layer.load_state_dict(state)
    return model


NAMES = {
    "self_attn.out_proj": "attn.proj",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def attention(block: dict[str, Tensor], x: Tensor, size: Tensor | None, heads: int) -> tuple[Tensor, Tensor]:
    """What attention adds to rows that stand for ``size`` of them, and the mean of the keys over heads."""
    hidden = F.layer_norm(x, x.shape[-1:], block["norm1.weight"], block["norm1.bias"], 1e-6)
    query, key, value = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in F.linear(hidden, block["attn.qkv.weight"], block.get("attn.qkv.bias")).chunk(3, -1)
    )
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if size is not None:
        logits = logits + size.log()[:, None, None, :, 0]
    rows = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return F.linear(rows, block["attn.proj.weight"], block["attn.proj.bias"]), key.mean(1)
