"""SparseVLM inside a Llama decoder: raters, scores, clusters, and what goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from duet_vlm.methods.decoder.sparsevlm import SparseVLM
from duet_vlm.planning.tokens import TokenMap
from duet_vlm.runtime.prefill.attention_scores import TextAttentionScorer
from golden_runner import inside
from golden_runner.case import COARSE, Case, near
from golden_runner.t2v import Prompt


def preset(case: Case, settings: dict[str, Any]) -> SparseVLM:
    """A run's stages: ``layer_dict`` counts from the layer whose attention ranks."""
    made = SparseVLM.official(192, settings["version"].replace("_", ".").replace("1.0", "1.5"))
    layers = settings.get("layer_dict") or {"2": 0, "6": 1, "15": 2}
    budgets = settings.get("budgets") or [
        keep for _, keep in SparseVLM.official(settings["retained"], "1.5" if made.recycle else "2.0").schedule
    ]
    return replace(made, schedule=tuple((int(layer) + 1, budgets[stage]) for layer, stage in layers.items()))


class Staged(inside.Inside):
    raters: list[Tensor]

    def compare(self) -> None:
        case, run = self.case, self.run
        reducer = preset(case, self.settings)
        case.fact(run, "tokens_entering_each_layer", self.widths)
        self.compare_raters()
        views = iter(self.views)
        for stage, (layer, _) in enumerate(reducer.schedule):
            view, name = next(views), f"stage{stage}"
            scores = reducer._mean(view.scores, view.valid)
            case.close(run, f"{name}/scores", scores[0], COARSE)
            if case.has(run, f"{name}/head_sums"):
                raters = len(case.out(run, "raters"))
                case.close(run, f"{name}/head_sums", view.scores[0].sum(0) * raters, COARSE)
                heads = view.scores[0].sum(0).topk(reducer.best_heads).indices
                case.same(run, f"{name}/heads_used", heads.sort().values)
            chosen = reducer.prune_tokens(view)
            if reducer.recycle:
                self.compare_recycled(name, view, chosen, layer)
            else:
                case.same(run, f"{name}/kept_in_current_visual_block", chosen[0].nonzero().flatten())
            case.close(run, f"{name}/hidden_states", self.watch.hidden[layer])
            self.rotates(layer, f"{name}/position_ids")
        super().compare()

    def compare_raters(self) -> None:
        case, run = self.case, self.run
        embeds, start, count = case.given("inputs_embeds")[0], self.prompt.starts[0], self.prompt.counts[0]
        likeness = embeds[start : start + count] @ embeds[start + count :].T
        case.close(run, "rater_scores", likeness.softmax(-1).mean(0), COARSE)
        rates = self.raters[0][0]
        case.same(run, "raters", rates.nonzero().flatten() - start - count)

    def compare_recycled(self, name: str, view: Any, chosen: Any, layer: int) -> None:
        case, run = self.case, self.run
        index = chosen.index[0][chosen.valid[0]]
        clusters = len(case.out(run, f"{name}/recycled_tokens"))
        kept = len(index) - clusters
        case.same(run, f"{name}/kept_in_current_visual_block", index[:kept])
        case.same(run, f"{name}/recycled_source", chosen.source_tokens[0])
        centres = [chosen.source_tokens[0].tolist().index(token) for token in index[kept:].tolist()]
        if case.has(run, f"{name}/cluster_centers"):
            case.same(run, f"{name}/cluster_centers", centres)
        into = chosen.target_row[0] - kept
        for number, place in enumerate(centres):
            into[place] = number
        if clusters > 1:
            case.same(run, f"{name}/cluster_assignment", into)
        else:
            case.same(run, f"{name}/cluster_assignment", torch.zeros_like(into))
        state = self.state.layer_group(layer).tokens
        rows = self.watch.hidden[layer][0][state.visual[0]]
        near(f"{run}/{name}/recycled_tokens", rows[kept:], case.out(run, f"{name}/recycled_tokens"))
        case.compared.add(f"out/{run}/{name}/recycled_tokens")

    def decode(self) -> None:
        """Recorded embeddings, each layer going on at its own place or at the full length."""
        steps = len(self.case.names(self.run, "decode"))
        seen, grown = self.prompt.embeds.shape[1], []
        for t in range(steps):
            self.prompt.model(
                inputs_embeds=self.case.given("decode_embeds")[t], past_key_values=self.cache, use_cache=True,
                position_ids=torch.full((1, 1), seen + t),
            )  # fmt: skip
            self.case.close(self.run, f"decode{t}/last_hidden_state", self.watch.last)
            for layer, place in enumerate(self.settings["decode_position_at_each_layer"][t]):
                self.watch.rotates(layer, torch.tensor([[place]]))
            grown.append([layer.keys.shape[-2] for layer in self.cache.layers])
        self.case.fact(self.run, "kv_len_after_each_decode_step", grown)


class OtherNoise(Staged):
    """The same input with noise that chose other centres: who is recycled is still the same."""

    def compare(self) -> None:
        (view,), name = self.views, "stage0"
        chosen = self.handle.reducer.prune_tokens(view)
        self.compare_raters()
        self.case.close(self.run, f"{name}/scores", view.scores[0].mean(1), COARSE)
        self.case.same(self.run, f"{name}/recycled_source", chosen.source_tokens[0])
        self.case.same(self.run, f"{name}/kept_in_current_visual_block", chosen.index[0][: self.settings["budgets"][0]])
        self.rotates(self.handle.reducer.schedule[0][0], f"{name}/position_ids")
        self.case.compared |= {f"out/{self.run}/{rest}" for rest in self.case.names(self.run)}


def check(case: Case) -> None:
    some = next(iter(case.runs.values()))
    case.tensors["weights/embed_tokens.weight"] = torch.zeros(case.config["vocab_size"], case.config["hidden_size"])
    prompt = Prompt(case, [some["pre"]], [some["n"]])
    for run, settings in case.runs.items():
        kind = OtherNoise if run == "other_outcome" else Staged
        with _watching() as raters:
            kind.raters = raters
            kind(case, run, preset(case, settings), prompt)


@contextmanager
def _watching() -> Iterator[list[Tensor]]:
    """The raters that are chosen."""
    seen: list[Tensor] = []
    plain = TextAttentionScorer.choose_raters

    def chosen(self: TextAttentionScorer, embeds: Tensor, tokens: TokenMap) -> None:
        plain(self, embeds, tokens)
        seen.append(self.raters)

    with patch.object(TextAttentionScorer, "choose_raters", chosen):
        yield seen
