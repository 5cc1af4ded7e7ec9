"""ApET: both stages on given rows, before the decoder and inside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from duet_vlm import DecoderView, EncoderView, Selection
from duet_vlm.methods.two_stage.apet import ApET
from duet_vlm.ops.merge import merged_rows
from golden_runner.case import STATE, Case

HALF = {"relative": 0.0, "absolute": 2e-2}


def encoded(method: ApET, rows: Tensor, keep: int) -> Selection:
    """Of one span [1, N, C], before the decoder."""
    everyone, count = torch.ones(rows.shape[:2], dtype=torch.bool), torch.tensor([keep])
    plan = replace(method, keep=keep, schedule=()).plan(rows.shape[1], 4, None)
    return method.select_tokens(EncoderView(everyone, count, count * 0, (plan,), features=rows))


def dropped(method: ApET, rows: Tensor, keep: int) -> Selection:
    everyone = torch.ones(rows.shape[:2], dtype=torch.bool)
    return method.prune_tokens(
        DecoderView(everyone, torch.tensor([keep]), host_counts=((rows.shape[1], keep),), hidden_states=rows)
    )


def rounded(rows: Tensor, settings: dict[str, Any]) -> Tensor:
    """Rows as they are merged where the recording has the released rounding."""
    return rows.half().float() if settings.get("fp16") else rows.bfloat16().float() if settings.get("bf16") else rows


def allowed(settings: dict[str, Any]) -> dict[str, float]:
    return HALF if settings.get("fp16") or settings.get("bf16") else STATE


def settle(case: Case, run: str, found: list[dict[str, Tensor]], batched: bool) -> None:
    for name in found[0]:
        ours = torch.stack([each[name] for each in found]) if batched else found[0][name]
        compare = case.close if ours.is_floating_point() else case.same
        if case.has(run, name):
            compare(run, name, ours)


def settings_of(case: Case, run: str) -> tuple[int, int]:
    """Rows that stay, and basis tokens."""
    told = case.config | case.runs[run]
    keep = next(
        told[name]
        for name in ("kept", "visual_token_num", "image_token_list_next", "next_image_tokens")
        if name in told
    )
    return keep, told["basis_token_num"]


def starts(case: Case, run: str) -> list[int]:
    return case.out(run, "basis_index").view(-1, settings_of(case, run)[1])[:, 0].tolist()


def check_encoder(case: Case) -> None:
    features = case.given("features")[:, 1:]
    for run, settings in case.runs.items():
        keep, basis = settings_of(case, run)
        given = rounded(features, settings)
        found, out = [], []
        for rows, plain, start in zip(given.split(1), features.split(1), starts(case, run), strict=True):
            method = ApET.official(keep, basis=basis, start=start)
            selection = encoded(method, plain, keep)
            found.append(choice(method, plain, keep) | {"kept_index": selection.index[0]})
            out.append(merged_rows(rows, selection)[0])
        settle(case, run, found, batched=True)
        case.close(run, "output_rows", torch.stack(out), allowed(settings))


def check_llm(case: Case) -> None:
    """The rows of the image are replaced by those that stay; on LLaVA positions are renumbered."""
    qwen = "Qwen" in case.meta["method"]
    hidden, begin, count = case.given("hidden_states"), case.config["image_start"], case.config["image_tokens"]
    rows = hidden[:, begin : begin + count]
    for run, settings in case.runs.items():
        keep, basis = settings_of(case, run)
        more: dict[str, Any] = (
            {"own_share": 0.5, "ridge": case.config["ridge"], "options": {"positions": "keep"}} if qwen else {}
        )
        method = ApET.official(keep, basis=basis, start=starts(case, run)[0], **more)
        selection = dropped(method, rows, keep)
        settle(case, run, [choice(method, rows, keep) | {"kept_index": selection.index[0]}], batched=False)
        merged = merged_rows(rows, selection)[0]
        case.close(
            run, "hidden_states", torch.cat([hidden[0, :begin], merged, hidden[0, begin + count :]]), allowed(settings)
        )
        stays = behind(selection.index[0], begin, count, hidden.shape[1])
        positions = case.given("position_ids")[:, stays] if qwen else torch.arange(len(stays))
        case.same(run, "position_ids", positions)


def check_qwen_input(case: Case) -> None:
    ids, table = case.given("input_ids")[0], case.tensors["weights/embed_tokens.weight"]
    begin, count = case.config["text_before"], case.config["image_tokens"]
    rows = case.given("image_embeds")[None]
    for run, settings in case.runs.items():
        keep, basis = settings_of(case, run)
        method = ApET.official_qwen(settings["image_token_ratio"], basis=basis, start=starts(case, run)[0])
        assert method.plan(count, 4, None).entry == keep
        selection = encoded(method, rows, keep)
        settle(case, run, [choice(method, rows, keep) | {"kept_index": selection.index[0]}], batched=False)
        merged = merged_rows(rounded(rows, settings), selection)[0]
        case.close(
            run,
            "inputs_embeds",
            torch.cat([table[ids[:begin]], merged, table[ids[begin + count :]]]),
            allowed(settings),
        )
        case.same(
            run, "position_ids", case.given("position_ids")[:, behind(selection.index[0], begin, count, len(ids))]
        )


def check_video(case: Case) -> None:
    """Frame by frame; the CLS row in front is not the method's."""
    features = case.given("features")
    large, basis = settings_of(case, "v")
    found, out = [], []
    for frame, start in zip(features.split(1), starts(case, "v"), strict=True):
        method = ApET(keep=large + basis, basis=basis, slots="behind", start=start)
        found.append(choice(method, frame[:, 1:], large + basis, large))
        out.append(
            torch.cat([frame[0, :1], merged_rows(frame[:, 1:], encoded(method, frame[:, 1:], large + basis))[0]])
        )
    settle(case, "v", found, batched=True)
    case.close("v", "output", torch.stack(out))


def choice(method: ApET, rows: Tensor, keep: int, top: int | None = None) -> dict[str, Tensor]:
    """What one span's choice is made of, by name."""
    everyone, count = torch.ones(rows.shape[:2], dtype=torch.bool), torch.tensor([keep])
    basis, _, error = method.errors(rows, everyone, count, keep)
    return {
        "basis_index": basis[0],
        "errors": error[0],
        "top_index": error[0].argsort(descending=True, stable=True)[: top or keep],
    }


def behind(kept: Tensor, begin: int, count: int, rows: int) -> Tensor:
    """Places of the rows that are left: all text, and the kept tokens of the image."""
    return torch.cat([torch.arange(begin), begin + kept, torch.arange(begin + count, rows)])
