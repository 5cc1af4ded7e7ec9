"""FitPrune inside a Llama decoder: who leaves after each layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from duet_vlm.methods.decoder.fitprune import FitPrune
from duet_vlm.ops.score import query_attention
from golden_runner import inside
from golden_runner.case import COARSE, STATE, Case, near
from golden_runner.t2v import Prompt


def preset(case: Case, settings: dict[str, Any]) -> FitPrune:
    return FitPrune.official(settings["reduction_ratio"], case.config["num_hidden_layers"])


class Fitted(inside.Inside):
    def compare(self) -> None:
        case, run, depth = self.case, self.run, self.case.config["num_hidden_layers"]
        views, kept = iter(self.views), self.kept(0)
        for layer, deleted in enumerate(self.settings["deleted_per_layer"]):
            if not deleted:
                continue
            name, before = f"layer{layer}", kept
            scores = self.last_scores() if layer == depth - 1 else self.scores(next(views))
            case.close(run, f"{name}/scores", scores, COARSE)
            order = scores.argsort(stable=True)[:deleted].tolist()
            kept = (
                [token for place, token in enumerate(before) if place not in set(order)]
                if layer == depth - 1
                else self.kept(layer + 1)
            )
            case.same(run, f"{name}/deleted_in_current_block", order)
            case.same(run, f"{name}/deleted_original_image_index", [before[place] for place in order])
            case.same(run, f"{name}/kept_original_image_index", kept)
        left = self.left(depth, kept)
        for name in case.names(run, "layer"):
            if name.endswith("hidden_states_after_layer"):
                layer = int(name.split("/")[0].removeprefix("layer"))
                case.close(run, name, self.last[:, left] if layer == depth - 1 else self.watch.hidden[layer + 1])
        case.fact(run, "tokens_entering_each_layer", self.widths)
        near(f"{run}/last_hidden_state", self.last[:, left], case.out(run, "last_hidden_state"), STATE)
        case.compared.add(f"out/{run}/last_hidden_state")
        case.fact(run, "kv_len_after_prefill", self.lengths)
        if case.has(run, "position_ids_entering_last_layer"):
            self.rotates(depth - 1, "position_ids_entering_last_layer")
        self.decode()

    def scores(self, view: Any) -> Tensor:
        return (view.scores * view.visual_self_attention)[0] * self.asking

    @property
    def asking(self) -> int:
        """Recorded sums over the text rows are means here."""
        return self.state.record.num_queries[0]

    def left(self, depth: int, kept: list[int]) -> list[int]:
        """The rows of the last layer that are left after it, which nothing reads here: the recording lets go of them,
        too."""
        tokens = self.state.layer_group(depth - 1).tokens
        stays = {token + self.prompt.starts[0] for token in kept}
        return [
            row
            for row, slot in enumerate(tokens.prompt_index[0].tolist())
            if not tokens.visual[0, row] or slot in stays
        ]

    def last_scores(self) -> Tensor:
        """Of the last layer, behind which nothing is dropped here."""
        layer = self.case.config["num_hidden_layers"] - 1
        adapter, tokens = self.handle.adapter, self.state.layer_group(layer).tokens
        hidden, rotary = self.watch.hidden[layer], self.watch.rotary[layer]
        rows = torch.arange(hidden.shape[1])[None]
        query, key = adapter.project(adapter.layers[layer], hidden, rotary, rows)
        allowed = rows[..., None] >= rows[:, None]
        visual = tokens.visual.float()
        text = (rows > tokens.visual[0].nonzero().max()).float()
        found = [
            query_attention(query, key, adapter.scaling(adapter.layers[layer]), allowed, w, heads="max")
            for w in (text, visual)
        ]
        return (found[0] * found[1])[0][tokens.visual[0]] * self.asking

    def decode(self) -> None:
        inputs, grown = self.case.given("decode_embeds"), []
        for t in range(0 if inputs is None else len(inputs)):
            place = torch.tensor([[self.settings["decode_position"][t]]])
            self.prompt.model(inputs_embeds=inputs[t], past_key_values=self.cache, use_cache=True, position_ids=place)
            self.case.close(self.run, f"decode{t}/last_hidden_state", self.watch.last)
            for layer in range(len(self.watch.rotary)):
                self.watch.rotates(layer, place)
            grown.append([layer.keys.shape[-2] for layer in self.cache.layers])
        self.case.fact(self.run, "kv_len_after_each_decode_step", grown)


def check(case: Case) -> None:
    case.tensors["weights/embed_tokens.weight"] = torch.zeros(case.config["vocab_size"], case.config["hidden_size"])
    prompt = Prompt(case, [case.meta["system_tokens"]], [case.meta["image_tokens"]])
    for run, settings in case.runs.items():
        Fitted(case, run, preset(case, settings), prompt)
