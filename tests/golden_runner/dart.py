"""DART: the rule on given rows and keys, and inside a Llama decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from duet_vlm import DecoderView
from duet_vlm.methods.decoder.dart import Dart
from golden_runner import inside
from golden_runner.case import Case


def preset(case: Case, settings: dict[str, Any]) -> Dart:
    pivots = settings["pivot_image_token"], settings["pivot_text_token"]
    return Dart.official(settings.get("K", 1), settings["max_num_trunction"], *pivots)


class Drop(inside.Inside):
    def compare(self) -> None:
        case, run, layer = self.case, self.run, self.settings["K"]
        (view,) = self.views
        start, before = self.prompt.starts[0], self.state.layer_group(layer - 1).tokens.prompt_index[0]
        normed = self.handle.adapter.text_model.norm(self.watch.output[layer - 1])[0]
        case.close(run, "hidden_normed", normed)
        keys = torch.zeros_like(case.out(run, "keys"))
        # only those of the image and of the text behind it are shown to the method
        keys[before] = case.out(run, "keys")[before]
        keys[view.positions[0]], keys[view.text_positions[0]] = (
            self.repeated(view.keys[0]),
            self.repeated(view.text_keys[0]),
        )
        case.close(run, "keys", keys)
        case.same(run, "kept", self.kept(layer))
        case.fact(run, "kept", len(self.kept(layer)))
        compare_rule(case, run, view, preset(case, self.settings), start)
        if case.has(run, "hidden_after"):
            case.close(run, "hidden_after", self.watch.hidden[layer])
        if case.has(run, "position_ids_after"):
            self.rotates(layer, "position_ids_after")
        super().compare()

    def repeated(self, keys: Tensor) -> Tensor:
        """Keys [n, key heads x d] as recorded, a key head for every query head."""
        heads, groups = self.case.config["num_attention_heads"], self.case.config["num_key_value_heads"]
        return keys.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, 1).flatten(1)


def compare_rule(case: Case, run: str, view: DecoderView, method: Dart, start: int) -> None:
    """Pivots, their order, and what another order would keep."""
    image = view.positions[0][view.keys[0].abs().sum(-1).argsort(descending=True)[: method.visual_pivots]]
    text = view.text_positions[0][view.text_keys[0].abs().sum(-1).argsort(descending=True)[: method.text_pivots]]
    case.same(run, "pivots_image", image)
    case.same(run, "pivots_text", text)
    case.same(run, "pivot_order", list(set(image.tolist() + text.tolist())))
    plain = replace(method, pivot_order="norm").prune_tokens(view)[0]
    case.same(run, "kept_image_then_text_order", plain.nonzero().flatten())


def check(case: Case) -> None:
    if case.meta["level"] != "function":
        inside.runs(case, Drop, preset)
        return
    start, count = case.meta["config"]["image_start"], case.meta["config"]["image_tokens"]
    rows, keys = case.given("hidden_normed")[None], case.given("keys")[None]
    image, behind = slice(start, start + count), slice(start + count, None)
    for run, settings in case.runs.items():
        method = preset(case, settings)
        keep = method.schedule[0][1]
        view = DecoderView(
            _all(rows[:, image]), torch.tensor([keep]), host_counts=((count, keep),), hidden_states=rows[:, image], text_hidden_states=rows[:, behind],
            text_valid=_all(rows[:, behind]), keys=keys[:, image], text_keys=keys[:, behind],
            positions=torch.arange(rows.shape[1])[None, image], text_positions=torch.arange(rows.shape[1])[None, behind],
        )  # fmt: skip
        case.same(run, "kept", method.prune_tokens(view)[0].nonzero().flatten())
        case.fact(run, "kept", keep)
        compare_rule(case, run, view, method, start)


def _all(rows: Tensor) -> Tensor:
    return torch.ones(rows.shape[:2], dtype=torch.bool)
